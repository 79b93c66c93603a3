"""The rule for where Triton kernels run, and `without_kernels`, the switch that turns them off.

The public function of each operation chooses once per call, and nothing beneath it asks again:

    if use_kernel(inputs) and _supports(…):
        from titans_pytorch.ops.<name> import triton  # Triton need not be installed where no kernel runs
        return triton.<name>(…)
    return reference.<name>(…)

An operation that does the work of several others (`deep_memory_scan`, `spectral_memory_scan`, `spectral_update`) also
has a `has_kernel`, which a backend uses to choose between it and those others.

`use_kernel` is the part shared by all operations. `_supports`, or a comparison of sizes in its place, states the limits
of that operation's kernel.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from titans_pytorch.utils.functional import is_exporting

VOLTA, AMPERE, HOPPER = 7, 8, 9
"""Compute capabilities. Volta is the lowest that Triton supports; Ampere was the first with TF32 and bfloat16."""

LOW_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

MOST_ENTRIES = 2**31
"""Most entries over which a kernel's offsets may range if they have 32 bits."""

_HAS_TRITON = importlib.util.find_spec('triton') is not None
_LOCK = threading.Lock()
_contexts = 0  # number of active `without_kernels` contexts, in all threads
_enabled = True


@contextmanager
def without_kernels() -> Iterator[None]:
    """Context in which PyTorch's own operations compute everything, for derivatives beyond the first.

    On a CUDA device, Triton kernels compute parts of the memory, of attention, of hyper-connections and of decoding.
    They can be differentiated once, which is all that training needs. Within this context, gradients can be
    differentiated again (`torch.autograd.grad(…, create_graph=True)`: gradient penalties, meta-learning); both the
    forward and the backward pass must run inside it. Results agree up to rounding, and steps are slower. Kernels never
    run on a CPU, under the transforms of `torch.func`, or under forward-mode differentiation.

    The switch applies to all threads of the process, because autograd runs backward passes, and activation
    checkpointing recomputes, in threads of their own. `torch.compile` compiles a function a second time for it.
    checkpointing recomputes, in threads of their own. `torch.compile` compiles a function a second time for it.
    """
    global _contexts, _enabled
    with _LOCK:
        _contexts += 1
        _enabled = False
    try:
        yield
    finally:
        with _LOCK:
            _contexts -= 1
            _enabled = _contexts == 0


def use_kernel(
    inputs: Iterable[Tensor | None],
    states: Iterable[Tensor | None] = (),
    *,
    capability: int = AMPERE,
    dtypes: tuple[torch.dtype, ...] = LOW_OR_SINGLE,
    has_backward: bool = True,
) -> bool:
    """True if an operation's kernel is to run for these tensors, which are all on one device; absent ones are `None`.

    Args:
        inputs: tensors that may have any of `dtypes`.
        states: tensors that must be in float32, because rounding errors accumulate in them.
        capability: the lowest compute capability of the device that will do.
        dtypes: dtypes of `inputs`; by default float32 and half precision, with or without autocast.
        has_backward: whether the kernel can be differentiated, as an operation of PyTorch. If not, it is launched
            directly, and only if gradients are off, nothing is compiled, and all tensors are plain ones, neither
            quantised nor distributed.
    """
    present = [t for t in inputs if t is not None]
    if compute_capability(present[0].device) < capability or not kernels_enabled():
        return False
    present_states = [t for t in states if t is not None]
    return (
        all(t.dtype in dtypes for t in present)
        and all(t.dtype == torch.float32 for t in present_states)
        and (has_backward or _can_launch_directly([*present, *present_states]))
    )


def has_short_offsets(*tensors: Tensor) -> bool:
    """True if 32 bits suffice for offsets within each entry of the first axis, for kernels that use 32-bit offsets."""
    return all(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:])) < MOST_ENTRIES for t in tensors
    )


def _can_launch_directly(tensors: list[Tensor]) -> bool:
    ordinary = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return ordinary and all(type(t) in (Tensor, Parameter) for t in tensors)


@torch.compiler.assume_constant_result
def compute_capability(device: torch.device) -> int:
    """The major compute capability of a device that kernels can run on; 0 for any other."""
    return torch.cuda.get_device_capability(device)[0] if device.type == 'cuda' and _HAS_TRITON else 0


def nvidia_capability(device: torch.device) -> int:
    """`compute_capability` of NVIDIA's GPUs; 0 for AMD's, whose version numbers look alike but mean other hardware."""
    return 0 if torch.version.hip is not None else compute_capability(device)


_of_thread = threading.local()


@contextmanager
def constant_weights() -> Iterator[None]:
    """Context for decoding steps that become a CUDA graph, in which kernels may read some tensors while the preceding
    kernels are still running.

    This is safe because only earlier replays write these tensors, or nothing does: parameters and what is folded from
    them, rotary frequencies, the position, which changes at the end of a step, and cached keys and values of other
    positions, which were written in earlier steps by the same kernel that reads them.
    """
    before, _of_thread.has_constant_weights = has_constant_weights(), True
    try:
        yield
    finally:
        _of_thread.has_constant_weights = before


def has_constant_weights() -> bool:
    """True within `constant_weights`, in this thread."""
    return getattr(_of_thread, 'has_constant_weights', False)


def kernels_enabled() -> bool:
    """True unless kernels are switched off, transforms are active, or a program is being exported, which is to contain
    only PyTorch's own operations."""
    return _enabled and not is_transformed() and not is_exporting()


def is_transformed() -> bool:
    """True inside a transform of `torch.func` or forward-mode differentiation, for which kernels have no rules.

    False while the compiler traces: it resolves transforms itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
