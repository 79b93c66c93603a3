"""Residual streams of a model: hyper-connections of its branches, for sequences and for single tokens.

The modules have the parameters and state-dict keys of those in the `hyper_connections` package. Each computes in a
single operation: `hyper_connection` for sequences, `token_hyper_connection` for single tokens.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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

from titans_pytorch.ops.hyper_connection import hyper_connection
from titans_pytorch.ops.sinkhorn import sinkhorn
from titans_pytorch.ops.token_hyper_connection import token_hyper_connection
from titans_pytorch.utils.parameters import InReferenceFormat, Resettable, fill
from titans_pytorch.utils.plain import is_plain
from titans_pytorch.utils.precision import at_least_float32, no_autocast
from titans_pytorch.utils.shapes import Float


class StreamNorm(RMSNorm):
    """Norm of a hyper-connection."""

    gamma: Tensor

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)


class HyperConnection(Resettable, InReferenceFormat, ManifoldConstrainedHyperConnections):
    """Connection of a branch to `streams` residual streams of width `dim`; none of its parameters is a scalar.

    Python's `random` draws the stream that the branch reads at first.
    """

    static_alpha: Tensor
    dynamic_alpha_fn: Tensor
    pre_branch_scale: Tensor
    residual_scale: Tensor
    static_beta: Tensor
    dynamic_beta_fn: Tensor
    num_residual_streams: int
    residual_transform: Module
    dropout: Module
    residual_mix_constraint_fn: Callable[[Tensor], Tensor]
    depth_residual_fn: Callable[[Tensor, Tensor], Tensor]

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

    # The package calls these two methods, for cases that the operation does not cover. Its own versions compute in
    # float32, even for float64.

    def width_connection(
        self, residuals: Float[Tensor, 'bs n d']
    ) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, 'bs n d'], dict[str, Float[Tensor, 'b n s 1']]]:
        """The branch's input, the mixed streams, and the gates for writing the branch's output to them."""
        streams = self.num_residual_streams
        x = self.residual_transform(residuals).unflatten(0, (-1, streams)).movedim(1, -2)
        normed = at_least_float32(self.norm(x))
        to_logits, bias = _to_logits(self)
        with no_autocast(x):
            read, mix, write = (normed @ to_logits + bias).tensor_split((1, 1 + streams), dim=-1)
            read_and_mix = torch.cat((read.sigmoid(), self.residual_mix_constraint_fn(mix)), dim=-1)
            mixed = (read_and_mix.mT @ at_least_float32(x)).to(x.dtype)
        return mixed[..., 0, :], mixed[..., 1:, :].movedim(-2, 1).flatten(0, 1), {'beta': 2 * write.sigmoid()}

    def depth_connection(
        self, branch_output: Float[Tensor, 'b n d'], residuals: Float[Tensor, 'bs n d'], *, beta: Tensor
    ) -> Float[Tensor, 'bs n d']:
        """The mixed streams with the branch's output added."""
        added = (beta * branch_output.unsqueeze(-2)).movedim(-2, 1).flatten(0, 1).to(residuals.dtype)
        return self.dropout(self.depth_residual_fn(added, residuals))


class ExpandStreams(Resettable, StreamEmbed):
    """Copies of a sequence as `streams` streams, each with a learned vector added: (b, n, d) to (b · s, n, d)."""

    stream_embed: Tensor

    def __init__(self, streams: int, dim: int):
        super().__init__(streams, dim, expand_to_streams=True)

    def forward(self, residuals: Float[Tensor, 'b n d']) -> Float[Tensor, 'bs n d']:
        # without einops, which the compiler would have to trace through
        return (residuals.unsqueeze(1) + self.stream_embed.unsqueeze(1)).flatten(0, 1)

    def _reset_own(self) -> None:
        nn.init.zeros_(self.stream_embed)


def residual_streams(streams: int, dim: int) -> tuple[Callable[..., Module], Module, Module]:
    """A function that makes connections of branches; a module that expands one stream to several; and its inverse.

    With a single stream connections are plain residuals, and the modules do nothing.
    """
    expand, reduce = get_expand_reduce_stream_functions(streams, disable=streams == 1)
    if streams == 1:
        return Residual, expand, reduce
    return functools.partial(HyperConnection, streams, dim), ExpandStreams(streams, dim), reduce


class FoldedConnection(NamedTuple):
    """Weights of a connection for one token, from a normalised stream to the logits by which to read, mix and write."""

    to_logits: Float[Tensor, 'l d']
    bias: Float[Tensor, 's l']


class Pending(NamedTuple):
    """Streams that still lack a branch's output; the next connection adds it as it reads them.

    Shapes for one token: (b, s, d), (b, s, 1) and (b, 1, d); for a sequence: (b · s, n, d), (b · s, n, 1) and (b, n,
    d).
    """

    residual: Float[Tensor, 'b s d']
    write: Float[Tensor, 'b s 1']
    branch_out: Float[Tensor, 'b 1 d']


Streams = Float[Tensor, 'b s d'] | Pending
AddResidual = Callable[[Tensor], Any]


def complete(x: Streams) -> Float[Tensor, 'b s d']:
    """The streams with pending output added: of one token (b, s, d), or of a sequence (b · s, n, d)."""
    if not isinstance(x, Pending):
        return x
    residual, write, branch_out = x
    branch_out = branch_out.to(residual.dtype)
    if len(residual) == len(branch_out):
        return torch.addcmul(residual, write, branch_out, value=2.0)
    by_entry = (len(branch_out), -1)
    write = write.to(residual.dtype).unflatten(0, by_entry)
    return torch.addcmul(residual.unflatten(0, by_entry), write, branch_out.unsqueeze(1), value=2.0).flatten(0, 1)


# a sequence


def connect(connection: Module, x: Float[Tensor, 'bs n d'] | Pending) -> tuple[Float[Tensor, 'b n d'], AddResidual]:
    """`connection(x)` of a sequence's streams (b · s, n, d): the branch's input, and the function that adds its output.

    Adding is left to the next connection: the function returns `Pending`, which this one takes.
    """
    if not _has_operation(connection):
        return connection(complete(x))
    branch_in, mixed, write = hyper_connection([*x] if isinstance(x, Pending) else [x], _weights(connection))
    if not connection.add_branch_out_to_residual:
        return branch_in, _unchanged
    return branch_in, functools.partial(Pending, mixed, write)


def _unchanged(branch_out: Tensor) -> Tensor:
    return branch_out


def _weights(connection: Any) -> list[Tensor]:
    """Parameters in the operation's order; the last three exist only if the branch's output is added."""
    c = connection
    weights = [c.norm.gamma, c.static_alpha, c.dynamic_alpha_fn, c.pre_branch_scale, c.residual_scale]
    return weights + [c.static_beta, c.dynamic_beta_fn, c.h_post_scale] if c.add_branch_out_to_residual else weights


def _has_operation(connection: Any) -> bool:
    """True for a connection that the operation computes: in its default settings, no part replaced or hooked."""
    return (
        is_plain(connection, HyperConnection, ManifoldConstrainedHyperConnections)
        and is_plain(connection.norm, StreamNorm, RMSNorm)
        and is_plain(connection.dropout, nn.Dropout)
        and is_plain(connection.residual_transform, Identity)
        and connection.num_fracs == connection.num_input_views == connection.num_dynamic_alpha_proposals == 1
        and connection.branch is None
        and not connection.channel_first
        and connection.dropout.p == 0
        and connection.depth_residual_fn is add
        and connection.residual_mix_constraint_fn is sinkhorn
    )


# one token


def takes_tokens(connection: Module | None) -> bool:
    """Whether `connect_token` computes what a call of the connection does."""
    return connection is None or is_plain(connection, Residual) or _has_operation(connection)


def folded(connection: Any) -> FoldedConnection | None:
    """The connection's current weights, in the form for single tokens; `None` for a plain residual, which has none."""
    if not hasattr(connection, 'static_alpha'):
        return None
    to_logits, bias = _to_logits(connection)
    gain = at_least_float32(connection.norm.gamma).unsqueeze(1) + 1.0
    return FoldedConnection((to_logits * gain).mT.contiguous(), bias.contiguous())


def _to_logits(connection: Any) -> tuple[Float[Tensor, 'd l'], Float[Tensor, 's l']]:
    """Matrix from a normalised stream to the logits to read, mix and write by, and their biases."""
    c = connection
    bias = at_least_float32(c.static_alpha)
    scales = torch.cat((c.pre_branch_scale, c.residual_scale.expand(len(bias))))
    to_logits = at_least_float32(c.dynamic_alpha_fn[0]) * at_least_float32(scales)
    if c.add_branch_out_to_residual:
        to_write = at_least_float32(c.dynamic_beta_fn) * at_least_float32(c.h_post_scale)
        to_logits = torch.cat((to_logits, to_write.unsqueeze(1)), dim=1)
        bias = torch.cat((bias, at_least_float32(c.static_beta).unsqueeze(1)), dim=1)
    return to_logits, bias


def connect_token(connection: Module, weights: FoldedConnection | None, x: Streams) -> tuple[Tensor, AddResidual]:
    """The branch's input for one token, (b, 1, d), and the function that adds its output to the streams (b, s, d)."""
    if weights is None:
        return connection(x)
    streams, *pending = x if isinstance(x, Pending) else (x,)
    branch_in, residual, write = token_hyper_connection(streams, (*pending,) if pending else None, *weights)  # type: ignore[arg-type]
    return branch_in, functools.partial(Pending, residual, write)
