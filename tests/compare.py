"""Comparison of numbers, for every test of equality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from titans_pytorch import without_kernels


def leaves(value: Any, name: str = '', of: type = Tensor) -> dict[str, Any]:
    """Every tensor, or instance of another type, inside tuples, lists and mappings, by path."""
    if isinstance(value, of):
        return {name: value}
    if isinstance(value, Mapping) or hasattr(value, 'items'):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        fields = getattr(value, '_fields', range(len(value)))
        items = [(str(field), item) for field, item in zip(fields, value)]
    else:
        return {}
    return {path: t for key, item in items for path, t in leaves(item, f'{name}.{key}', of).items()}


def assert_same(came: Any, expected: Any, tolerance: float = 1e-9, label: str = '') -> None:
    """Equal integers, and tensors of equal shapes and values: |a − b| ≤ tolerance · max(1, max |b|)."""
    assert leaves(came, of=int) == leaves(expected, of=int), label
    came, expected = leaves(came), leaves(expected)
    assert came.keys() == expected.keys(), f'{label}: {sorted(came)} and {sorted(expected)}'
    for path, want in expected.items():
        have = came[path]
        assert have.shape == want.shape, f'{label}{path}: {tuple(have.shape)} and {tuple(want.shape)}'
        if want.numel() == 0:
            continue
        assert torch.isfinite(have.double()).all(), f'{label}{path}: not finite'
        error = (have.double() - want.double()).abs().max().item()
        bound = tolerance * max(1.0, want.double().abs().max().item())
        assert error <= bound, f'{label}{path}: differs by {error:.2e}, at most {bound:.2e} is allowed'


def assert_no_worse(compute: Callable[[], Any], exact: Any, floor: float = 0.0) -> None:
    """Kernels err at most twice as much as the reference in the same precision: ‖a − exact‖ of each tensor.

    Args:
        compute: computes everything anew, by kernels where they are on.
        exact: the same in float64.
        floor: the relative error made by the order of sums in float32.
    """
    by_kernels = leaves(compute())
    with without_kernels():
        by_reference = leaves(compute())
    exact = leaves(exact)
    assert by_kernels.keys() == by_reference.keys() == exact.keys()
    for path, want in exact.items():
        ours, theirs = by_kernels[path], by_reference[path]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == want.shape, path
        error, budget = ((t.double() - want).norm() for t in (ours, theirs))
        size = want.norm()
        assert error <= max(2 * budget, floor * size), f'{path}: {error:.2e} of {size:.2e}, reference {budget:.2e}'


def learned(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`function(x)`, and the gradient of a linear function of it with respect to `x`."""
    x = x.detach().requires_grad_()
    out = function(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return out, torch.autograd.grad((out * weights).sum(), x)


def randomised(module: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """The module with all that trains moved away from its initial value, so that no part is trivial."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return module


def gradients(module: torch.nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    """Of `scalar`, with respect to every parameter that has one."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    came = torch.autograd.grad(scalar, [*named.values()], allow_unused=True)
    return {name: g for name, g in zip(named, came) if g is not None}


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Casts to float32 are to float64."""
    with patch.object(Tensor, 'float', Tensor.double):
        yield
