"""Checks of what users pass in. Each error names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_positive(**sizes: Any) -> None:
    """Every size must be an integer of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f'{name} must be a positive integer, got {size!r}')
        if size < 1:
            raise ValueError(f'{name} must be a positive integer, got {size}')


def check_not_negative(**sizes: Any) -> None:
    """Every size must be an integer of at least 0."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f'{name} must be an integer of at least 0, got {size!r}')
        if size < 0:
            raise ValueError(f'{name} must be an integer of at least 0, got {size}')


def check_multiple(name: str, size: int, of_name: str, of: int) -> None:
    check_positive(**{name: size})
    if size % of:
        raise ValueError(f'{name} must be a multiple of {of_name}={of}, got {size}')


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(value).__name__}')


def check_floating(name: str, value: Any) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f'{name} must be a floating-point tensor, got {value.dtype}')


def check_shape(name: str, value: Tensor, **expected: int | None) -> None:
    """`check_shape('seq', seq, batch=None, length=None, dim=16)`: `None` takes any size of at least 1."""
    fits = value.ndim == len(expected) and all(
        size >= 1 if want is None else size == want for size, want in zip(value.shape, expected.values())
    )
    if not fits:
        wanted = ', '.join(axis if want is None else f'{axis}={want}' for axis, want in expected.items())
        empty = ', none of them empty' if 0 in value.shape else ''
        raise ValueError(f'{name} must be ({wanted}){empty}, got {tuple(value.shape)}')


def check_token_ids(name: str, ids: Any, num_tokens: int | None) -> None:
    """`ids` must be an integer tensor (batch, length), each id in [0, num_tokens) if `num_tokens` is known.

    The range is read on the CPU only: on a GPU reading it would stop the stream, and the embedding kernel's own
    device-side assertion refuses such ids there.
    """
    check_tensor(name, ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f'{name} must hold integer token ids, got {ids.dtype}')
    check_shape(name, ids, batch=None, length=None)

    # a tensor of a trace or of a transform of torch.func has no values to read
    untold = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if num_tokens is None or ids.device.type != 'cpu' or untold:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= num_tokens:
        raise ValueError(f'{name} must hold token ids in [0, num_tokens={num_tokens}), got ids in [{low}, {high}]')


def checked_entries(entries: Any, batch: int) -> Tensor:
    """Numbers of batch entries as a tensor, negative ones counted from the end."""
    chosen = torch.as_tensor(entries, dtype=None if isinstance(entries, Tensor) or len(entries) else torch.long)
    integers = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if chosen.ndim != 1 or not integers or not all(-batch <= entry < batch for entry in chosen.tolist()):
        raise ValueError(f'entries must be integers from {-batch} to {batch - 1}, in one dimension, got {entries}')
    return chosen.long() % batch
