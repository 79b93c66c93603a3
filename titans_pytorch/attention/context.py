"""Attention over segments and their context: the short-term memory of MAC in the order of the paper."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.attention.rotary import KeyValues
from titans_pytorch.attention.segmented import AttnIntermediates, SegmentedAttention, heads_of
from titans_pytorch.ops.token_attention import token_attention
from titans_pytorch.ops.token_attention.cache import Position
from titans_pytorch.utils.shapes import Float


class Attended(NamedTuple):
    """The output of attention for its two readers. Their values are equal, their gradients may differ."""

    out: Float[Tensor, 'b n d']
    to_store: Float[Tensor, 'b n d']
    """What the memory stores."""


class ContextAttention(SegmentedAttention):
    """Attention within segments in which each position has two keys: its own, and that of its context.

    The context is the long-term memory's output for the segment (Titans eq. 22, [persistent ‖ h ‖ segment]). Like a
    key, it depends on its token, and is visible from that position on.

    Args:
        detach_context: let no gradient of what is stored reach the context, at the cost of a second backward pass.
        kwargs: arguments of `SegmentedAttention`.
    """

    keys_per_position = 2

    def __init__(self, *args: Any, detach_context: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.detach_context = detach_context

    def forward(  # type: ignore[override]
        self,
        seq: Float[Tensor, 'b n d'],
        context: Float[Tensor, 'b n d'],
        cache: KeyValues | None = None,
        position: int = 0,
        **_: Any,
    ) -> tuple[Attended, AttnIntermediates]:
        """Attend within one segment, which `seq` must not exceed.

        Args:
            seq: (batch, length, dim).
            context: context of each position, of the same shape.
            cache: keys and values of the positions immediately before `seq`.
            position: index of the first position of `seq`.
        """
        queries, keys, values = self._project_pair(seq, context)
        own_values, first = values, position
        if cache is not None and position % self.total_segment_len:
            first = position - cache[0].shape[-2] // self.keys_per_position
            keys, values = torch.cat((cache[0], keys), dim=-2), torch.cat((cache[1], values), dim=-2)
        intermediates = AttnIntermediates(value_residual=own_values, cached_key_values=(keys, values))

        out = self._attended(queries, keys, values, first)
        if not (self.detach_context and torch.is_grad_enabled()):
            return Attended(out, out), intermediates
        to_store = self._attended(queries, _without_context(keys), _without_context(values), first)
        return Attended(out, to_store), intermediates

    def step(  # type: ignore[override]
        self,
        seq: Float[Tensor, 'b 1 d'],
        buffers: KeyValues,
        position: Position,
        layer: int,
        context: Float[Tensor, 'b 1 d'],
        **_: Any,
    ) -> tuple[Attended, Float[Tensor, 'b h 2 e']]:
        """`forward` for one position, which it writes into `buffers`; `layer` is the number of attentions before it."""
        projected = self.to_qkv(self.norm(torch.cat((seq, context), dim=1)))
        out = self.to_out(token_attention(projected, buffers, self.cache_layout, position, layer))
        return Attended(out, out), heads_of(projected, self.heads)[2]

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, first: int) -> Float[Tensor, 'b n d']:
        return self.to_out(self.merge_heads(self._attend_at_once(queries, keys, values, first)))

    def _project_pair(self, seq: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `seq`; keys and values of both, interleaved: each position's own, then its context's."""
        queries, *own = self._queries_keys_values(self.norm(seq))
        _, *of_context = self._queries_keys_values(self.norm(context.to(seq.dtype)))
        keys, values = (torch.stack(pair, dim=-2).flatten(-3, -2) for pair in zip(own, of_context))
        return queries, keys, values


def _without_context(pairs: Float[Tensor, 'b h n2 d']) -> Float[Tensor, 'b h n2 d']:
    """Keys or values, those of the context without a gradient."""
    own, of_context = pairs.unflatten(-2, (-1, 2)).unbind(-2)
    return torch.stack((own, of_context.detach()), dim=-2).flatten(-3, -2)
