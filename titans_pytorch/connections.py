"""Hyper-connections (arXiv 2409.19606, mHC: 2512.24880) for one token: the package's numbers, in a tenth of its steps.

Gains and scales of a connection are multiplied into one matrix beforehand, so that what is left for a token is a norm,
a product with that matrix, Sinkhorn's iteration and a mixture: on a GPU one kernel, elsewhere its plain twin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from titans_pytorch.shapes import Float
from titans_pytorch.sinkhorn import EPS, sinkhorn_of_few

USE_KERNEL: bool | None = None
"""Whether connections are computed by the Triton kernel. Default: on CUDA devices, where there is Triton."""

ITERATIONS = 20
"""Of Sinkhorn's, as many as `hyper_connections` has."""


class FoldedConnection(NamedTuple):
    """What a connection computes from a normalised stream: logits to read it, to mix it on, and to write to it."""

    to_logits: Float[Tensor, 'l d']
    bias: Float[Tensor, 's l']


class Unwritten(NamedTuple):
    """Streams that a branch's output has still to be written to: the kernel does so as it reads them again."""

    residual: Float[Tensor, 'b s d']
    write: Float[Tensor, 'b s 1']
    branch_out: Float[Tensor, 'b 1 d']


Streams = Float[Tensor, 'b s d'] | Unwritten
AddResidual = Callable[[Tensor], Any]


def written(x: Streams) -> Float[Tensor, 'b s d']:
    if not isinstance(x, Unwritten):
        return x
    return torch.addcmul(x.residual, x.write, x.branch_out.to(x.residual.dtype), value=2.0)


def folded(connection: Any) -> FoldedConnection | None:
    """The connection's weights as they are now; `None` for a plain residual, which has none."""
    if not hasattr(connection, 'static_alpha'):
        return None
    assert connection.num_fracs == connection.num_input_views == len(connection.dynamic_alpha_fn) == 1
    streams, dim = len(connection.static_alpha), connection.norm.gamma.shape[0]

    scales = (connection.pre_branch_scale, connection.residual_scale.expand(streams))
    to_logits = connection.dynamic_alpha_fn[0] * torch.cat(scales)
    bias = connection.static_alpha
    if connection.add_branch_out_to_residual:
        to_write = connection.dynamic_beta_fn.reshape(dim, 1) * connection.h_post_scale
        to_logits = torch.cat((to_logits, to_write), dim=1)
        bias = torch.cat((bias, connection.static_beta.reshape(streams, 1)), dim=1)
    gain = connection.norm.gamma.unsqueeze(1) + 1.0
    return FoldedConnection((to_logits * gain).float().mT.contiguous(), bias.float().contiguous())


def connect(connection: Module, weights: FoldedConnection | None, x: Streams) -> tuple[Tensor, AddResidual]:
    """What the branch reads of the streams, (b, 1, d), and the function that writes its output to them."""
    if weights is None:
        return connection(x)
    kernel = _kernel_for(x, weights)
    if kernel is None:
        branch_in, residual, write = plain_read(written(x), weights)
    else:
        streams, *unwritten = x if isinstance(x, Unwritten) else (x,)
        branch_in, residual, write = kernel.read(streams, unwritten or None, *weights, ITERATIONS, EPS)
    return branch_in, functools.partial(Unwritten, residual, write)


def _kernel_for(x: Streams, weights: FoldedConnection) -> Any:
    """The kernel, if it is to be used and computes with these: in float32, and without a gradient."""
    streams = x.residual if isinstance(x, Unwritten) else x
    if not (streams.is_cuda if USE_KERNEL is None else USE_KERNEL) or torch.is_grad_enabled():
        return None
    kernel = _kernel()
    serves = kernel is not None and streams.shape[1] <= kernel.LARGEST
    return kernel if serves and torch.float64 not in (streams.dtype, weights.bias.dtype) else None


@functools.cache
def _kernel() -> Any:
    """Imported where it is used: without a GPU there need be no Triton."""
    try:
        from titans_pytorch.kernels import connections as kernel
    except ImportError:
        return None
    return kernel


def plain_read(
    x: Float[Tensor, 'b s d'], weights: FoldedConnection
) -> tuple[Float[Tensor, 'b 1 d'], Float[Tensor, 'b s d'], Float[Tensor, 'b s 1']]:
    """What the branch reads of the streams, what stays of them, and the gates by which its output is written."""
    batch, streams, dtype = x.shape[0], x.shape[1], x.dtype
    x = x.float()
    logits = torch.baddbmm(weights.bias, _normed(x), weights.to_logits.mT.expand(batch, -1, -1))
    read, _, write = logits.sigmoid().tensor_split((1, streams + 1), dim=-1)
    mix = sinkhorn_of_few(logits[..., 1 : streams + 1], ITERATIONS)
    mixed = torch.bmm(torch.cat((read, mix), dim=-1).mT, x).to(dtype)
    return mixed[:, :1], mixed[:, 1:], write.to(dtype)


def _normed(x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
    """√d · x / ‖x‖: on a GPU by what is a single kernel, on a CPU by the fewest operations."""
    dim = x.shape[-1]
    if x.is_cuda:
        return F.rms_norm(x, (dim,), eps=1e-24)
    return x * (dim**0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12))
