"""Parallel compilation of Triton kernels, which launches would compile one after another."""

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
    """Context that skips launches of kernels not yet compiled, and at its end compiles all of them in parallel.

    Results computed within it are arbitrary. The compiler holds Python's lock only for a small part of its time, so
    threads are sufficient.

    Args:
        in_all_threads: also skip launches by other threads, such as those of a backward pass. Pass false where other
            threads may be running models of their own.
    """
    if importlib.util.find_spec('triton') is None:
        yield
        return
    from triton import knobs

    compiled: dict[tuple[Any, str], Future] = {}
    own_thread = threading.get_ident()

    def skip(*, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, **_: Any) -> bool:
        is_foreign = not in_all_threads and threading.get_ident() != own_thread
        if is_manual_warmup or is_foreign:  # by `preload`, or to count the registers of a kernel
            return False
        kernel = fn.jit_function
        if (kernel, compile['key']) not in compiled:
            job = pool.submit(preload, kernel, compile['device'], compile['specialization_data'])
            compiled[kernel, compile['key']] = job
        return True

    def preload(kernel: Any, device: int, specialization: str) -> None:
        with torch.cuda.device(device):  # each thread has its own current device
            kernel.preload(specialization)

    with _LOCK:  # all threads share the one hook
        before = knobs.runtime.jit_cache_hook
        knobs.runtime.jit_cache_hook = skip
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                yield
                for job in compiled.values():
                    job.result()
        finally:
            knobs.runtime.jit_cache_hook = before
