"""State that a neural memory carries from one call to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from torch.utils._pytree import tree_map

from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights, Weights
from titans_pytorch.utils.checks import checked_entries
from titans_pytorch.utils.saving import allow_loading
from titans_pytorch.utils.shapes import Bool, Float, Int


class Surprises(NamedTuple):
    """How wrong a memory was about each row before storing it, and the step size with which it stored the row.

    A row is a pair of key and value; each token has `num_kv_per_token` rows. Rows are in the order of the tokens.
    """

    losses: Float[Tensor, 'b h rows']
    """Loss of each row at the weights where its gradient is taken, before the row is stored; not weighted by θ."""
    step_sizes: Float[Tensor, 'b h rows']
    """θ of each row, the weight of its loss; 0 for masked tokens."""

    @property
    def num_rows(self) -> int:
        return self.losses.shape[-1]

    def since(self, row: int) -> Surprises:
        """The surprises of rows from index `row` on."""
        return Surprises(self.losses[..., row:], self.step_sizes[..., row:])

    @staticmethod
    def joined(parts: Iterable[Surprises]) -> Surprises:
        """Join the surprises of consecutive parts of a sequence."""
        losses, step_sizes = zip(*parts)
        return Surprises(torch.cat(losses, dim=-1), torch.cat(step_sizes, dim=-1))


LayerSurprises = dict[int, Surprises]
"""Surprises of the memory of each layer that has one. Layers are counted from 1, as in `neural_memory_layers`."""


class PendingSegment(NamedTuple):
    """The open chunk: the tokens after the last complete chunk, and what a later call needs to complete it."""

    tokens: Float[Tensor, 'b n d'] | Float[Tensor, 'v b n d']
    """Store inputs of the open chunk; with different views, two of them (keys, values)."""
    mask: Bool[Tensor, 'b n'] | None = None
    """True for the tokens to store; `None` if all are stored."""
    queries: Float[Tensor, 'b n d'] | None = None
    """Retrieval inputs that the next token's result depends on: for memory networks that mix tokens, those that read
    the same weights; before them, those that a convolution sees."""
    before: Float[Tensor, 'b k-1 d'] | Float[Tensor, 'v b k-1 d'] | None = None
    """Store inputs before the open chunk that a convolution still sees."""

    def simplified(self) -> Tensor | PendingSegment:
        """Only the tokens if nothing else is set."""
        return self.tokens if all(other is None for other in self[1:]) else self


class NeuralMemState(NamedTuple):
    """State of a `NeuralMemory` after a call. Pass it to the next call, which continues as if both were one.

    A state can be detached, moved (`state.to('cuda')`, `state.to(torch.bfloat16)`), saved with `torch.save` and loaded
    with `torch.load(..., weights_only=True)` once this package has been imported.
    """

    seq_index: int
    """Number of tokens in complete chunks so far: the position where `cache_store_segment` begins."""
    weights: TensorDict | None
    """Base weights of the open memory batch, where its gradients are taken, per parameter (bh, …)."""
    cache_store_segment: Tensor | PendingSegment | None
    """Tokens of the incomplete chunk, (b, n, d) or (v, b, n, d); or a `PendingSegment` if there is more to keep."""
    states: tuple[TensorDict, TensorDict] | None
    """Weights after the last complete chunk, per parameter (bh, …), and momentum, per parameter (o, bh, …)."""
    updates: TensorDict | FastWeights | None
    """Weights over time, per parameter (bh, chunks + 1, …): before the call's first chunk, and after each chunk. The
    next memory layer's weight residual uses them; they are not needed to continue. Matrices are formed when asked
    for."""

    @property
    def open_chunk(self) -> PendingSegment | None:
        """`cache_store_segment` with all its parts."""
        pending = self.cache_store_segment
        return pending if pending is None or isinstance(pending, PendingSegment) else PendingSegment(pending)

    @property
    def num_tokens(self) -> int:
        """Number of tokens read so far, including those of the open chunk."""
        pending = self.open_chunk
        return self.seq_index if pending is None else self.seq_index + pending.tokens.shape[-2]

    @property
    def batch_size(self) -> int | None:
        """Number of sequences; `None` for a state without an open chunk."""
        pending = self.open_chunk
        tokens = None if pending is None else pending.tokens
        return tokens.shape[-3] if isinstance(tokens, Tensor) and tokens.ndim > 2 else None

    def detach(self) -> NeuralMemState:
        """The state without its graph, for truncated backpropagation through time."""
        return _map_tensors(lambda t: t.detach(), self)

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> NeuralMemState:
        """The state on another device, or with floating-point tensors in another dtype, or both."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return _map_tensors(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None), self)

    def __deepcopy__(self, memo: Any) -> NeuralMemState:
        """A detached copy that shares no memory with this state."""
        return _map_tensors(lambda t: t.detach().clone(), self)

    def select(self, entries: Int[Tensor, ' e'] | list[int]) -> NeuralMemState:
        """The state of these batch entries, in this order, possibly repeated, but without `updates`.

        Raises:
            ValueError: for entries that are not in the batch, and for a state with weights but
                `cache_store_segment=None`: without that tensor, even an empty one, the batch size is unknown.
        """
        pending = self.open_chunk
        if pending is None:
            if self.weights is None and self.states is None:
                return self  # it does not belong to a batch yet
            raise ValueError('cache_store_segment of the state must hold the tokens of its open chunk, got None')
        tokens, mask, queries, before = pending
        batch = tokens.shape[-3]
        chosen = checked_entries(entries, batch).to(tokens.device)

        def of_batch(t: Tensor, axis: int) -> Tensor:
            return t.index_select(axis, chosen)

        def of_heads(weights: TensorDict, axis: int) -> TensorDict:
            def pick(w: Tensor) -> Tensor:
                return of_batch(w.unflatten(axis, (batch, -1)), axis).flatten(axis, axis + 1)

            return TensorDict({name: pick(w) for name, w in weights.to_dict().items()})

        pending = PendingSegment(
            of_batch(tokens, -3),
            None if mask is None else of_batch(mask, 0),
            None if queries is None else of_batch(queries, 0),
            None if before is None else of_batch(before, -3),
        )
        weights = None if self.weights is None else of_heads(self.weights, 0)
        states = None
        if self.states is not None:
            last, momentum = self.states
            states = (of_heads(last, 0), of_heads(momentum, 1))
        return NeuralMemState(self.seq_index, weights, pending.simplified(), states, None)

    def __reduce__(self) -> tuple[Any, ...]:
        # save plain dictionaries, so that the file loads with `weights_only=True` and does not depend on TensorDict
        plain = tree_map(
            lambda t: t.to_dict() if isinstance(t, (TensorDict, FastWeights)) else t,
            tuple(self),
            is_leaf=lambda t: isinstance(t, (TensorDict, FastWeights)),
        )
        return _rebuild_state, plain


def _map_tensors(fn: Any, state: NeuralMemState) -> NeuralMemState:
    return NeuralMemState(*tree_map(lambda t: fn(t) if isinstance(t, Tensor) else t, tuple(state)))


def _rebuild_state(seq_index: int, weights: Any, pending: Any, states: Any, updates: Any) -> NeuralMemState:
    states = None if states is None else tuple(TensorDict(s) for s in states)
    return NeuralMemState(
        seq_index,
        None if weights is None else TensorDict(weights),
        pending,
        states,
        None if updates is None else TensorDict(updates),
    )


allow_loading(_rebuild_state, PendingSegment, formerly='memory_state')


class OpenState(NamedTuple):
    """State of a memory within a call, complete: what a first call leaves out is filled in."""

    seq_index: int
    weights: MemoryWeights
    pending: PendingSegment
    at_rest: bool = False
    """True if momentum is known to be zero, as at the start of a sequence."""

    def to_state(self, updates: FastWeights) -> NeuralMemState:
        """The state to return, with `updates` as the weights over time."""
        return NeuralMemState(
            seq_index=self.seq_index,
            weights=TensorDict(self.weights.base),
            cache_store_segment=self.pending.simplified(),
            states=(TensorDict(self.weights.newest), TensorDict(self.weights.momentum)),
            updates=updates if updates.blocks else TensorDict(updates.dense),
        )


class BufferSizes(NamedTuple):
    """Lengths of the buffers of `MemoryBuffers`, in tokens."""

    chunk: int
    conv_context: int
    """Number of tokens before the current one that a convolution sees."""
    group: int
    """Number of tokens that read the same weights, for memory networks that mix tokens; otherwise 0."""

    def queries(self, num_pending: int) -> slice:
        """Where in the buffer the retrieval inputs are that the next token depends on; of a full group, only those that
        a convolution still sees."""
        in_group = (num_pending + 1) % self.chunk if self.group else 0
        start = 0 if in_group else self.group
        return slice(start, start + self.conv_context + in_group)


class MemoryBuffers(NamedTuple):
    """State of a memory in buffers of constant size, which decoding steps write in place."""

    weights: MemoryWeights
    pending: Float[Tensor, 'b c d'] | Float[Tensor, 'v b c d']
    """Store inputs of the open chunk, without its last token, which is stored on arrival; before them, those that a
    convolution sees."""
    queries: Float[Tensor, 'b c d'] | None
    """For memory networks that mix tokens, retrieval inputs that read the same weights; before them, those that a
    convolution sees. `None` if the next token depends on no earlier ones."""
    surprises: Surprises | None = None
    """Surprises of the last chunk stored, if requested."""

    @classmethod
    def of(cls, state: OpenState, sizes: BufferSizes) -> MemoryBuffers:
        """Buffers with the contents of `state`, which they do not alias.

        Raises:
            ValueError: for a state with a `store_mask` in its open chunk.
        """
        if state.pending.mask is not None:
            raise ValueError('state has an open chunk with a store_mask, which decoding token by token cannot complete')

        def in_buffer(rows: Tensor, length: int, start: int = 0) -> Tensor:
            return F.pad(rows, (0, 0, start, length - start - rows.shape[-2])).clone()

        tokens, _, queries, before = state.pending
        context = sizes.conv_context
        if before is None:
            before = tokens.new_zeros(*tokens.shape[:-2], context, tokens.shape[-1])
        if queries is None:
            queries = tokens.new_zeros(tokens.shape[-3], context, tokens.shape[-1])
        weights = MemoryWeights(*map(_cloned, state.weights))
        pending = in_buffer(torch.cat((before, tokens), dim=-2), context + sizes.chunk - 1)
        length, start = context + sizes.group, sizes.queries(tokens.shape[-2]).start
        return cls(weights, pending, in_buffer(queries, length, start) if length else None)

    def to_state(self, position: int, sizes: BufferSizes) -> NeuralMemState:
        """The state after `position` tokens, which does not alias the buffers."""
        num_pending = position % sizes.chunk
        queries = before = None
        if self.queries is not None:
            queries = self.queries[:, sizes.queries(num_pending)].clone()
        context = sizes.conv_context
        if context:
            before = self.pending[..., :context, :].clone()
        tokens = self.pending[..., context : context + num_pending, :].clone()
        base, newest, momentum = (TensorDict(_cloned(weights)) for weights in self.weights)
        pending = PendingSegment(tokens, None, queries, before)
        return NeuralMemState(position - num_pending, base, pending.simplified(), (newest, momentum), None)


def copy_weights(pairs: Iterable[tuple[MemoryBuffers, MemoryBuffers]]) -> None:
    """Copy the weights of each pair's second element into the buffers of its first, in a single launch per dtype."""
    tensors = [
        (buffer[name], w)
        for target, source in pairs
        for buffer, weights in zip(target.weights, source.weights)
        for name, w in weights.items()
        if w is not buffer[name]
    ]
    for dtypes in dict.fromkeys((buffer.dtype, w.dtype) for buffer, w in tensors):
        same = [pair for pair in tensors if (pair[0].dtype, pair[1].dtype) == dtypes]
        torch._foreach_copy_([buffer for buffer, _ in same], [w for _, w in same])


def _cloned(weights: Weights) -> Weights:
    return {name: w.clone() for name, w in weights.items()}


def mem_state_detach(state: NeuralMemState) -> NeuralMemState:
    """`state.detach()`, under the reference's name."""
    if not isinstance(state, NeuralMemState):
        raise TypeError(f'state must be a NeuralMemState, got {type(state).__name__}')
    return state.detach()
