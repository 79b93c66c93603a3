"""What is computed in which precision: what autocast lowers, and what stays in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def operand_dtype(like: Tensor) -> torch.dtype:
    """What products are computed in: the precision of `like`, or what autocast lowers it to."""
    if like.dtype != torch.float64 and torch.is_autocast_enabled(like.device.type):
        return torch.get_autocast_dtype(like.device.type)
    return like.dtype


def no_autocast(like: Tensor) -> torch.autocast:
    """Gates and states keep their precision under autocast."""
    return torch.autocast(like.device.type, enabled=False)


def at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


HALF = (torch.float16, torch.bfloat16)


def network_autocast(like: Tensor) -> AbstractContextManager[object]:
    """The precision of a memory network's products, where the module has that of `like` and weights are in float32.

    bfloat16, of the module or of autocast: products are in it. float16: they are in float32, as second derivatives of
    a norm, with up to 1e5 for a small input, are out of its range.
    """
    device = like.device.type
    dtype = operand_dtype(like)
    if dtype not in HALF:
        return nullcontext()
    return torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)


def network_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Inputs of a memory network: in float32 unless autocast lowers a module in float32, and then not to float16."""
    if like.dtype in HALF or operand_dtype(like) == torch.float16:
        return at_least_float32(rows)
    return rows


def in_module_precision(t: Tensor, like: Tensor) -> Tensor:
    """What a memory network gives, for a module in half precision to go on with."""
    return t.to(like.dtype) if like.dtype in HALF else t
