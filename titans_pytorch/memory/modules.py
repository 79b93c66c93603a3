"""Modules around a memory network: norms, pooling of chunks, projections and gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Linear, Module, Parameter

from titans_pytorch.ops.gated_heads import gated_heads
from titans_pytorch.ops.head_norm import head_norm
from titans_pytorch.ops.norms import l2_norm
from titans_pytorch.ops.short_convolution import short_convolution
from titans_pytorch.ops.token_linear import linear_of_rows
from titans_pytorch.utils.parameters import Resettable
from titans_pytorch.utils.plain import is_plain, plain_parts
from titans_pytorch.utils.shapes import Float


class MultiheadRMSNorm(Module):
    """RMS norm with a gain of `1 + gamma` for each head."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.rmsnorm = nn.RMSNorm(dim, elementwise_affine=False)
        self.gamma = Parameter(torch.empty(heads, 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    @property
    def has_own_norm(self) -> bool:
        """True if the inner norm is still the one that this class creates."""
        inner = self.rmsnorm
        if not is_plain(inner, nn.RMSNorm) or inner.normalized_shape != self.gamma.shape[-1:]:
            return False
        return inner.weight is None and inner.eps is None

    def forward(self, x: Float[Tensor, 'b h n d']) -> Float[Tensor, 'b h n d']:
        if self.has_own_norm and x.shape[-1:] == self.gamma.shape[-1:]:
            return head_norm(x, self.gamma)
        return self.rmsnorm(x) * (self.gamma + 1.0)


class AveragePool(Module):
    """Mean of each chunk."""

    def __init__(self, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size

    def forward(self, x: Float[Tensor, 'b t d'], chunk_size: int | None = None) -> Float[Tensor, 'b n d']:
        chunk_size = chunk_size or self.chunk_size
        return x if chunk_size == 1 else x.unflatten(1, (-1, chunk_size)).mean(dim=2)


class StartingAt(Linear):
    """A linear map whose initial output is `start` for every input."""

    def __init__(self, dim: int, dim_out: int, start: float):
        self.start = start
        super().__init__(dim, dim_out)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # this draws from the generator, so that later draws do not depend on `start`
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)


def linear_from(dim: int, dim_out: int, start: float | None) -> Linear:
    """A linear map: randomly initialised, or, if `start` is given, with that initial output for every input."""
    return Linear(dim, dim_out) if start is None else StartingAt(dim, dim_out, start)


class AttentionPool(Resettable):
    """Mean of each chunk, weighted per feature by learned attention (Enformer); initially the plain mean."""

    def __init__(self, dim: int, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size
        self.to_attn_logits = StartingAt(dim, dim, 0.0)

    def forward(self, x: Float[Tensor, 'b t d'], chunk_size: int | None = None) -> Float[Tensor, 'b n d']:
        x = x.unflatten(1, (-1, chunk_size or self.chunk_size))
        return (x * linear_of_rows(self.to_attn_logits, x).softmax(dim=-2)).sum(dim=-2)


class L2Norm(Module):
    """Rows scaled to length 1, so that the product of two rows is the cosine of their angle."""

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        return l2_norm(x)


class CausalConv(Resettable):
    """Depthwise causal convolution of width k: n outputs for k − 1 + n tokens; the first k − 1 are only context."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel_size, groups=dim, bias=False)
        self.context = kernel_size - 1

    def forward(self, x: Float[Tensor, 'b t d']) -> Float[Tensor, 'b n d']:
        if x.shape[1] == self.context:  # `conv1d` refuses an empty output
            return x[:, self.context :]
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


def projection(dim: int, dim_out: int, activation: Module | None, conv_kernel: int | None = None) -> Module:
    """A linear map without bias, followed by a `CausalConv` if `conv_kernel` is given, and by `activation` if given."""
    linear = Linear(dim, dim_out, bias=False)
    conv = () if conv_kernel is None else (CausalConv(dim_out, conv_kernel),)
    parts = (linear, *conv, *(() if activation is None else (activation,)))
    return linear if len(parts) == 1 else nn.Sequential(*parts)


def pointwise(projection: Module) -> Module:
    """A projection without its convolution, unless the convolution sees only single tokens. The remaining parts are
    then called one by one, so hooks on the whole projection have no effect."""
    parts = [*projection] if isinstance(projection, nn.Sequential) else []
    kept = [part for part in parts if not isinstance(part, CausalConv) or part.context == 0]
    return projection if len(kept) == len(parts) else nn.Sequential(*kept)


class SplitHeads(Module):
    """Split rows into heads, a token's rows next to each other: (b, n, h · u · d) to (b, h, n · u, d).

    Without einops: its lookup takes longer than a small gate, and the compiler would have to trace through it.
    """

    def __init__(self, heads: int, per_token: int = 1):
        super().__init__()
        self.heads, self.per_token = heads, per_token

    def forward(self, x: Float[Tensor, 'b n hud']) -> Float[Tensor, 'b h nu d']:
        return x.unflatten(-1, (self.heads, self.per_token, -1)).transpose(1, 2).flatten(2, 3)


class MergeHeads(Module):
    """Heads side by side: (b, h, n, d) to (b, n, h · d)."""

    def forward(self, x: Float[Tensor, 'b h n d']) -> Float[Tensor, 'b n hd']:
        return x.transpose(1, 2).flatten(2)


def rows_of_heads(
    tokens: Float[Tensor, 'b t d'], projection: Module, split: Module, norm: Module | None = None
) -> Float[Tensor, 'b h nu e']:
    """Queries, keys or values of each head: tokens projected, split into heads and, if `norm` is given, normalised."""
    causal = _short_convolution_of(projection, split)
    if causal is not None and tokens.shape[1] > causal.context:
        assert isinstance(projection, nn.Sequential) and isinstance(split, SplitHeads)
        normalize = is_plain(norm, L2Norm)
        projected = projection[0](tokens)
        rows = short_convolution(projected, causal.conv.weight, split.heads, split.per_token, normalize)
        return rows if norm is None or normalize else norm(rows)
    rows = split(linear_of_rows(projection, tokens))
    return rows if norm is None else norm(rows)


def _short_convolution_of(projection: Module, split: Module) -> CausalConv | None:
    """The convolution of a projection with SiLU; `None` if there is none, or if a part has been replaced or hooked."""
    _, causal, _ = plain_parts(projection, None, CausalConv, nn.SiLU) or (None, None, None)
    if causal is None or not is_plain(split, SplitHeads) or not is_plain(causal.conv, nn.Conv1d):
        return None
    conv = causal.conv
    depthwise = conv.bias is None and conv.groups == len(conv.weight)
    return causal if depthwise and (conv.stride, conv.padding, conv.dilation) == ((1,), (0,), (1,)) else None


def join_heads(
    values: Float[Tensor, 'b h n e'],
    norm: Module,
    gate: Module | None,
    tokens: Float[Tensor, 'b n d'],
    dtype: torch.dtype | None,
) -> Float[Tensor, 'b n he']:
    """Put the retrieved values of all heads side by side, normalised and gated.

    Args:
        gate: maps tokens to gates.
        dtype: dtype of the result. Default: as PyTorch promotes the parts.
    """
    to_logits = logits_of(gate)
    if to_logits is not None and is_norm_of_heads(norm):
        gamma = norm.gamma if isinstance(norm, MultiheadRMSNorm) else None
        return gated_heads(values, gamma, to_logits(tokens), dtype)
    values = norm(values)
    if gate is not None:
        values = values * gate(tokens)
    return values.transpose(1, 2).flatten(2).to(values.dtype if dtype is None else dtype)


def logits_of(gate: Module | None) -> Module | None:
    """The linear map of a gate that is a sigmoid for each head, or for each of its features; `None` if there is no
    gate, or if a part of it has been replaced or hooked."""
    to_logits, *_ = plain_parts(gate, None, SplitHeads, nn.Sigmoid) or (None,)
    return to_logits


def is_norm_of_heads(norm: Module) -> bool:
    """True for no norm, or for a `MultiheadRMSNorm` with no part replaced or hooked."""
    return is_plain(norm, nn.Identity) or (is_plain(norm, MultiheadRMSNorm) and norm.has_own_norm)  # type: ignore[return-value]


class PerHead(SplitHeads):
    """`SplitHeads` with heads merged into the batch axis: (b, n, h · g) to (b · h, n, g)."""

    def forward(self, x: Float[Tensor, 'b n hg']) -> Float[Tensor, 'bh n g']:
        return super().forward(x).flatten(0, 1)


class Gate(nn.Sequential):
    """A linear map and what follows it; for few tokens, the map is an operation of its own."""

    def forward(self, tokens: Float[Tensor, 'b n d']) -> Float[Tensor, 'bh n g']:
        to_gate, *rest = self
        gates = linear_of_rows(to_gate, tokens)
        for part in rest:
            gates = part(gates)
        return gates


def gate(dim: int, heads: int, per_head: int, activation: Module | None = None, start: float | None = None) -> Gate:
    """A module that maps pooled chunks (b, n, dim) to `per_head` gates for each head and chunk, (bh, n, per_head).

    `start`: initial logit of the gate, the same for every input. Default: random initialisation.
    """
    to_gate = linear_from(dim, heads * per_head, start)
    split = PerHead(heads)
    return Gate(to_gate, split) if activation is None else Gate(to_gate, split, activation)
