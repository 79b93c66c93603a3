"""Attention over segments, with persistent memory tokens: the short-term memory of a Titans model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear
from x_transformers.attend import Attend

from titans_pytorch.attention.flex import segmented_flex_attention
from titans_pytorch.attention.masks import after_persistent, over_positions, segmented
from titans_pytorch.attention.rotary import KeyValues, Rotary, check_rotary_width, frequencies, rotate
from titans_pytorch.memory.modules import MergeHeads, SplitHeads, logits_of
from titans_pytorch.memory.packing import PackedDocuments, check_documents
from titans_pytorch.ops.attention_inputs import attention_inputs, heads_of, mixed_values, with_persistent
from titans_pytorch.ops.token_attention import Position, RingLayout, ValueMix, token_attention
from titans_pytorch.ops.token_linear import linear_of_token
from titans_pytorch.utils.checks import (
    check_broadcasts,
    check_callable,
    check_flags,
    check_floating,
    check_keywords,
    check_not_negative,
    check_precision,
    check_shape,
    checked_arguments,
    checked_carried,
    checked_key_values,
)
from titans_pytorch.utils.functional import compile_each_length, constant
from titans_pytorch.utils.parameters import InReferenceFormat, Resettable, first_weight
from titans_pytorch.utils.plain import is_plain, is_plain_linear
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Bool, Float, Int, divided


class AttnIntermediates(NamedTuple):
    """Results of an attention layer other than its output."""

    value_residual: Float[Tensor, 'b h n e']
    """Values before any residual; later layers mix in those of the first layer."""
    cached_key_values: KeyValues
    """Keys (not rotated) and values, from the cache and from this call."""


class SegmentedAttention(Resettable, InReferenceFormat):
    """Causal attention within a window of `segment_len + num_longterm_mem_tokens` positions.

    Windows are disjoint blocks or, with `sliding`, the positions up to that far back. Every token also sees
    `num_persist_mem_tokens` learned keys and values (persistent memory, Titans eq. 19). Positions are rotary.

    Args:
        dim: width of input and output.
        segment_len: tokens per segment.
        num_persist_mem_tokens: learned keys and values that every token sees.
        num_longterm_mem_tokens: memory tokens that follow each segment in the sequence.
        dim_head, heads: width and number of the attention heads.
        sliding: sliding windows instead of blocks.
        accept_value_residual: mix the first layer's values into this layer's with learned weights.
        attend_kwargs: options of `x_transformers.attend.Attend`; FlexAttention ignores them. If they change results,
            `sample` calls the model for each token.
        use_flex_attn: use FlexAttention on a CUDA device.
    """

    keys_per_position = 1

    def __init__(
        self,
        dim: int,
        segment_len: int,
        num_persist_mem_tokens: int = 0,
        num_longterm_mem_tokens: int = 0,
        dim_head: int = 64,
        heads: int = 8,
        sliding: bool = False,
        accept_value_residual: bool = False,
        attend_kwargs: Mapping[str, Any] = {},
        use_flex_attn: bool = False,
    ):
        super().__init__()
        dim, segment_len, dim_head, heads, num_persist_mem_tokens, num_longterm_mem_tokens = checked_arguments(
            SegmentedAttention,
            locals(),
            positive=['dim', 'segment_len', 'dim_head', 'heads'],
            not_negative=['num_persist_mem_tokens', 'num_longterm_mem_tokens'],
        )
        check_keywords(attend_kwargs=attend_kwargs)
        check_rotary_width(dim_head)
        self.dim = dim
        self.segment_len = segment_len
        self.num_longterm_mem_tokens = num_longterm_mem_tokens
        self.num_persist_mem_tokens = num_persist_mem_tokens
        self.total_segment_len = segment_len + num_longterm_mem_tokens
        self.sliding = sliding
        self.use_flex_attn = use_flex_attn

        dim_inner = dim_head * heads
        self.norm = nn.RMSNorm(dim)
        self.rotary_emb = Rotary(dim_head)
        self.attend = _attend(**attend_kwargs)
        self.to_qkv = Linear(dim, dim_inner * 3, bias=False)
        self.to_out = Linear(dim_inner, dim, bias=False)
        self.to_learned_v_mix = (
            nn.Sequential(Linear(dim, heads), SplitHeads(heads), nn.Sigmoid()) if accept_value_residual else None
        )
        self.heads, self.dim_head = heads, dim_head
        self.merge_heads = MergeHeads()
        self.persistent_memory = (
            nn.Parameter(torch.empty(2, heads, num_persist_mem_tokens, dim_head)) if num_persist_mem_tokens else None
        )
        self._reset_own()

    def _reset_own(self) -> None:
        if self.persistent_memory is not None:
            nn.init.zeros_(self.persistent_memory)

    def empty_parameters(self) -> dict[str, tuple[int, ...]]:
        if self.persistent_memory is not None:
            return {}
        return {'persistent_memory': (2, self.heads, 0, self.dim_head)}

    def forward(
        self,
        seq: Float[Tensor, 'b n d'],
        value_residual: Float[Tensor, 'b h n e'] | None = None,
        flex_attn_fn: Callable[..., Tensor] | None = None,
        disable_flex_attn: bool = False,
        output_gating: Float[Tensor, 'b n d'] | None = None,
        cache: KeyValues | None = None,
        *,
        position: int | None = None,
        documents: PackedDocuments | None = None,
    ) -> tuple[Float[Tensor, 'b n d'], AttnIntermediates]:
        """Attend over a sequence, or a piece of one.

        Args:
            seq: (batch, length, dim).
            value_residual: values of the first layer, (batch, heads, length, dim_head); required with
                `accept_value_residual`, and only then.
            flex_attn_fn: FlexAttention with its block mask, shared between layers. Default: built here.
            disable_flex_attn: do not use FlexAttention in this call.
            output_gating: factors on the output; they must broadcast to (batch, length, dim).
            cache: keys and values of the positions immediately before `seq`: all of them, or `trimmed`.
            position: index of the first position of `seq`. Default: the length of the cache, which must then be
                untrimmed; 0 without one.
            documents: several documents packed into each row, which do not see each other. Only without a cache, and
                with sliding windows.

        Returns:
            the output (batch, length, dim), and `AttnIntermediates`.

        Raises:
            ValueError, TypeError: for arguments that do not fit the layer or each other; the message names the
                argument.
        """
        cache, position = self._checked_call(
            seq, value_residual, flex_attn_fn, disable_flex_attn, output_gating, cache, position, documents
        )
        num_cached = 0 if cache is None else cache[0].shape[-2]
        position = num_cached if position is None else position
        first = position - num_cached
        at_once = cache is not None and seq.shape[1] <= self.total_segment_len
        flex = not (disable_flex_attn or at_once) and documents is None and self._takes_flex(seq.is_cuda, first)

        seq = self.norm(seq)
        projected = self.to_qkv(seq)
        mix = None
        if self.to_learned_v_mix is not None and value_residual is not None:
            mix = value_residual, self.to_learned_v_mix(seq)
        queries, keys, values = attention_inputs(
            projected,
            self.heads,
            frequencies(self.rotary_emb, projected.device),
            position if documents is None else documents.positions,
            mix=mix,
            # windows take persistent keys separately, and with a cache other keys come in between
            persistent=self.persistent_memory if flex and cache is None else None,
        )
        # a cache holds keys before rotation, and no persistent ones
        _, own_keys, own_values = heads_of(projected, self.heads)
        to_keep = own_keys, values[..., values.shape[-2] - seq.shape[1] :, :]
        if cache is not None:
            to_keep = torch.cat((cache[0], to_keep[0]), dim=-2), torch.cat((cache[1], to_keep[1]), dim=-2)
            keys, values = torch.cat((self._rotated(cache[0], first), keys), dim=-2), to_keep[1]
            if flex:
                keys, values = with_persistent(keys, values, self.persistent_memory)

        if at_once:
            out = self._attend_at_once(queries, keys, values, first)
        elif flex:
            out = self._attend_flex(queries, keys, values, flex_attn_fn)
        else:
            out = self._attend_windows(queries, keys, values, first, documents)
        out = self.to_out(self.merge_heads(out))
        out = out if output_gating is None else out * output_gating
        return out, AttnIntermediates(value_residual=own_values, cached_key_values=to_keep)

    def _checked_call(
        self,
        seq: Any,
        value_residual: Any,
        flex_attn_fn: Any,
        disable_flex_attn: Any,
        output_gating: Any,
        cache: Any,
        position: Any,
        documents: Any,
    ) -> tuple[KeyValues | None, int | None]:
        """Check all arguments of a call; return its cache and position."""
        check_floating('seq', seq, self._dtype)
        check_shape('seq', seq, batch=None, length=None, dim=self.dim)
        batch, length, _ = seq.shape
        check_flags(disable_flex_attn=disable_flex_attn)
        if flex_attn_fn is not None:
            check_callable(flex_attn_fn=flex_attn_fn)
        if (value_residual is None) != (self.to_learned_v_mix is None):
            given = 'got none' if value_residual is None else 'but this layer has accept_value_residual=False'
            raise ValueError(f'value_residual must be given exactly where accept_value_residual=True, {given}')
        if value_residual is not None:
            sizes = {'batch': batch, 'heads': self.heads, 'length': length, 'dim_head': self.dim_head}
            check_floating('value_residual', value_residual)
            check_shape('value_residual', value_residual, **sizes)
        if output_gating is not None:
            check_broadcasts('output_gating', output_gating, seq)
        if documents is not None:
            check_documents(documents, batch, length)
            if cache is not None or not self.sliding:
                raise ValueError('documents need sliding windows, and a call without cache')
        if cache is not None:
            cache, position = self.checked_cache('cache', cache, position, batch)
            cache = self._carried(cache, seq)
            compile_each_length(cache[0].shape[-2])
        elif position is not None:
            (position,) = check_not_negative(position=position)
        return cache, position

    def _takes_flex(self, is_cuda: bool, first: int) -> bool:
        """True if FlexAttention can serve keys of positions from `first` on; its windows start at the first key."""
        return self.use_flex_attn and is_cuda and (self.sliding or first % self.total_segment_len == 0)

    def checked_cache(self, name: str, cache: Any, position: Any, batch: int | None) -> tuple[KeyValues, int | None]:
        """Check `cache`, keys and values of this attention from before `position`; return it with the position."""
        key_values = checked_key_values(name, cache, batch, self.heads, self.dim_head)
        if self._dtype is not None:
            for t in key_values:
                check_precision(name, t, self._dtype)
        if position is not None:
            (position,) = check_not_negative(position=position)
            if key_values[0].shape[-2] > position * self.keys_per_position:
                raise ValueError(
                    f'{name} must hold no more than the {position} positions before position={position}, '
                    f'got {key_values[0].shape[-2] // self.keys_per_position}'
                )
        return key_values, position

    @property
    def _dtype(self) -> torch.dtype | None:
        weight = first_weight(self.norm, self.to_qkv)
        return None if weight is None else weight.dtype

    def _carried(self, cache: KeyValues, seq: Float[Tensor, 'b n d']) -> KeyValues:
        """Return `cache` after checking that its precision and device fit a call with `seq`."""
        dtype = self._dtype or seq.dtype
        keys, values = (checked_carried('cached keys and values', t, dtype, seq.device) for t in cache)
        return keys, values

    def trimmed(self, key_values: KeyValues, position: int) -> KeyValues:
        """Keys and values visible from `position` on: the last window if windows slide, else the incomplete one."""
        length = key_values[0].shape[-2]
        visible = min(length, self.num_visible(position) * self.keys_per_position)
        keys, values = (t[..., length - visible :, :].clone() for t in key_values)
        return keys, values

    def num_visible(self, position: int) -> int:
        """Number of positions before `position` that a query at `position` sees."""
        window = self.total_segment_len
        return constant(min(position, window) if self.sliding else position % window)

    # decoding steps, over ring-buffer caches that are written in place

    @property
    def takes_steps(self) -> bool:
        """True if `step` computes the same as a call: softmax attention without further options."""
        return _is_softmax(self.attend) and is_plain(self.merge_heads, MergeHeads)

    @property
    def num_slots(self) -> int:
        """Number of positions in the ring buffer: those that a token can see, including itself."""
        return self.total_segment_len + self.sliding

    @property
    def cache_layout(self) -> RingLayout:
        return RingLayout(self.num_persist_mem_tokens, self.num_slots, self.keys_per_position, self.sliding)

    def to_buffers(self, key_values: KeyValues, position: int) -> KeyValues:
        """Keys and values that tokens from `position` on can see, (b, h, persistent + `num_slots`, d).

        Persistent ones come first, then a ring buffer in which position p has slot p modulo `num_slots`. Keys are
        rotated here, once, rather than at every step.
        """
        keys, values = self.trimmed(key_values, position)
        start = position - keys.shape[-2] // self.keys_per_position
        slots = self.cache_layout.slots(torch.arange(start, position, device=keys.device))
        rings = []
        for t in (self._rotated(keys, start), values):
            ring = t.new_zeros(*t.shape[:2], self.num_slots * self.keys_per_position, t.shape[-1])
            rings.append(ring.index_copy(2, slots, t))
        keys, values = rings
        return with_persistent(keys, values, self.persistent_memory)

    def from_buffers(self, buffers: KeyValues, position: int) -> KeyValues:
        """Inverse of `to_buffers`: keys, with the rotation undone, and values in the order of their positions."""
        positions = torch.arange(position - self.num_visible(position), position, device=buffers[0].device)
        slots = self.cache_layout.slots(positions) + self.num_persist_mem_tokens
        keys, values = (t.index_select(2, slots) for t in buffers)
        return rotate(self.rotary_emb, keys, -positions.repeat_interleave(self.keys_per_position)), values

    def step(
        self,
        seq: Float[Tensor, 'b 1 d'],
        buffers: KeyValues,
        position: Position,
        layer: int,
        value_residual: Float[Tensor, 'b h 1 e'] | None = None,
        output_gating: Float[Tensor, 'b 1 d'] | None = None,
    ) -> tuple[Float[Tensor, 'b 1 d'], Float[Tensor, 'b h 1 e']]:
        """`forward` for one position, written into `buffers`; `layer` is the number of attentions in earlier layers.
        Returns the output, and the values before any residual."""
        projected, seq = linear_of_token(self.to_qkv, seq, self.norm)
        values, mix = heads_of(projected, self.heads)[2], None
        if self.to_learned_v_mix is not None and value_residual is not None:
            to_shares: Any = logits_of(self.to_learned_v_mix)
            if to_shares is not None and is_plain_linear(to_shares):
                mix = ValueMix(seq, to_shares.weight, to_shares.bias, value_residual)
            else:
                mixed = mixed_values(values, value_residual, self.to_learned_v_mix(seq)).transpose(1, 2).flatten(2)
                projected = torch.cat((projected[..., : -mixed.shape[-1]], mixed), dim=-1)
        out = token_attention(projected, buffers, self.cache_layout, position, layer, mix)
        out, _ = linear_of_token(self.to_out, out)
        return out if output_gating is None else out * output_gating, values

    # parts

    def _rotated(self, keys: Tensor, first: int) -> Tensor:
        """Rotate keys of positions from `first` on. Persistent keys are not rotated, so absolute positions matter."""
        positions = torch.arange(keys.shape[-2], device=keys.device) // self.keys_per_position + first
        return rotate(self.rotary_emb, keys, positions)

    # three equivalent implementations; they take the rotated queries of the last positions and all rotated keys

    def _attend_flex(self, queries: Tensor, keys: Tensor, values: Tensor, attend: Callable | None) -> Tensor:
        """Attention by FlexAttention; keys and values begin with the persistent ones."""
        length = keys.shape[-2] - self.num_persist_mem_tokens
        if attend is None:
            attend = segmented_flex_attention(
                length, self.total_segment_len, self.num_persist_mem_tokens, self.sliding, keys.device
            )
        num_cached = length - queries.shape[-2]
        return attend(F.pad(queries, (0, 0, num_cached, 0)), keys, values)[..., num_cached:, :]

    def _attend_windows(
        self, queries: Tensor, keys: Tensor, values: Tensor, first: int, documents: PackedDocuments | None = None
    ) -> Tensor:
        """Attend window by window; a sliding window sees the window before it too."""
        batch, length, window = queries.shape[0], queries.shape[-2], self.total_segment_len
        num_cached = keys.shape[-2] - length
        # padding a short sequence to a long window costs time and memory; comparing a symbolic length would limit it
        in_one = isinstance(length, int) and keys.shape[-2] == length <= window
        window = length if in_one else window
        # windows begin at the start of the sequence; no query sees positions before `first`
        lead = constant(first % window)
        num_windows, in_last = divided(length, window, lead + num_cached)
        trail = -in_last % window
        num_windows += int(in_last > 0)
        queries = F.pad(queries, (0, 0, lead + num_cached, trail))
        keys, values = (F.pad(t, (0, 0, lead, trail)) for t in (keys, values))
        by_window = (t.unflatten(2, (num_windows, window)) for t in (queries, keys, values))
        queries, keys, values = (t.transpose(1, 2) for t in by_window)

        mask = None
        if self.sliding and not in_one:
            mask = self._window_mask(queries.shape[1], queries.device)
            mask = mask.unsqueeze(1).repeat(batch, 1, 1, 1)
            keys, values = (torch.cat((_shifted(t), t), dim=-2) for t in (keys, values))
        if documents is not None:
            ids = F.pad(documents.ids, (0, trail), value=-1).unflatten(1, (num_windows, window))
            same = self._document_mask(ids, with_window_before=mask is not None)
            mask = same if mask is None else mask & same

        queries, keys, values = (t.flatten(0, 1) for t in (queries, keys, values))
        out, _ = self.attend(queries, *with_persistent(keys, values, self.persistent_memory), mask=mask)
        out = out.unflatten(0, (batch, num_windows)).transpose(1, 2).flatten(2, 3)
        return out[..., lead + num_cached : lead + num_cached + length, :]

    def _window_mask(self, num_windows: int, device: torch.device) -> Tensor:
        """(windows, queries, keys); the keys are the persistent ones, the window before, and the window itself."""
        positions = torch.arange(num_windows * self.total_segment_len, device=device).unflatten(0, (num_windows, -1))
        persistent = torch.arange(self.num_persist_mem_tokens, device=device).expand(num_windows, -1)
        # no window precedes the first one, so its keys get a position beyond all queries
        before = torch.where(positions < self.total_segment_len, positions.numel(), positions - self.total_segment_len)
        keys = torch.cat((before, positions), dim=-1) + self.num_persist_mem_tokens
        return over_positions(self._mask_mod, positions, torch.cat((persistent, keys), dim=-1))

    def _document_mask(self, ids: Int[Tensor, 'b w i'], with_window_before: bool) -> Bool[Tensor, 'bw 1 i j']:
        """True for persistent keys and for keys in the query's document; `ids` is the document of each position."""
        of_keys = torch.cat((_shifted(ids), ids), dim=-1) if with_window_before else ids
        same = ids.unsqueeze(-1) == of_keys.unsqueeze(-2)
        return F.pad(same, (self.num_persist_mem_tokens, 0), value=True).flatten(0, 1).unsqueeze(1)

    def _attend_at_once(self, queries: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        """Attend from all queries to all keys at once, for short pieces of a sequence, where queries see few keys."""
        positions = torch.arange(keys.shape[-2] // self.keys_per_position, device=keys.device)
        num_cached = len(positions) - queries.shape[-2]
        persistent = torch.arange(self.num_persist_mem_tokens, device=keys.device)
        of_keys = positions.repeat_interleave(self.keys_per_position)
        offset = constant(first % self.total_segment_len)
        mask = over_positions(
            self._mask_mod,
            positions[num_cached:] + offset,
            torch.cat((persistent, of_keys + offset + self.num_persist_mem_tokens)),
        )
        keys, values = with_persistent(keys, values, self.persistent_memory)
        out, _ = self.attend(queries, keys, values, mask=mask[None, None])
        return out

    @property
    def _mask_mod(self) -> Callable[..., Tensor]:
        return after_persistent(self.num_persist_mem_tokens, segmented(self.total_segment_len, self.sliding))


def _shifted(windows: Tensor) -> Tensor:
    """The window before each window, (b, w, …); zeros for the first."""
    return F.pad(windows, (*(0, 0) * (windows.ndim - 2), 1, 0))[:, :-1]


_NEUTRAL_OPTIONS = {'causal', 'flash', 'dropout'}  # options of `Attend` that change no result in evaluation mode


def _attend(**kwargs: Any) -> Attend:
    """Attention by x_transformers, but with the softmax of float64 in float64 instead of float32."""
    attend = Attend(causal=True, **kwargs)
    fn = attend.attn_fn
    if isinstance(fn, partial) and fn.func is F.softmax and fn.keywords.get('dtype') is torch.float32:
        attend.attn_fn = partial(softmax, dim=fn.keywords['dim'])
    if kwargs.keys() <= _NEUTRAL_OPTIONS:  # an `Attend` that a user has made lacks this attribute
        attend.settings_as_made = _settings(attend)
    return attend


def _is_softmax(attend: Attend) -> bool:
    """True for an `_attend` without further options that has not been changed since."""
    is_own = is_plain(attend, Attend) and is_plain(attend.attn_dropout, nn.Dropout)
    return is_own and getattr(attend, 'settings_as_made', None) == _settings(attend)


def _settings(attend: Attend) -> dict[str, Any]:
    own = {name: value for name, value in vars(attend).items() if not name.startswith('_')}
    irrelevant = ('training', 'dropout', 'flash', 'settings_as_made')
    return {name: value for name, value in own.items() if name not in irrelevant}


def softmax(t: Tensor, dim: int) -> Tensor:
    """Softmax in the precision of `t`, but at least float32."""
    return at_least_float32(t).softmax(dim=dim)
