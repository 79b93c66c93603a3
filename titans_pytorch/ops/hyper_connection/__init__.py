"""Hyper-connections (arXiv 2409.19606, mHC: 2512.24880): the package's numbers, in a tenth of its steps.

For one token gains and scales of a connection are multiplied into one matrix beforehand, so that what is left is a
norm, a product with that matrix, Sinkhorn's iteration and a mixture: on a GPU one kernel, elsewhere its plain twin.

For a sequence a connection is one operation, forward and backward, that `torch.compile` does not look into. For the
streams x_s of a position, with r_s = √D / ‖x_s‖, gain 1 + γ, weights A and B, scales α and β, and biases:

    logits_s = α · r_s x_s ∘ (1 + γ) A + bias_s    read_s = σ(logits_s0)    mix = sinkhorn(logits_s,1…S)
    write_s = σ(β · r_s x_s ∘ (1 + γ) B + bias_s)
    branch's input = Σ_s read_s x_s    new x_t = Σ_s mix_st x_s + 2 write_t · branch's output
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hyper_connections.manifold_constrained_hyper_connections import (
    ManifoldConstrainedHyperConnections,
    Residual,
    RMSNorm,
    StreamEmbed,
    add,
    get_expand_reduce_stream_functions,
)
from torch import Tensor, nn
from torch.nn import Identity, Module, Parameter

from titans_pytorch.ops import _dispatch
from titans_pytorch.ops.sinkhorn import EPS, sinkhorn
from titans_pytorch.ops.sinkhorn.reference import _gradient as plain_backward
from titans_pytorch.ops.sinkhorn.reference import loop as plain_forward
from titans_pytorch.ops.sinkhorn.reference import loop_in_log_space
from titans_pytorch.utils.parameters import InReferenceFormat, Resettable, fill
from titans_pytorch.utils.shapes import Float

USE_KERNEL: bool | None = None
"""Whether connections are computed by the Triton kernel. Default: on CUDA devices, where there is Triton; see also
`_dispatch.without_kernels`."""

ITERATIONS = 20
"""Of Sinkhorn's, as many as `hyper_connections` has."""

MOST_STREAMS = 8
"""Of a sequence, that its kernels serve."""


class StreamNorm(RMSNorm):
    """The norm of a hyper-connection."""

    gamma: Tensor

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)


class HyperConnection(Resettable, InReferenceFormat, ManifoldConstrainedHyperConnections):
    """The connection of a branch to `streams` residual streams of width `dim`, without a scalar parameter.

    Which stream the branch reads at first is drawn from Python's `random`.
    """

    static_alpha: Tensor
    dynamic_alpha_fn: Tensor
    pre_branch_scale: Tensor
    residual_scale: Tensor
    static_beta: Tensor
    dynamic_beta_fn: Tensor
    num_residual_streams: int

    scalars = ('h_post_scale',)

    def __init__(self, streams: int, dim: int, add_branch_out_to_residual: bool = True):
        before = random.getstate()
        super().__init__(
            streams,
            dim=dim,
            add_branch_out_to_residual=add_branch_out_to_residual,
            residual_mix_constraint_fn=sinkhorn,
        )
        random.setstate(before)  # the stream is drawn once, below
        self.norm = StreamNorm(dim)
        if add_branch_out_to_residual:
            self.h_post_scale = Parameter(torch.empty(1))
        self._reset_own()

    def _reset_own(self) -> None:
        streams = self.num_residual_streams
        mix = torch.eye(streams, device=self.static_alpha.device)
        read = mix[:, [random.randrange(streams)]]
        fill(self.static_alpha, torch.cat((read, mix), dim=1))
        nn.init.zeros_(self.dynamic_alpha_fn)
        scales = [self.pre_branch_scale, self.residual_scale]
        if self.add_branch_out_to_residual:
            nn.init.ones_(self.static_beta)
            nn.init.zeros_(self.dynamic_beta_fn)
            scales.append(self.h_post_scale)
        for scale in scales:
            nn.init.constant_(scale, 1e-2)


class ExpandStreams(Resettable, StreamEmbed):
    """A sequence as `streams` streams, each with a learned vector added: (b, n, d) to (b · s, n, d)."""

    stream_embed: Tensor

    def __init__(self, streams: int, dim: int):
        super().__init__(streams, dim, expand_to_streams=True)

    def _reset_own(self) -> None:
        nn.init.zeros_(self.stream_embed)


def residual_streams(streams: int, dim: int) -> tuple[Callable[..., Module], Module, Module]:
    """A function that makes connections of branches; and modules from one stream to several, and back to one.

    With a single stream connections are plain residuals, and the modules do nothing.
    """
    expand, reduce = get_expand_reduce_stream_functions(streams, disable=streams == 1)
    if streams == 1:
        return Residual, expand, reduce
    return functools.partial(HyperConnection, streams, dim), ExpandStreams(streams, dim), reduce


class FoldedConnection(NamedTuple):
    """What a connection computes from a normalised stream: logits to read it, to mix it on, and to write to it."""

    to_logits: Float[Tensor, 'l d']
    bias: Float[Tensor, 's l']


class Unwritten(NamedTuple):
    """Streams that a branch's output has still to be written to: the kernel does so as it reads them again.

    For one token (b, s, d), (b, s, 1) and (b, 1, d); for a sequence (b · s, n, d), (b · s, n, 1) and (b, n, d).
    """

    residual: Float[Tensor, 'b s d']
    write: Float[Tensor, 'b s 1']
    branch_out: Float[Tensor, 'b 1 d']


Streams = Float[Tensor, 'b s d'] | Unwritten
AddResidual = Callable[[Tensor], Any]


def written(x: Streams) -> Float[Tensor, 'b s d']:
    """The streams with everything written to them: of one token (b, s, d), or of a sequence (b · s, n, d)."""
    if not isinstance(x, Unwritten):
        return x
    residual, write, branch_out = x
    branch_out = branch_out.to(residual.dtype)
    if len(residual) == len(branch_out):
        return torch.addcmul(residual, write, branch_out, value=2.0)
    apart = (len(branch_out), -1)
    write = write.to(residual.dtype).unflatten(0, apart)
    return torch.addcmul(residual.unflatten(0, apart), write, branch_out.unsqueeze(1), value=2.0).flatten(0, 1)


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
    if torch.is_grad_enabled() or not _asked(streams):
        return None
    kernel = _kernel()
    serves = kernel is not None and streams.shape[1] <= kernel.LARGEST
    return kernel if serves and torch.float64 not in (streams.dtype, weights.bias.dtype) else None


def _asked(streams: Tensor) -> bool:
    on_device = streams.is_cuda and _dispatch.HAS_TRITON if USE_KERNEL is None else USE_KERNEL
    return on_device and _dispatch.kernels_are_on()


@functools.cache
def _kernel() -> Any:
    """Imported where it is used: without a GPU there need be no Triton."""
    try:
        from titans_pytorch.ops.hyper_connection import triton_token as kernel
    except ImportError:
        return None
    return kernel


def plain_read(
    x: Float[Tensor, 'b s d'], weights: FoldedConnection
) -> tuple[Float[Tensor, 'b 1 d'], Float[Tensor, 'b s d'], Float[Tensor, 'b s 1']]:
    """What the branch reads of the streams, what stays of them, and the gates by which its output is written."""
    streams, dtype = x.shape[1], x.dtype
    x = x.to(weights.bias.dtype)
    # normalising comes last: it is a factor on the logits
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=EPS)
    logits = torch.addcdiv(weights.bias, F.linear(x, weights.to_logits), norm, value=x.shape[-1] ** 0.5)
    read, _, write = logits.sigmoid().tensor_split((1, streams + 1), dim=-1)
    mix = loop_in_log_space(logits[..., 1 : streams + 1], ITERATIONS, EPS)
    mixed = torch.bmm(torch.cat((read, mix), dim=-1).mT, x).to(dtype)
    return mixed[:, :1], mixed[:, 1:], write.to(dtype)


# a sequence


def connected(connection: Module, x: Float[Tensor, 'bs n d'] | Unwritten) -> tuple[Float[Tensor, 'b n d'], AddResidual]:
    """`connection(x)` of a sequence's streams (b · s, n, d): what the branch reads, and what adds its output to them.

    Where the kernels serve, adding is left to the next connection: it gives `Unwritten`, which this function takes.
    """
    if not _kernels_serve(connection, x):
        return connection(written(x))
    branch_in, mixed, write, _ = _connect([*x] if isinstance(x, Unwritten) else [x], _weights(connection))
    if not connection.add_branch_out_to_residual:
        return branch_in, _unchanged
    return branch_in, functools.partial(Unwritten, mixed, write)


def _unchanged(branch_out: Tensor) -> Tensor:
    return branch_out


def _weights(connection: Any) -> list[Tensor]:
    """Parameters, in the order of the operations; the last three are there if the branch's output is added."""
    c = connection
    weights = [c.norm.gamma, c.static_alpha, c.dynamic_alpha_fn, c.pre_branch_scale, c.residual_scale]
    return weights + [c.static_beta, c.dynamic_beta_fn, c.h_post_scale] if c.add_branch_out_to_residual else weights


def _kernels_serve(connection: Any, x: Streams) -> bool:
    """Whether the connection is one that the kernels know, in its plain settings, and the streams are for them."""
    # other subclasses may do otherwise
    if type(connection) not in (ManifoldConstrainedHyperConnections, HyperConnection):
        return False
    streams = x.residual if isinstance(x, Unwritten) else x
    plain = connection.num_fracs == connection.num_input_views == connection.num_dynamic_alpha_proposals == 1
    return (
        plain
        and not (connection._forward_hooks or connection._forward_pre_hooks)
        and connection.branch is None
        and not connection.channel_first
        and connection.dropout.p == 0
        and isinstance(connection.residual_transform, Identity)
        and connection.depth_residual_fn is add
        and connection.residual_mix_constraint_fn is sinkhorn
        and streams.ndim == 3
        and _kernels_take([streams], _weights(connection))
    )


def _kernels_take(x: list[Tensor], weights: list[Tensor]) -> bool:
    return _asked(x[0]) and len(weights[1]) <= MOST_STREAMS and all(t.dtype != torch.float64 for t in (*x, *weights))


# what `torch.compile` sees: operations known by their shapes

Connected = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    'titans_pytorch::connect',
    mutates_args=(),
    schema='(Tensor[] x, Tensor[] weights) -> (Tensor, Tensor, Tensor, Tensor)',
)
def _connect(x: list[Tensor], weights: list[Tensor]) -> Connected:
    if not _kernels_take(x, weights):
        return plain_connect(x, weights)
    from titans_pytorch.ops.hyper_connection import triton as kernel

    return kernel.forward(x, weights, ITERATIONS, EPS)


@torch.library.custom_op(
    'titans_pytorch::connect_backward',
    mutates_args=(),
    schema='(Tensor d_branch_in, Tensor d_mixed, Tensor d_write, Tensor saved, Tensor[] x, Tensor[] weights) '
    '-> (Tensor[], Tensor[])',
)
def _connect_backward(
    d_branch_in: Tensor, d_mixed: Tensor, d_write: Tensor, saved: Tensor, x: list[Tensor], weights: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    if not _kernels_take(x, weights):
        return plain_connect_backward(d_branch_in, d_mixed, d_write, saved, x, weights)
    from titans_pytorch.ops.hyper_connection import triton as kernel

    return kernel.backward(d_branch_in, d_mixed, d_write, saved, x, weights, ITERATIONS, EPS)


@_connect.register_fake
def _(x: list[Tensor], weights: list[Tensor]) -> Connected:
    (rows, tokens, dim), streams, adds = x[0].shape, len(weights[1]), len(weights) == 8
    full = torch.promote_types(x[0].dtype, torch.float32)
    return (
        x[0].new_empty(rows // streams, tokens, dim),
        x[0].new_empty((rows, tokens, dim) if adds else (0,)),
        x[0].new_empty((rows, tokens, 1) if adds else (0,), dtype=full),
        x[0].new_empty((rows // streams, tokens, streams, 2 * streams + 3 if adds else 2), dtype=full),
    )


@_connect_backward.register_fake
def _(
    d_branch_in: Tensor, d_mixed: Tensor, d_write: Tensor, saved: Tensor, x: list[Tensor], weights: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    return [t.new_empty(t.shape) for t in x], [t.new_empty(t.shape) for t in weights]


def _keep(ctx: Any, inputs: tuple[list[Tensor], list[Tensor]], output: Connected) -> None:
    x, weights = inputs
    ctx.number = len(x)
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(output[3], *x, *weights)


def _gradients(
    ctx: Any, d_branch_in: Tensor, d_mixed: Tensor, d_write: Tensor, _: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    saved, *tensors = ctx.saved_tensors
    return _connect_backward(d_branch_in, d_mixed, d_write, saved, tensors[: ctx.number], tensors[ctx.number :])


_connect.register_autograd(_gradients, setup_context=_keep)
_dispatch.differentiated_once(_connect_backward)


# the plain twins


def plain_connect(x: list[Tensor], weights: list[Tensor]) -> Connected:
    """What the branch reads, what stays of the streams, the gates to write by, and a table for the backward.

    Args:
        x: the streams (b · s, n, d), or the parts of `Unwritten`.
        weights: parameters of the connection, as `_weights` lists them; without the last three only the first result
            is computed.

    Returns:
        (b, n, d), (b · s, n, d) and (b · s, n, 1); the table (b, n, s, …) has for each stream its products with the
        weights, the factor √d / ‖x_s‖, and its row of the mix.
    """
    streams, adds = len(weights[1]), len(weights) == 8
    now, norm = _streams_of(x, streams)
    to_logits, _, _, scale, bias = _folded_apart(weights, now.dtype)
    to_unit = now.shape[-1] ** 0.5 / norm.clamp(min=EPS)
    products = now @ to_logits * to_unit
    logits = products * scale + bias
    branch_in = (logits[..., :1].sigmoid() * now).sum(dim=2).to(x[0].dtype)
    if not adds:
        return branch_in, x[0].new_empty(0), now.new_empty(0), torch.cat((products, to_unit), dim=-1)
    mix = plain_forward(logits[..., 1:-1], ITERATIONS, EPS)
    write = _together(logits[..., -1:].sigmoid())
    return branch_in, _together(mix.mT @ now).to(x[0].dtype), write, torch.cat((products, to_unit, mix), dim=-1)


def plain_connect_backward(
    d_branch_in: Float[Tensor, 'b n d'],
    d_mixed: Tensor,
    d_write: Tensor,
    saved: Float[Tensor, 'b n s r'],
    x: list[Tensor],
    weights: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of `x` and of `weights`; d_y is that of y."""
    streams, adds = len(weights[1]), len(weights) == 8
    now, norm = _streams_of(x, streams)
    to_logits, gain, fn, scale, bias = _folded_apart(weights, now.dtype)
    products, to_unit, mix = saved.tensor_split((to_logits.shape[-1], to_logits.shape[-1] + 1), dim=-1)
    logits = products * scale + bias

    # branch_in = Σ_s read_s x_s, with read = σ(logit)
    d_branch_in = d_branch_in.to(now.dtype).unsqueeze(2)
    read = logits[..., :1].sigmoid()
    d_logits = (now * d_branch_in).sum(dim=-1, keepdim=True) * read * (1 - read)
    d_now = read * d_branch_in
    if adds:
        # mixed_t = Σ_s mix_st x_s
        d_mixed = _apart(d_mixed.to(now.dtype), streams)
        d_mix = plain_backward(now @ d_mixed.mT, logits[..., 1:-1], ITERATIONS, EPS)
        d_now = d_now + mix @ d_mixed
        write = logits[..., -1:].sigmoid()
        d_logits = torch.cat((d_logits, d_mix, _apart(d_write, streams) * write * (1 - write)), dim=-1)

    # logits = α p + bias, p = r x · W with r = √D / ‖x‖, and ∂r/∂x = −r x / ‖x‖²: none where ‖x‖ is taken for `EPS`
    d_products = d_logits * scale
    along = (d_products * products).sum(dim=-1, keepdim=True) * to_unit.square() / now.shape[-1]
    d_now = d_now + (d_products * to_unit) @ to_logits.mT - now * along.masked_fill(norm < EPS, 0.0)
    d_to_logits = torch.einsum('bnsd,bnsl->dl', now * to_unit, d_products)

    d_fn, d_bias = d_to_logits * gain, d_logits.sum(dim=(0, 1))
    d_scale = (d_logits * products).sum(dim=(0, 1, 2))
    d_weights = [(d_to_logits * fn).sum(dim=1)]
    if adds:
        d_weights += [d_bias[:, :-1], d_fn[:, :-1], d_scale[:1], d_scale[1:-1].sum(), d_bias[:, -1], d_fn[:, -1]]
        d_weights += [d_scale[-1]]
    else:
        d_weights += [F.pad(d_bias, (0, streams)), F.pad(d_fn, (0, streams)), d_scale, d_scale.new_zeros(1)]
    d_weights = [d.reshape(t.shape).to(t.dtype, copy=True) for d, t in zip(d_weights, weights)]

    d_x = [_together(d_now)]
    if len(x) > 1:
        _, write, branch_out = x
        d_x += [_together(2 * (d_now * branch_out.unsqueeze(2)).sum(dim=-1, keepdim=True))]
        d_x += [2 * (d_now * _apart(write, streams)).sum(dim=2)]
    return [d.to(t.dtype) for d, t in zip(d_x, x)], d_weights


def _streams_of(x: list[Tensor], streams: int) -> tuple[Float[Tensor, 'b n s d'], Float[Tensor, 'b n s 1']]:
    """The streams of each position, everything written to them, in float32 at least; and their norms."""
    full = torch.promote_types(x[0].dtype, torch.float32)
    now = _apart(x[0].to(full), streams)
    if len(x) > 1:
        now = now + 2 * _apart(x[1].to(full), streams) * x[2].to(full).unsqueeze(2)
    return now, torch.linalg.vector_norm(now, dim=-1, keepdim=True)


def _folded_apart(weights: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights with the norm's gain (d, l); gain (d, 1) and weights; scales (l) and biases (s, l) of the logits."""
    gamma, static_alpha, alpha_fn, read_scale, mix_scale, *of_write = (t.to(dtype) for t in weights)
    streams, fn, bias = len(static_alpha), alpha_fn[0], static_alpha
    scale = torch.cat((read_scale, mix_scale.expand(streams)))
    if of_write:
        static_beta, beta_fn, write_scale = of_write
        fn, bias = torch.cat((fn, beta_fn.unsqueeze(1)), dim=1), torch.cat((bias, static_beta.unsqueeze(1)), dim=1)
        scale = torch.cat((scale, write_scale.reshape(1)))
    else:
        fn, bias, scale = fn[:, :1], bias[:, :1], read_scale
    gain = gamma.unsqueeze(1) + 1
    return gain * fn, gain, fn, scale, bias


def _apart(x: Float[Tensor, 'bs n d'], streams: int) -> Float[Tensor, 'b n s d']:
    return x.unflatten(0, (len(x) // streams, streams)).transpose(1, 2)


def _together(x: Float[Tensor, 'b n s d']) -> Float[Tensor, 'bs n d']:
    return x.transpose(1, 2).flatten(0, 1).contiguous()
