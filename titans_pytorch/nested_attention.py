"""Attention over the outputs of three inner attentions. An experiment of the reference, not part of the paper."""

from __future__ import annotations

from einops.layers.torch import Rearrange
from torch import Tensor, nn

from titans_pytorch.attention.rotary import (
    Rotary,
    check_rotary_width,
    extend_cache,
    flatten_cache,
    rotary_causal_attention,
)
from titans_pytorch.utils.checks import check_flags, check_floating, check_shape, checked_arguments
from titans_pytorch.utils.parameters import Resettable
from titans_pytorch.utils.shapes import Float

NestedCache = tuple[tuple[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]
"""Three keys and three values of the inner attentions, then the outer key and value: (b, h, m, d), before rotation."""


class NestedAttention(Resettable):
    """Causal attention over the outputs of three causal attentions that share their queries:

        q, k, v = attend(queries, keys_i, values_i)  for i = 1, 2, 3
        out     = attend(q, norm(k), v)

    so that a token's key and value depend on all earlier tokens.

    Normed keys: https://openreview.net/forum?id=HkztQWZfl2

    Args:
        dim: width of the tokens.
        dim_head: width of a head, all of it rotary.
        heads: number of heads.
        prenorm: normalise the tokens.
        keys_rmsnorm: without effect, as in the reference: keys are always normalised.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        prenorm: bool = True,
        keys_rmsnorm: bool = True,
    ):
        super().__init__()
        dim, dim_head, heads = checked_arguments(NestedAttention, locals(), positive=['dim', 'dim_head', 'heads'])
        check_rotary_width(dim_head)
        self.dim, self.dim_head, self.heads = dim, dim_head, heads
        dim_inner = dim_head * heads

        self.norm = nn.RMSNorm(dim) if prenorm else nn.Identity()
        self.rotary_embed = Rotary(dim_head)

        self.to_queries = nn.Linear(dim, dim_inner, bias=False)
        self.to_keys = nn.Linear(dim, dim_inner * 3, bias=False)
        self.to_values = nn.Linear(dim, dim_inner * 3, bias=False)

        self.key_norms = nn.ModuleList([nn.RMSNorm(dim_head) for _ in range(3)])
        self.nested_key_norm = nn.RMSNorm(dim_head)

        self.split_heads = Rearrange('b n (h d) -> b h n d', h=heads)
        self.split_three_heads = Rearrange('b n (i h d) -> i b h n d', i=3, h=heads)
        self.merge_heads = Rearrange('b h n d -> b n (h d)')

        self.to_out = nn.Linear(dim_inner, dim, bias=False)

    def forward(
        self,
        tokens: Float[Tensor, 'b n d'],
        cache: NestedCache | None = None,
        return_kv_cache: bool = False,
    ) -> Float[Tensor, 'b n d'] | tuple[Float[Tensor, 'b n d'], NestedCache]:
        """The output (b, n, d) and, with `return_kv_cache`, inner and outer keys and values of all tokens so far.

        With the `cache` of all earlier tokens, a sequence may be split into calls of any length; the outputs are those
        of a single call.
        """
        check_flags(return_kv_cache=return_kv_cache)
        check_floating('tokens', tokens, self.to_queries.weight.dtype)
        check_shape('tokens', tokens, batch=None, length=None, dim=self.dim)

        cached = flatten_cache(cache, tokens, self.to_queries.weight.dtype, self.heads, [self.dim_head] * 8)

        tokens = self.norm(tokens)

        queries = self.split_heads(self.to_queries(tokens))
        keys = [norm(key) for norm, key in zip(self.key_norms, self.split_three_heads(self.to_keys(tokens)))]
        values = self.split_three_heads(self.to_values(tokens))

        keys_values = extend_cache(cached and cached[:6], (*keys, *values))
        keys, values = keys_values[:3], keys_values[3:]

        # inner attentions are computed for new tokens only; those of earlier tokens are cached

        q, k, v = (rotary_causal_attention(self.rotary_embed, queries, key, value) for key, value in zip(keys, values))

        k, v = extend_cache(cached and cached[6:], (self.nested_key_norm(k), v))

        out = rotary_causal_attention(self.rotary_embed, q, k, v)
        out = self.to_out(self.merge_heads(out))

        return (out, ((keys, values), (k, v))) if return_kv_cache else out
