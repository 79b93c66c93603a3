"""Momentum and weights over chunks in plain PyTorch: all states are one product with a matrix of gate products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops.associative_scan import coefficient_product
from titans_pytorch.ops.gate_products import gate_products
from titans_pytorch.utils.precision import at_least_float32, no_autocast
from titans_pytorch.utils.shapes import Float


def momentum_scan(
    inputs: Float[Tensor, 'bh n m d'],
    deltas: Float[Tensor, 'bh n m e'],
    scales: Float[Tensor, 'bh n'] | None,
    log_gates: Float[Tensor, 'bh n'] | None,
    start: Float[Tensor, 'bh d e'] | None,
    out_dtype: torch.dtype,
) -> tuple[Float[Tensor, 'bh n d e'], Float[Tensor, 'bh d e']]:
    with no_autocast(inputs):
        momenta = at_least_float32(inputs).mT @ at_least_float32(deltas)
        if scales is not None:
            momenta = scales[..., None, None] * momenta
        if log_gates is not None:
            flat_start = None if start is None else start.flatten(1)
            momenta = _states(log_gates, momenta.flatten(2), flat_start).view_as(momenta)
    return momenta.to(out_dtype), momenta[:, -1].clone()  # cloned, it keeps none of the others alive


def vector_scan(
    updates: Float[Tensor, 'bh n f'],
    scales: Float[Tensor, 'bh n'] | None,
    log_gates: Float[Tensor, 'bh n'] | None,
    log_retention: Float[Tensor, 'bh n'],
    momentum_start: Float[Tensor, 'bh f'] | None,
    weight_start: Float[Tensor, 'bh f'],
    out_dtype: torch.dtype,
) -> tuple[Float[Tensor, 'bh n f'], Float[Tensor, 'bh f'], Float[Tensor, 'bh f'] | None]:
    with no_autocast(updates):
        momenta = at_least_float32(updates)
        if scales is not None:
            momenta = scales.unsqueeze(-1) * momenta
        if log_gates is not None:
            momenta = _states(log_gates, momenta, momentum_start)
        weights = _states(log_retention, momenta, weight_start, keep_start=True)
    # copies, which keep none of the earlier states alive
    return weights[:, :-1].to(out_dtype), weights[:, -1].clone(), None if log_gates is None else momenta[:, -1].clone()


def _states(
    log_gates: Float[Tensor, 'bh n'],
    updates: Float[Tensor, 'bh n f'],
    start: Float[Tensor, 'bh f'] | None,
    keep_start: bool = False,
) -> Float[Tensor, 'bh _n f']:
    """h_c = g_c h_{c−1} + u_c after each chunk; with `keep_start`, n + 1 states that begin with `start`."""
    coefficients, of_start = gate_products(log_gates), log_gates.cumsum(dim=-1)
    if keep_start:
        coefficients, of_start = F.pad(coefficients, (0, 0, 1, 0)), F.pad(of_start, (1, 0))
    states = coefficient_product(coefficients, updates)
    if start is None:
        return states
    return torch.addcmul(states, of_start.exp().unsqueeze(-1), start.unsqueeze(1))
