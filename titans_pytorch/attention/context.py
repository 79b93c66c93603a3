"""Attention over segments and their context: the short-term memory of MAC in the paper's order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from titans_pytorch.attention.rotary import KeyValues, rotate
from titans_pytorch.attention.segmented import AttnIntermediates, SegmentedAttention
from titans_pytorch.ops.attention_inputs import heads_of
from titans_pytorch.ops.token_attention import Position, token_attention
from titans_pytorch.ops.token_linear import linear_of_token
from titans_pytorch.utils.checks import check_shape
from titans_pytorch.utils.shapes import Float


class ContextAttention(SegmentedAttention):
    """Attention within segments in which each position has two keys: its own, and that of its context.

    The context is what long-term memory retrieves for the segment (Titans eq. 22, [persistent ‖ h ‖ segment]). Like a
    key, a context belongs to its token and is visible from that position on.
    """

    keys_per_position = 2

    def forward(  # type: ignore[override]
        self,
        seq: Float[Tensor, 'b n d'],
        context: Float[Tensor, 'b n d'],
        cache: KeyValues | None = None,
        position: int = 0,
        detach_context: bool = False,
        disable_flex_attn: bool = False,
        flex_attn_fn: Callable[..., Tensor] | None = None,
    ) -> tuple[Float[Tensor, 'b n d'], AttnIntermediates]:
        """Attend within one segment, which `seq` must not exceed.

        Args:
            seq: (batch, length, dim).
            context: context of each position, with the same shape.
            cache: keys and values of the positions immediately before `seq`.
            position: index of the first position of `seq`.
            detach_context: let no gradient reach contexts, including those in the cache.
            disable_flex_attn, flex_attn_fn: without effect, as a single segment does not need FlexAttention.
        """
        check_shape('context', context, batch=seq.shape[0], length=seq.shape[1], dim=self.dim)
        if position % self.total_segment_len + seq.shape[1] > self.total_segment_len:
            raise ValueError(
                f'seq must not go beyond the segment of {self.total_segment_len} positions that it begins in, '
                f'got {seq.shape[1]} positions from {position} on'
            )
        queries, keys, values = self._project_pair(seq, context)
        queries = rotate(self.rotary_emb, queries, torch.arange(position, position + seq.shape[1], device=seq.device))
        own_values, first = values, position
        if cache is not None and position % self.total_segment_len:
            cache = self._carried(cache, seq)
            first = position - cache[0].shape[-2] // self.keys_per_position
            keys, values = torch.cat((cache[0], keys), dim=-2), torch.cat((cache[1], values), dim=-2)
        intermediates = AttnIntermediates(value_residual=own_values, cached_key_values=(keys, values))
        if detach_context:
            keys, values = _without_context(keys), _without_context(values)
        out = self._attend_at_once(queries, self._rotated(keys, first), values, first)
        return self.to_out(self.merge_heads(out)), intermediates

    def step(  # type: ignore[override]
        self,
        seq: Float[Tensor, 'b 1 d'],
        buffers: KeyValues,
        position: Position,
        layer: int,
        context: Float[Tensor, 'b 1 d'],
    ) -> tuple[Float[Tensor, 'b 1 d'], Float[Tensor, 'b h 2 e']]:
        """`forward` for one position, written into `buffers`; `layer` is the number of attentions in earlier layers."""
        projected = self.to_qkv(self.norm(torch.cat((seq, context), dim=1)))
        out = token_attention(projected, buffers, self.cache_layout, position, layer)
        return linear_of_token(self.to_out, out)[0], heads_of(projected, self.heads)[2]

    def _project_pair(self, seq: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `seq`; keys and values of both inputs, interleaved: each position's own, then its context's."""
        queries, *own = heads_of(self.to_qkv(self.norm(seq)), self.heads)
        _, *of_context = heads_of(self.to_qkv(self.norm(context.to(seq.dtype))), self.heads)
        keys, values = (torch.stack(pair, dim=-2).flatten(-3, -2) for pair in zip(own, of_context))
        return queries, keys, values


def _without_context(pairs: Float[Tensor, 'b h n2 d']) -> Float[Tensor, 'b h n2 d']:
    """Keys or values, where those of the context have no gradient."""
    own, of_context = pairs.unflatten(-2, (-1, 2)).unbind(-2)
    return torch.stack((own, of_context.detach()), dim=-2).flatten(-3, -2)
