"""A pass of a memory with kernels compiled together, and one after it, for a GPU that is not there.

To be run without Triton's interpreter. Nothing is computed: launches are noted only. A line for each pass, as JSON, has
the kernels that it compiled and those that it launched, by the hash of their machine code.
"""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
from compile_kernels import learn
from triton.backends.compiler import GPUTarget

from titans_pytorch import NeuralMemory
from titans_pytorch.ops import _dispatch
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


def main() -> None:
    _dispatch.compute_capability = lambda device: 9  # type: ignore[assignment]
    triton.runtime.driver.set_active(Driver())
    triton.knobs.compilation.listener = lambda *, metadata, **_: compiled.append(metadata['hash'])
    memory = NeuralMemory(dim=64, dim_head=32, heads=2, chunk_size=4, batch_size=16, spectral_norm_surprises=True)
    for context in (kernels_compiled_together(), contextlib.nullcontext()):
        with context:
            learn(memory, torch.randn(1, 32, 64))
        print(json.dumps({'compiled': compiled, 'launched': launched}))
        compiled.clear()
        launched.clear()


if __name__ == '__main__':
    main()
