"""Where the Triton kernels of this package run, and the switch that turns them off."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_TRITON = importlib.util.find_spec('triton') is not None

_LOCK = threading.Lock()
_switched_off = 0  # by how many `without_kernels`
_enabled = True


@contextmanager
def without_kernels() -> Iterator[None]:
    """Compute everything by PyTorch's own operations within this context: for derivatives beyond the first.

    On a CUDA device Triton kernels compute parts of the memory, of hyper-connections and of decoding. They can be
    differentiated once, which is what training does. Within this context gradients can be differentiated again
    (`torch.autograd.grad(…, create_graph=True)`: gradient penalties, meta-learning). Take both the forward and the
    backward inside it. Numbers are the same up to rounding; steps are slower. Under the transforms of `torch.func` and
    under forward-mode differentiation no kernel runs anyway, and on a CPU none ever does.

    It holds for all threads of the process, as autograd computes backward passes, and what activation checkpointing
    computes again, in threads of its own. `torch.compile` compiles a function a second time for it.
    """
    global _switched_off, _enabled
    with _LOCK:
        _switched_off += 1
        _enabled = False
    try:
        yield
    finally:
        with _LOCK:
            _switched_off -= 1
            _enabled = _switched_off == 0


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, for which operations of kernels have no rules.

    In a trace of the compiler the answer is no: it takes transforms apart by itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def kernels_are_on() -> bool:
    """Whether kernels run where the device has them. An exported program holds PyTorch's own operations alone."""
    return _enabled and not is_transformed() and not torch.compiler.is_exporting()


def kernels_run_on(device: torch.device) -> bool:
    """Whether kernels run on a device, now."""
    return kernels_are_on() and _has_kernels(device)


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    # Ampere was the first with TF32 and bfloat16
    return device.type == 'cuda' and HAS_TRITON and torch.cuda.get_device_capability(device)[0] >= 8


def kernels_take(rows: list[Tensor], states: list[Tensor]) -> bool:
    """States are in float32; rows in the precision of the products or, under autocast, in any below float64."""
    device = rows[0].device
    if not kernels_run_on(device) or any(t.dtype != torch.float32 for t in states):
        return False
    if not torch.is_autocast_enabled(device.type):
        return all(t.dtype == torch.float32 for t in rows)
    return all(t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in rows)


def differentiated_once(*backwards: Any) -> None:
    """Let a derivative of these operations, which compute gradients, be an error that names the switch."""
    from titans_pytorch.ops._registration import differentiated_once

    for backward in backwards:
        differentiated_once(backward)
