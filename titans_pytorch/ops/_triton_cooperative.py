"""Cooperative launches: kernels in which the programs of a head wait for one another."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# each head's counter has a cache line of its own
COUNTER_STRIDE = 32
# registers of a multiprocessor
REGISTERS = 2**16


@triton.jit
def arrive(counter, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tell the other programs of a head that they can read what this one has written."""
    tl.debug_barrier()
    if WAITS:
        tl.atomic_add(counter, 1, sem='release', scope='gpu')


@triton.jit
def wait_for_arrivals(counter, target, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for `target` arrivals of a head's programs since the launch."""
    if WAITS:
        arrived = tl.atomic_add(counter, 0, sem='acquire', scope='gpu')
        while arrived < target:
            arrived = tl.atomic_add(counter, 0, sem='acquire', scope='gpu')
        tl.debug_barrier()


@triton.jit
def wait_for_all(counter, target, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until all programs of a head have arrived, `target` since the launch; all they wrote can be read."""
    arrive(counter, WAITS)
    wait_for_arrivals(counter, target, WAITS)


def new_counters(heads: int, device: torch.device) -> Tensor:
    """A counter of arrivals for each head's programs."""
    return torch.zeros(heads * COUNTER_STRIDE, dtype=torch.int32, device=device)


def heads_together(kernel: Any, arguments: dict[str, Any], heads: int, parts: int, device: torch.device) -> int:
    """How many heads, with `parts` programs each, the GPU can hold at a time; at least one, so that a GPU too small for
    it refuses the launch."""
    return max(1, min(heads, resident_programs(kernel, arguments, device) // parts))


# keyed by kernel and constants: numeric arguments hardly change registers or memory, and with four warps, two programs
# fit whatever the registers
_RESIDENT: dict[Any, int] = {}


def resident_programs(kernel: Any, arguments: dict[str, Any], device: torch.device) -> int:
    """Number of programs of a kernel that the GPU can hold at a time."""
    dtypes = tuple(t.dtype for t in arguments.values() if isinstance(t, Tensor))
    constants = tuple((name, value) for name, value in arguments.items() if name.isupper() or name in _SIZES)
    key = kernel, device, dtypes, constants
    if key not in _RESIDENT:
        compiled = kernel.warmup(**arguments, grid=(1,))
        compiled._init_handles()
        gpu = torch.cuda.get_device_properties(device)
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        # registers are allocated to a warp in units of 256, and the system takes a KiB of shared memory per program
        by_registers = REGISTERS // (warps * 256 * triton.cdiv(compiled.n_regs * 32, 256))
        by_memory = gpu.shared_memory_per_multiprocessor // (triton.cdiv(shared, 1024) * 1024 + 1024)
        by_threads = gpu.max_threads_per_multi_processor // (32 * warps)
        _RESIDENT[key] = max(1, min(by_registers, by_memory, by_threads)) * gpu.multi_processor_count
    return _RESIDENT[key]


_SIZES = ('dim', 'width', 'num_warps', 'num_stages')
