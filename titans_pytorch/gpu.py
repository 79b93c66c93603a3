"""Where the Triton kernels of this package run."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec('triton') is not None


@torch.compiler.assume_constant_result
def kernels_run_on(device: torch.device) -> bool:
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
