"""Kernels that do not depend on each other, side by side on a GPU."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch


def side_by_side(*functions: Callable[[], Any]) -> list[Any]:
    """Results of functions whose kernels do not depend on each other.

    While a CUDA graph is captured, without gradients, each function has a stream of its own, so that kernels too small
    for the whole GPU share it. Otherwise they run one after the other: Python takes longer to launch such kernels than
    the GPU to run them.

    Memory freed by one function may be taken by another, so the caller keeps all that they read until this returns.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_capturing():
        return [function() for function in functions]
    stream = torch.cuda.current_stream()
    others = _streams(stream.device, len(functions) - 1)
    results = []
    for function, own in zip(functions, [*others, stream]):
        if own is not stream:
            own.wait_stream(stream)
        with torch.cuda.stream(own):
            results.append(function())
    for other in others:
        stream.wait_stream(other)
    return results


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _Streams(threading.local):
    """Each thread has its own, always the same, as a stream keeps memory that was freed on it for its next use."""

    def __init__(self) -> None:
        self._of_device: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)

    def __call__(self, device: torch.device, count: int) -> list[torch.cuda.Stream]:
        streams = self._of_device[device]
        while len(streams) < count:
            streams.append(torch.cuda.Stream(device))
        return streams[:count]


_streams = _Streams()
