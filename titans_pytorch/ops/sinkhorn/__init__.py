"""Doubly stochastic matrices by Sinkhorn's iteration, as hyper-connections mix their residual streams with (mHC).

Twenty iterations on 4 × 4 matrices are next to no arithmetic, but written out they are over a hundred operations, each
one launched, kept for the gradient and compiled. Here they are one operation, forward and backward, that
`torch.compile` does not look into: a Triton kernel on a GPU, and elsewhere plain PyTorch. Only under the transforms of
`torch.func` and in forward-mode they are written out, as PyTorch knows how to transform those operations alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.ops import _dispatch
from titans_pytorch.utils.checks import check_floating
from titans_pytorch.utils.shapes import Float

# the least a sum is divided by, as in `torch.nn.functional.normalize`
EPS = 1e-12


def sinkhorn(log_alpha: Float[Tensor, '... s s'], iters: int = 20) -> Float[Tensor, '... s s']:
    """exp(`log_alpha`) with its columns and then its rows divided by their sums, `iters` times over.

    After enough iterations all rows and columns sum to 1; the rows do after each, being last. The numbers are those
    of `hyper_connections`: computed in float32, and given back in the precision that came.

    Source: Sinkhorn and Knopp, 1967; for residual streams, Xie et al., arXiv 2512.24880.
    """
    check_floating('log_alpha', log_alpha)
    if log_alpha.ndim < 2 or log_alpha.shape[-1] != log_alpha.shape[-2]:
        raise ValueError(f'log_alpha must hold square matrices (…, s, s), got {tuple(log_alpha.shape)}')
    if iters <= 0:
        return log_alpha
    if _dispatch.is_transformed() or torch.compiler.is_exporting():
        return plain_forward(log_alpha.float(), iters, EPS).to(log_alpha.dtype)
    return _sinkhorn(log_alpha.float(), iters).to(log_alpha.dtype)


def sinkhorn_of_few(log_alpha: Float[Tensor, '... s s'], iters: int = 20) -> Float[Tensor, '... s s']:
    """The same for the few matrices of one token, without a gradient. On a CPU the number of operations then counts:
    in log space an iteration is two, and there are no more of them once nothing changes. Compiled, none counts."""
    if log_alpha.is_cuda:
        return sinkhorn(log_alpha, iters)
    if torch.compiler.is_compiling():
        return plain_forward(log_alpha, iters, EPS)
    for iteration in range(iters):
        before, log_alpha = log_alpha, log_alpha.log_softmax(dim=-2).log_softmax(dim=-1)
        if iteration % 4 == 3 and torch.equal(before, log_alpha):
            break
    return log_alpha.exp()


# what `torch.compile` sees: two operations, known by their shapes


@torch.library.custom_op('titans_pytorch::sinkhorn', mutates_args=(), schema='(Tensor log_alpha, int iters) -> Tensor')
def _sinkhorn(log_alpha: Tensor, iters: int) -> Tensor:
    forward, _ = _implementation(log_alpha)
    return forward(log_alpha, iters, EPS)


@torch.library.custom_op(
    'titans_pytorch::sinkhorn_backward',
    mutates_args=(),
    schema='(Tensor d_out, Tensor log_alpha, int iters) -> Tensor',
)
def _sinkhorn_backward(d_out: Tensor, log_alpha: Tensor, iters: int) -> Tensor:
    _, backward = _implementation(log_alpha)
    return backward(d_out, log_alpha, iters, EPS)


@_sinkhorn.register_fake
def _(log_alpha: Tensor, iters: int) -> Tensor:
    return log_alpha.new_empty(log_alpha.shape)


@_sinkhorn_backward.register_fake
def _(d_out: Tensor, log_alpha: Tensor, iters: int) -> Tensor:
    return log_alpha.new_empty(log_alpha.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.iters = inputs
    ctx.save_for_backward(*tensors)


def _first_gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
    return _sinkhorn_backward(d_out, *ctx.saved_tensors, ctx.iters), None


def _second_gradient(ctx: Any, d_d_log_alpha: Tensor) -> tuple[Tensor | None, ...]:
    """Rarely asked for: by autograd, through the plain backward."""
    backward = functools.partial(plain_backward, iters=ctx.iters, eps=EPS)
    vjp = torch.func.vjp(backward, *ctx.saved_tensors)[1]
    return *vjp(d_d_log_alpha), None


_sinkhorn.register_autograd(_first_gradient, setup_context=_keep_inputs)
_sinkhorn_backward.register_autograd(_second_gradient, setup_context=_keep_inputs)


def _implementation(log_alpha: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Forward and backward for these matrices: the kernel's, or the plain ones, which serve all."""
    kernel = _kernel() if log_alpha.is_cuda and _dispatch.kernels_are_on() else None
    if kernel is not None and log_alpha.shape[-1] <= kernel.LARGEST:
        return kernel.forward, kernel.backward
    return plain_forward, plain_backward


@functools.cache
def _kernel() -> Any:
    """Imported where it is used: without a GPU there need be no Triton."""
    try:
        from titans_pytorch.ops.sinkhorn import triton as kernel
    except ImportError:
        return None
    return kernel


# the plain twin. Matrices stand along the last dimension, so that each step is one long vectorised operation


def plain_forward(log_alpha: Float[Tensor, '... s s'], iters: int, eps: float) -> Float[Tensor, '... s s']:
    for x, _, _ in _half_iterations(log_alpha, iters, eps):  # noqa: B007
        pass
    return _matrices_first(x, log_alpha.shape)


def plain_backward(
    d_out: Float[Tensor, '... s s'], log_alpha: Float[Tensor, '... s s'], iters: int, eps: float
) -> Float[Tensor, '... s s']:
    """Exact, through every iteration; but the maximum that the forward subtracts is a constant.

    With L = ∂loss/∂log x = x · ∂loss/∂x in place of ∂loss/∂x nothing is divided, so that nothing overflows:
    y = x / Σx turns L_y into L_x = L_y − y · ΣL_y, and y = x / eps leaves L as it is.
    """
    halves = [*_half_iterations(log_alpha, iters, eps)]
    d_log = _matrices_last(d_out) * halves[-1][0]
    for y, sums, dim in reversed(halves):
        total = d_log.sum(dim, keepdim=True).masked_fill_(sums < eps, 0.0)
        d_log.addcmul_(y, total, value=-1.0)
    return _matrices_first(d_log, log_alpha.shape)


def _half_iterations(
    log_alpha: Float[Tensor, '... s s'], iters: int, eps: float
) -> Iterator[tuple[Float[Tensor, 's s n'], Tensor, int]]:
    """The matrices each time columns (dimension 0) or rows (1) were divided by their sums, the sums, the dimension."""
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
