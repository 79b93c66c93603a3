"""Sinkhorn's iteration in plain PyTorch.

This is the only reference with a backward pass that is written out and hidden from the compiler. The iteration is over
a hundred operations on next to no data. For 256 matrices of 4 × 4 on a CPU, autograd of the loop takes 1.3 to 3.4 times
as long as the two operations below, forward and backward (two measurements); `torch.compile` takes 84 seconds for the
loop and 12 seconds for the operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from titans_pytorch.ops import _dispatch
from titans_pytorch.utils.functional import is_exporting
from titans_pytorch.utils.shapes import Float


def sinkhorn(log_alpha: Float[Tensor, '... s s'], iters: int, eps: float) -> Float[Tensor, '... s s']:
    # PyTorch can only transform its own operations
    if _dispatch.is_transformed() or is_exporting():
        return loop(log_alpha, iters, eps)
    return _sinkhorn(log_alpha, iters, eps)


def loop(log_alpha: Float[Tensor, '... s s'], iters: int, eps: float) -> Float[Tensor, '... s s']:
    """The iteration, differentiated by autograd."""
    *_, (x, _, _) = _half_iterations(log_alpha, iters, eps)
    return _matrices_first(x, log_alpha.shape)


def loop_in_log_space(log_alpha: Float[Tensor, '... s s'], iters: int, eps: float) -> Float[Tensor, '... s s']:
    """The iteration for a few matrices and without a gradient, where the number of operations counts: two per
    iteration, and none once nothing changes. It does not bound sums by `eps`."""
    # in compiled code operations cost nothing, and on a GPU the comparison would wait for the device
    if torch.compiler.is_compiling() or log_alpha.is_cuda:
        return loop(log_alpha, iters, eps)
    for iteration in range(iters):
        before, log_alpha = log_alpha, log_alpha.log_softmax(dim=-2).log_softmax(dim=-1)
        if iteration % 4 == 3 and torch.equal(before, log_alpha):
            break
    return log_alpha.exp()


@custom_op('titans_pytorch::sinkhorn_loop', mutates_args=())
def _sinkhorn(log_alpha: Tensor, iters: int, eps: float) -> Tensor:
    return loop(log_alpha, iters, eps)


@custom_op('titans_pytorch::sinkhorn_loop_backward', mutates_args=())
def _sinkhorn_backward(d_out: Tensor, log_alpha: Tensor, iters: int, eps: float) -> Tensor:
    return _gradient(d_out, log_alpha, iters, eps)


def _gradient(
    d_out: Float[Tensor, '... s s'], log_alpha: Float[Tensor, '... s s'], iters: int, eps: float
) -> Float[Tensor, '... s s']:
    """The gradient through every iteration; the maximum that the forward pass subtracts counts as a constant.

    Working with L = ∂loss/∂log x = x · ∂loss/∂x instead of ∂loss/∂x avoids divisions, so nothing overflows: y = x / Σx
    turns L_y into L_x = L_y − y · ΣL_y, and y = x / eps leaves L as it is.
    """
    halves = [*_half_iterations(log_alpha, iters, eps)]
    d_log = _matrices_last(d_out) * halves[-1][0]
    for y, sums, dim in reversed(halves):
        total = d_log.sum(dim, keepdim=True).masked_fill_(sums < eps, 0.0)
        d_log.addcmul_(y, total, value=-1.0)
    return _matrices_first(d_log, log_alpha.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.iters, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _first_derivative(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
    return _sinkhorn_backward(d_out, *ctx.saved_tensors, ctx.iters, ctx.eps), None, None


def _second_derivative(ctx: Any, d_d_log_alpha: Tensor) -> tuple[Tensor | None, ...]:
    gradient = functools.partial(_gradient, iters=ctx.iters, eps=ctx.eps)
    vjp = torch.func.vjp(gradient, *ctx.saved_tensors)[1]
    return *vjp(d_d_log_alpha), None, None


_sinkhorn.register_fake(lambda log_alpha, iters, eps: log_alpha.new_empty(log_alpha.shape))
_sinkhorn_backward.register_fake(lambda d_out, log_alpha, iters, eps: log_alpha.new_empty(log_alpha.shape))
_sinkhorn.register_autograd(_first_derivative, setup_context=_setup_context)
_sinkhorn_backward.register_autograd(_second_derivative, setup_context=_setup_context)


def _half_iterations(
    log_alpha: Float[Tensor, '... s s'], iters: int, eps: float
) -> Iterator[tuple[Float[Tensor, 's s n'], Tensor, int]]:
    """The matrices after each division of columns (dimension 0) or rows (1) by their sums, the sums, the dimension.

    Matrices are laid out along the last dimension, so that each step is one long vectorised operation.
    """
    x = _matrices_last(log_alpha)
    x = (x - x.amax(dim=0).detach()).exp_()
    for _ in range(iters):
        for dim in (0, 1):
            sums = x.sum(dim, keepdim=True)
            x = x / sums.clamp(min=eps)
            yield x, sums, dim


def _matrices_last(x: Float[Tensor, '... s s']) -> Float[Tensor, 's s n']:
    return x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0).contiguous()


def _matrices_first(x: Float[Tensor, 's s n'], shape: torch.Size) -> Float[Tensor, '... s s']:
    return x.permute(2, 0, 1).reshape(shape).contiguous()
