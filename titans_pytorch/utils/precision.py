"""What is computed in which precision: what autocast lowers, and what stays in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def operand_dtype(like: Tensor) -> torch.dtype:
    """What products are computed in: the precision of `like`, or what autocast lowers it to."""
    return _lowered(like.dtype, like.device)


def _lowered(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def no_autocast(like: Tensor) -> torch.autocast:
    """Gates and states keep their precision under autocast."""
    return torch.autocast(like.device.type, enabled=False)


def at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


HALF = (torch.float16, torch.bfloat16)


def network_autocast(module: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """The precision of a memory network's products on a device, in a module of a precision; weights are in float32.

    bfloat16, of the module or of autocast: products are in it. float16: they are in float32, as second derivatives of
    a norm, with up to 1e5 for a small input, are out of its range.
    """
    dtype = _lowered(module, device)
    if dtype not in HALF:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def network_rows(rows: Tensor, module: torch.dtype) -> Tensor:
    """Inputs of a memory network: in float32 unless autocast lowers a module in float32, and then not to float16."""
    if module in HALF or _lowered(module, rows.device) == torch.float16:
        return at_least_float32(rows)
    return rows


def in_module_precision(t: Tensor, module: torch.dtype) -> Tensor:
    """What a memory network gives, for a module in half precision to go on with."""
    return t.to(module) if module in HALF else t
