"""A pass with kernels compiled together, and one after it, for a GPU that is not there.

    python tests/ops/launch_kernels.py training     (a memory, forward and backward)
    python tests/ops/launch_kernels.py decoding     (steps of a model)

To be run without Triton's interpreter. Nothing is computed: launches are noted only. A line for each pass, as JSON, has
the kernels that it compiled and those that it launched, by the hash of their machine code.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
from compile_kernels import learn
from triton.backends.compiler import GPUTarget

from titans_pytorch import MemoryAsContextTransformer, ModelState, NeuralMemory, without_kernels
from titans_pytorch.generation.stepper import Stepper
from titans_pytorch.ops import _dispatch, _triton
from titans_pytorch.ops._compilation import kernels_compiled_together

compiled: list[str] = []
launched: list[str] = []


class Driver:
    utils = SimpleNamespace(
        get_device_properties=lambda device: {'max_shared_mem': 227 * 1024},
        load_binary=lambda *binary: (None, None, 32, 0, 1024),
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: launched.append(metadata.hash)


def training() -> Callable[[], None]:
    memory = NeuralMemory(dim=64, dim_head=32, heads=2, chunk_size=4, batch_size=16, spectral_norm_surprises=True)
    return lambda: learn(memory, torch.randn(1, 32, 64))


def decode(model: MemoryAsContextTransformer, cache: ModelState) -> None:
    """Steps up to the end of a chunk."""
    step = Stepper.of(model, cache, cuda_graphs=None)
    with torch.no_grad():
        for _ in range(4):
            step(torch.zeros(2, dtype=torch.long))


def decoding() -> Callable[[], None]:
    model = MemoryAsContextTransformer(
        num_tokens=32,
        dim=32,
        depth=2,
        heads=2,
        dim_head=16,
        segment_len=8,
        neural_memory_layers=(2,),
        neural_memory_segment_len=4,
        neural_memory_kwargs={'dim_head': 16, 'heads': 2, 'spectral_norm_surprises': True},
    )
    with torch.no_grad(), without_kernels():
        _, cache = model(torch.zeros(2, 8, dtype=torch.long), return_cache=True)
    return partial(decode, model, cache)


def main() -> None:
    _dispatch.compute_capability = lambda device: 9  # type: ignore[assignment]
    # before kernels import it
    _triton.overlapping = lambda *_: {'START': _triton.READING_CONSTANTS.value, 'launch_pdl': True}
    run = {'training': training, 'decoding': decoding}[sys.argv[1]]()
    triton.runtime.driver.set_active(Driver())
    triton.knobs.compilation.listener = lambda *, metadata, **_: compiled.append(metadata['hash'])
    for context in (kernels_compiled_together(), contextlib.nullcontext()):
        with context:
            run()
        print(json.dumps({'compiled': compiled, 'launched': launched}))
        compiled.clear()
        launched.clear()


if __name__ == '__main__':
    main()
