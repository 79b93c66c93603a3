"""Independent kernels, side by side on a GPU."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch


def side_by_side(*functions: Callable[[], Any]) -> list[Any]:
    """Results of functions whose kernels do not depend on each other.

    While a CUDA graph is captured without gradients, each function has its own stream, so that kernels too small for
    the whole GPU can share it. Otherwise the functions run one after another, because Python takes longer to launch
    such kernels than the GPU takes to run them.

    The caller must keep a reference to every tensor that a function reads until this returns, because memory freed
    earlier could be given to another function. Functions must not share a parameter that autocast casts and caches.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_capturing():
        return [function() for function in functions]
    stream = torch.cuda.current_stream()
    others = _streams(stream, len(functions) - 1)
    for other in others:
        other.wait_stream(stream)
    results = []
    try:
        for function, own in zip(functions, [*others, stream], strict=True):
            with torch.cuda.stream(own):
                results.append(function())
    finally:  # if a function raises an error during capture, that error is the one reported
        for other in others:
            stream.wait_stream(other)
    return results


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _Streams(threading.local):
    """Streams to use beside a given one. In each thread they are always the same, because a stream keeps memory that
    was freed on it for its next use."""

    def __init__(self) -> None:
        self._beside: defaultdict[torch.cuda.Stream, list[torch.cuda.Stream]] = defaultdict(list)

    def __call__(self, stream: torch.cuda.Stream, count: int) -> list[torch.cuda.Stream]:
        streams = self._beside[stream]
        while len(streams) < count:
            streams.append(torch.cuda.Stream(stream.device))
        return streams[:count]


_streams = _Streams()
