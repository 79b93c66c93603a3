"""Attention whose keys and values act as the layers of an MLP. An experiment of the reference, not of the paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from einops.layers.torch import Rearrange
from torch import Tensor, nn

from titans_pytorch.attention.rotary import Rotary, extend_cache, flatten_cache, rotary_causal_attention
from titans_pytorch.utils.checks import (
    check_callable,
    check_flags,
    check_floating,
    check_positive,
    check_shape,
    checked_arguments,
    described,
)
from titans_pytorch.utils.parameters import Resettable
from titans_pytorch.utils.shapes import Float

KeyValueCache = tuple[list[Tensor], list[Tensor]]
"""Keys and values of each layer, (b, h, m, d), keys before rotation."""


class HeadsMix(nn.Conv2d):
    """A learned linear map over the heads, (b, h, n, d), initially the identity."""

    def __init__(self, heads: int):
        super().__init__(heads, heads, 1, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.dirac_(self.weight)


class ImplicitMLPAttention(Resettable):
    """A memory MLP that is never materialised: each of its layers is a causal attention.

    The keys and values of one attention are an implicit weight matrix of shape (key dim, value dim), as in linear
    attention. A chain of such attentions with nonlinearities between them is an implicit form of the MLP that TTT and
    Titans materialise and train:

        o_0 = queries
        o_l = attend(o_{l-1}, keys_l, values_l), then between layers: activation(talking_heads(o_l))

    Sources: TTT, https://arxiv.org/abs/2407.04620; talking heads, https://arxiv.org/abs/2003.02436; normed keys,
    https://openreview.net/forum?id=HkztQWZfl2

    Args:
        dim: width of the tokens.
        mlp_hiddens: widths per head of the implicit MLP, from its input (the queries) to its output: two or more, so
            that `(64, 128, 128, 64)` has three layers. The smallest is the rotary dimension; wider heads rotate partly.
        activation: applied between the layers.
        heads: number of implicit MLPs, each over its own part of the features.
        talking_heads: mix the heads between layers by a learned linear map, initially the identity.
        prenorm: normalise the tokens.
        keys_rmsnorm: normalise the keys of each head.
    """

    def __init__(
        self,
        dim: int,
        mlp_hiddens: Sequence[int],
        *,
        activation: nn.Module = nn.SiLU(),  # noqa: B008  it has no state
        heads: int = 8,
        talking_heads: bool = True,
        prenorm: bool = True,
        keys_rmsnorm: bool = True,
    ):
        super().__init__()
        dim, heads = checked_arguments(ImplicitMLPAttention, locals(), positive=['dim', 'heads'])
        mlp_hiddens = checked_hiddens(mlp_hiddens)
        check_callable(activation=activation)

        self.dim, self.heads = dim, heads
        dim_in, *dims_between, dim_out = mlp_hiddens
        layers = list(pairwise(mlp_hiddens))

        self.norm = nn.RMSNorm(dim) if prenorm else nn.Identity()
        self.rotary_embed = Rotary(min(mlp_hiddens))

        self.to_queries = nn.Linear(dim, dim_in * heads, bias=False)
        # keys and values alternate, so that a seed draws the same weights as in the reference
        keys, values = zip(*([nn.Linear(dim, d * heads, bias=False) for d in layer] for layer in layers))
        self.keys = nn.ModuleList(keys)
        self.key_norms = nn.ModuleList([nn.RMSNorm(d) if keys_rmsnorm else nn.Identity() for d, _ in layers])
        self.values = nn.ModuleList(values)

        self.activation = activation
        self.talking_heads: nn.Module = nn.Identity()

        if talking_heads and dims_between:
            self.talking_heads = HeadsMix(heads)

        self.split_heads = Rearrange('b n (h d) -> b h n d', h=heads)
        self.merge_heads = Rearrange('b h n d -> b n (h d)')
        self.to_out = nn.Linear(dim_out * heads, dim, bias=False)

    def _parts(self) -> Iterable[nn.Module]:
        in_turn = [linear for pair in zip(self.keys, self.values) for linear in pair]
        others = [part for part in self.children() if part not in (self.to_queries, self.keys, self.values)]
        return self.to_queries, *in_turn, *others

    def forward(
        self,
        tokens: Float[Tensor, 'b n d'],
        cache: KeyValueCache | None = None,
        return_kv_cache: bool = False,
    ) -> Float[Tensor, 'b n d'] | tuple[Float[Tensor, 'b n d'], KeyValueCache]:
        """The output (b, n, d) and, with `return_kv_cache`, the keys and values of all tokens so far.

        With the `cache` of all earlier tokens, a sequence may be split into calls of any length; the outputs are those
        of a single call.
        """
        check_flags(return_kv_cache=return_kv_cache)
        check_floating('tokens', tokens, self.to_queries.weight.dtype)
        check_shape('tokens', tokens, batch=None, length=None, dim=self.dim)

        tokens = self.norm(tokens)

        out = self.split_heads(self.to_queries(tokens))
        keys = [norm(self.split_heads(to_keys(tokens))) for norm, to_keys in zip(self.key_norms, self.keys)]
        values = [self.split_heads(to_values(tokens)) for to_values in self.values]

        new = (*keys, *values)
        cached = flatten_cache(cache, tokens, self.to_queries.weight.dtype, self.heads, [t.shape[-1] for t in new])

        extended = extend_cache(cached, new)
        keys, values = extended[: len(keys)], extended[len(keys) :]

        for index, (key, value) in enumerate(zip(keys, values)):
            if index > 0:
                out = self.activation(self.talking_heads(out))

            out = rotary_causal_attention(self.rotary_embed, out, key, value)

        out = self.to_out(self.merge_heads(out))

        return (out, (keys, values)) if return_kv_cache else out


def checked_hiddens(mlp_hiddens: Any) -> list[int]:
    if not isinstance(mlp_hiddens, (tuple, list)):
        raise TypeError(f'mlp_hiddens must be a tuple of two or more widths, got {described(mlp_hiddens)}')
    if len(mlp_hiddens) < 2:
        raise ValueError(f'mlp_hiddens must have two or more widths, got {mlp_hiddens}')

    widths = check_positive(**{f'mlp_hiddens[{index}]': width for index, width in enumerate(mlp_hiddens)})
    if min(widths) < 3:
        raise ValueError(f'mlp_hiddens must be at least 3, the smallest rotary dimension, got {mlp_hiddens}')
    return widths
