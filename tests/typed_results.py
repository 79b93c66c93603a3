"""Types of the models' results by flags, checked by mypy (`make lint`); nothing here runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import assert_type

    from titans_pytorch import MemoryAsGateTransformer, ModelState
    from titans_pytorch.generation.sampling import Sampled

    def results(model: MemoryAsGateTransformer, x: Tensor) -> None:
        assert_type(model(x), Tensor)
        assert_type(model(x, return_loss=True), Tensor)
        assert_type(model(x, return_state=True), tuple[Tensor, ModelState])
        assert_type(model(x, True, return_cache=True), tuple[Tensor, ModelState])
        assert_type(model.sample(x, 4), Tensor)
        assert_type(model.sample(x, 4, 1.0, return_cache=True), tuple[Tensor, ModelState])
        assert_type(model.sample(x, max_new_tokens=4), Tensor)
        assert_type(model.sample(x, 4, return_logprobs=True), Sampled)
        assert_type(model.sample(x, 4, return_cache=True, return_surprises=True), Sampled)
