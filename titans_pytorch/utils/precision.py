"""Precision rules: operations that autocast lowers, and those that stay in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def operand_dtype(like: Tensor) -> torch.dtype:
    """The dtype of matrix products: the dtype of `like`, or the one to which autocast lowers it."""
    return _lowered(like.dtype, like.device)


def for_products(t: Tensor) -> Tensor:
    """`t` in the dtype of matrix products, cast once for several products, where autocast would cast it for each."""
    return t.to(operand_dtype(t))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast lowers matrix products on a device; `None` without autocast."""
    # PyTorch refuses to answer for the meta device
    if device.type == 'meta' or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _lowered(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    lowered = None if dtype == torch.float64 else autocast_dtype(device)
    return dtype if lowered is None else lowered


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast, for gates and states."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def at_least_float32(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32)


HALF = (torch.float16, torch.bfloat16)


def network_autocast(module: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Autocast context for a network with float32 weights that is part of a module of dtype `module`.

    With bfloat16, in the module or by autocast, products are in bfloat16. With float16 they are in float32, because
    second derivatives of a norm, up to 1e5 for a small input, exceed the range of float16.
    """
    dtype = _lowered(module, device)
    if dtype not in HALF or device.type == 'meta':
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def network_rows(rows: Tensor, module: torch.dtype) -> Tensor:
    """Inputs of such a network: at least float32 in a module in half precision, or under autocast to float16.

    Call this outside `network_autocast`, which hides the surrounding autocast.
    """
    if module in HALF or _lowered(module, rows.device) == torch.float16:
        return at_least_float32(rows)
    return rows


def in_module_precision(t: Tensor, module: torch.dtype) -> Tensor:
    """Outputs of such a network, cast back for a module in half precision."""
    return t.to(module) if module in HALF else t
