"""The interface a model offers for sampling: a call over a sequence, and steps over buffers of constant size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor
from torch.nn import Module

from titans_pytorch.memory.state import LayerSurprises
from titans_pytorch.utils.shapes import Float, Int


class Cache(Protocol):
    """A model's state between calls, such as `models.state.ModelState`."""

    @property
    def seq_index(self) -> int:
        """Positions read so far."""


CacheT = TypeVar('CacheT', bound=Cache)


class StepKind(NamedTuple):
    """The variant of a step, which its position determines. All steps of one kind run the same operations."""

    is_longterm: bool = False
    """The position holds a long-term memory token, which reads no input token and yields no logits."""
    ends_chunk: bool = False
    """The position completes a chunk, which the memories store."""
    ends_batch: bool = False
    """The position completes a memory batch."""


class StepBuffers(Protocol):
    """Tensors that steps read and write, nested in tuples, lists and dictionaries. Two of them have fixed names."""

    token: Int[Tensor, 'b 1']
    """Input of the next step."""
    logits: Float[Tensor, 'b l']
    """Output of the last step that read a token."""


class Decodable(Protocol[CacheT]):
    """A model that `sample` and `stream` can run."""

    training: bool
    num_tokens: int | None
    """Size of the vocabulary; `None` for a model without logits, which cannot be sampled."""

    @property
    def num_input_tokens(self) -> int | None:
        """Number of token ids that the model reads, which may exceed what it predicts; `None` if unknown."""

    def __call__(
        self,
        x: Tensor,
        *,
        state: Any = None,
        cache: Any = None,
        return_cache: bool = False,
        disable_flex_attn: bool,
        store: bool = True,
        return_surprises: bool = False,
    ) -> Any:
        """Logits of `x`, which continues `state` or starts with the tokens already read into `cache`; and, if
        requested, the new cache and the surprises of the memories."""

    def train(self, mode: bool = True) -> Any: ...

    def modules(self) -> Iterable[Module]: ...

    def num_tokens_until(self, position: int) -> int:
        """Number of tokens before `position`, which is counted like a cache's `seq_index`."""

    def obstacle_to_steps(self, cache: CacheT) -> str | None:
        """Why steps from `cache` would differ from calls of the model; `None` if they agree."""

    def decoding_state(self, cache: CacheT, with_surprises: bool = False) -> Any:
        """`cache` as `StepBuffers`, with buffers for `step_surprises` if requested."""

    def decoding_cache(self, state: Any, position: int) -> CacheT:
        """Inverse of `decoding_state`, after `position` positions; the result does not alias the buffers."""

    def step_kind(self, position: int) -> StepKind: ...

    def step(self, state: Any, kind: StepKind) -> None:
        """Process one position, reading and writing the tensors of `state`. Neither shapes nor operations depend on the
        position, only on `kind`, so that each kind of step can be captured as a CUDA graph."""

    def step_surprises(self, state: Any) -> LayerSurprises:
        """Surprises of the chunk that the last step completed; the result does not alias the buffers."""
