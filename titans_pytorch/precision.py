"""What autocast lowers, and what it leaves alone."""

from __future__ import annotations

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
