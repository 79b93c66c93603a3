"""Compilation of Triton kernels in parallel, where launches would compile one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


@contextlib.contextmanager
def kernels_compiled_together() -> Iterator[None]:
    """Context that skips launches of kernels not compiled yet, and ends when all of these are compiled, in parallel.

    What is computed within it is arbitrary. The compiler holds Python's lock for a small part of its time, so that
    threads suffice.
    """
    from triton import knobs

    compiled: dict[tuple[Any, str], Future] = {}

    def skip(*, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, **_: Any) -> bool:
        if is_manual_warmup:  # by `preload`, or for the registers of a kernel
            return False
        kernel = fn.jit_function
        if (kernel, compile['key']) not in compiled:
            job = pool.submit(preload, kernel, compile['device'], compile['specialization_data'])
            compiled[kernel, compile['key']] = job
        return True

    def preload(kernel: Any, device: int, specialization: str) -> None:
        with torch.cuda.device(device):  # which each thread has of its own
            kernel.preload(specialization)

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = skip
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield
            for job in compiled.values():
                job.result()
    finally:
        knobs.runtime.jit_cache_hook = before
