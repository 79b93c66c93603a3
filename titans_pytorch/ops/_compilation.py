"""Compilation of Triton kernels in parallel, where launches would compile one after the other."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

_LOCK = threading.RLock()


@contextlib.contextmanager
def kernels_compiled_together(in_all_threads: bool = True) -> Iterator[None]:
    """Context that skips launches of kernels not compiled yet, and ends when all of these are compiled, in parallel.

    What is computed within it is arbitrary. The compiler holds Python's lock for a small part of its time, so that
    threads suffice.

    Args:
        in_all_threads: skip launches by other threads, too, such as those of a backward pass. False where other threads
            may run models of their own.
    """
    if importlib.util.find_spec('triton') is None:
        yield
        return
    from triton import knobs

    compiled: dict[tuple[Any, str], Future] = {}
    own_thread = threading.get_ident()

    def skip(*, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, **_: Any) -> bool:
        is_foreign = not in_all_threads and threading.get_ident() != own_thread
        if is_manual_warmup or is_foreign:  # the former by `preload`, or for the registers of a kernel
            return False
        kernel = fn.jit_function
        if (kernel, compile['key']) not in compiled:
            job = pool.submit(preload, kernel, compile['device'], compile['specialization_data'])
            compiled[kernel, compile['key']] = job
        return True

    def preload(kernel: Any, device: int, specialization: str) -> None:
        with torch.cuda.device(device):  # which each thread has of its own
            kernel.preload(specialization)

    with _LOCK:  # the hook is one for all threads
        before = knobs.runtime.jit_cache_hook
        knobs.runtime.jit_cache_hook = skip
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                yield
                for job in compiled.values():
                    job.result()
        finally:
            knobs.runtime.jit_cache_hook = before
