"""The device and precision of a run, and whether its steps are compiled or captured."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from typing import NamedTuple

import torch

from titans_pytorch.training.files import RunError, one_line


class Machine(NamedTuple):
    """Where and how a step runs; `choose_machine` fills in what was left open."""

    device: torch.device
    precision: str
    """fp32, tf32 or bf16."""
    triton: bool
    """True on a GPU with Triton."""
    cuda_graphs: bool
    compile: bool

    def autocast(self) -> torch.autocast:
        """The context in which to call the model."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == 'bf16')


PRECISIONS = 'auto', 'fp32', 'tf32', 'bf16'
"""Values of `precision` that `choose_machine` accepts."""


def choose_machine(
    device: str = 'auto',
    precision: str = 'auto',
    cuda_graphs: bool | None = None,
    compile: bool | None = None,
) -> Machine:
    """Choose the machine for these settings and set up the process for it.

    This sets, for the whole process, the current CUDA device, the precision of products in float32
    (`torch.set_float32_matmul_precision`) and, on a CPU, the allocator (`keep_freed_memory`).

    Args:
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, … Under `torchrun` each process takes its own GPU.
        precision: fp32, which never means TF32; tf32; bf16, by autocast; or auto: bf16 on a GPU that supports it, else
            fp32.
        cuda_graphs: capture steps as CUDA graphs. Default: on a GPU.
        compile: compile steps. Default: on a GPU with Triton.

    Raises:
        ValueError: for an unknown precision.
        RunError: for a device that does not exist, and for CUDA graphs without a CUDA device.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be one of {[*PRECISIONS]}, got {precision!r}')
    name = device
    if device == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if 'LOCAL_RANK' in os.environ and name.startswith('cuda'):
        if name != 'cuda':
            raise RunError(f'device {device} cannot be used with torchrun, which gives each process a GPU of its own')
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        chosen = torch.device(name)
        torch.zeros((), device=chosen).item()  # a device can have a valid name and not exist
    except Exception as error:  # its type depends on the kind of device
        raise RunError(f'device {device} cannot be used here: {one_line(error)}') from None
    on_gpu = chosen.type == 'cuda'
    if chosen.index is not None and on_gpu:
        torch.cuda.set_device(chosen)  # kernels are launched on the current device
    if chosen.type == 'cpu':
        keep_freed_memory()
    if precision == 'auto':
        precision = 'bf16' if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else 'fp32'
    torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
    if cuda_graphs and not on_gpu:
        raise RunError(f'device {chosen} has no CUDA graphs, which are asked for')
    triton = on_gpu and importlib.util.find_spec('triton') is not None
    return Machine(
        device=chosen,
        precision=precision,
        triton=triton,
        cuda_graphs=on_gpu if cuda_graphs is None else cuda_graphs,
        compile=triton if compile is None else compile,
    )


def keep_freed_memory() -> bool:
    """Make this process keep the memory of freed CPU tensors for new ones.

    By default glibc returns large blocks to the operating system, which clears each page before handing it out again.
    Tensors of long sequences are such blocks: at 16,384 tokens this makes a training step of a memory layer take up to
    twice as long. The price is that the process never shrinks.

    Returns:
        False, with nothing changed, if the C library has no such setting (only glibc has).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # parameters from malloc.h: give no block its own mapping, and never give back the end of the heap
    trim_threshold, most_mappings = -1, -4
    return bool(mallopt(most_mappings, 0)) and bool(mallopt(trim_threshold, -1))
