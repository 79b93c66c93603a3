"""What a neural memory carries from one call to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from torch.utils._pytree import tree_map

from titans_pytorch.memory.fast_weights import FastWeights, Weights
from titans_pytorch.utils.checks import checked_entries
from titans_pytorch.utils.saving import allow_loading
from titans_pytorch.utils.shapes import Bool, Float, Int


class PendingSegment(NamedTuple):
    """The tokens after the last complete chunk, with what else is needed to complete it in a later call."""

    tokens: Float[Tensor, 'b n d'] | Float[Tensor, 'v b n d']
    """Store inputs of the open chunk; two views (keys, values) where the memory receives different views."""
    mask: Bool[Tensor, 'b n'] | None = None
    """Which of them to store; `None`: all."""
    queries: Float[Tensor, 'b n d'] | None = None
    """Retrieval inputs before the next token that its result depends on: those that read the same weights, for memory
    models that mix tokens, and before them those that a convolution reaches."""
    before: Float[Tensor, 'b k-1 d'] | Float[Tensor, 'v b k-1 d'] | None = None
    """Store inputs before the open chunk that a convolution reaches."""

    def simplified(self) -> Tensor | PendingSegment:
        """The bare tokens where they are all there is."""
        return self.tokens if all(other is None for other in self[1:]) else self


class NeuralMemState(NamedTuple):
    """State of a `NeuralMemory` after a call; hand it to the next call to continue as if the two were one.

    It can be detached, moved (`state.to('cuda')`, `state.to(torch.bfloat16)`), saved with `torch.save` and loaded
    with `torch.load(..., weights_only=True)` once this package has been imported.
    """

    seq_index: int
    """Tokens in complete chunks so far: the position at which `cache_store_segment` begins."""
    weights: TensorDict | None
    """Base weights of the open memory batch, per parameter (bh, …): where its gradients are taken."""
    cache_store_segment: Tensor | PendingSegment | None
    """Tokens of the chunk that is not complete yet, (b, n, d) or (v, b, n, d); with more, a `PendingSegment`."""
    states: tuple[TensorDict, TensorDict] | None
    """Weights after the last complete chunk, per parameter (bh, …), and momentum, per parameter (o, bh, …)."""
    updates: TensorDict | FastWeights | None
    """Weights over the call, per parameter (bh, chunks + 1, …): before its first chunk, and after each one.
    The next memory layer's weight residual; not needed to continue. Materialised when its tensors are asked for."""

    @property
    def num_tokens(self) -> int:
        """Tokens stored so far, those of the open chunk included."""
        pending = self.cache_store_segment
        if pending is None:
            return self.seq_index
        return self.seq_index + (pending.tokens if isinstance(pending, PendingSegment) else pending).shape[-2]

    @property
    def batch_size(self) -> int | None:
        """Sequences that it is of; `None` for one that holds no open chunk yet."""
        pending = self.cache_store_segment
        tokens = pending.tokens if isinstance(pending, PendingSegment) else pending
        return tokens.shape[-3] if isinstance(tokens, Tensor) and tokens.ndim > 2 else None

    def detach(self) -> NeuralMemState:
        """The same state, cut from the graph that made it: where truncated backpropagation through time truncates."""
        return _map_tensors(lambda t: t.detach(), self)

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> NeuralMemState:
        """The state on another device, in another dtype (of its floating-point tensors), or both."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return _map_tensors(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None), self)

    def __deepcopy__(self, memo: Any) -> NeuralMemState:
        """A copy that shares nothing with this state, cut from its graph as by `detach`."""
        return _map_tensors(lambda t: t.detach().clone(), self)

    def select(self, entries: Int[Tensor, ' e'] | list[int]) -> NeuralMemState:
        """The state of these batch entries, in this order; an entry may come several times. Without `updates`."""
        pending = self.cache_store_segment
        if pending is None or self.weights is None or self.states is None:
            return self  # of no entry in particular yet
        tokens = pending.tokens if isinstance(pending, PendingSegment) else pending
        batch = tokens.shape[-3]
        chosen = checked_entries(entries, batch).to(tokens.device)

        def of_batch(t: Tensor, axis: int) -> Tensor:
            return t.index_select(axis, chosen)

        def of_heads(weights: TensorDict, axis: int) -> TensorDict:
            def pick(w: Tensor) -> Tensor:
                return of_batch(w.unflatten(axis, (batch, -1)), axis).flatten(axis, axis + 1)

            return TensorDict({name: pick(w) for name, w in weights.to_dict().items()})

        if isinstance(pending, PendingSegment):
            _, mask, queries, before = pending
            pending = PendingSegment(
                of_batch(tokens, -3),
                None if mask is None else of_batch(mask, 0),
                None if queries is None else of_batch(queries, 0),
                None if before is None else of_batch(before, -3),
            )
        else:
            pending = of_batch(pending, -3)
        last, momentum = self.states
        states = (of_heads(last, 0), of_heads(momentum, 1))
        return NeuralMemState(self.seq_index, of_heads(self.weights, 0), pending, states, None)

    def __reduce__(self) -> tuple[Any, ...]:
        # plain dictionaries in the file: it then loads with `weights_only=True` and does not depend on TensorDict
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
    """A state at work: everything that a first call leaves out is filled in."""

    seq_index: int
    base: Weights
    last: Weights
    momentum: Weights
    pending: PendingSegment

    def closed(self, updates: FastWeights) -> NeuralMemState:
        """The state to hand out, with the weights over the call."""
        return NeuralMemState(
            seq_index=self.seq_index,
            weights=TensorDict(self.base),
            cache_store_segment=self.pending.simplified(),
            states=(TensorDict(self.last), TensorDict(self.momentum)),
            updates=TensorDict(updates.dense) if not updates.runs else updates,
        )


class StepSizes(NamedTuple):
    """How long the buffers of a `StepState` are."""

    chunk: int
    reach: int
    """Tokens before a token that a convolution reaches."""
    group: int
    """Tokens that read the same weights, for memory models that mix them; else 0."""

    def queries(self, waiting: int) -> slice:
        """Where a `StepState` holds the retrieval inputs that the next token depends on: of a group that is full, what
        a convolution still reaches."""
        in_group = (waiting + 1) % self.chunk if self.group else 0
        start = 0 if in_group else self.group
        return slice(start, start + self.reach + in_group)


class StepState(NamedTuple):
    """A state as buffers of constant size, which steps of one token write in place."""

    base: Weights
    last: Weights
    momentum: Weights
    pending: Float[Tensor, 'b c d'] | Float[Tensor, 'v b c d']
    """Store inputs of the open chunk, but for its last token, which is stored as it comes; before them, those that a
    convolution reaches."""
    queries: Float[Tensor, 'b c d'] | None
    """Retrieval inputs that read the same weights, for memory models that mix tokens; and before them likewise."""

    @classmethod
    def of(cls, state: OpenState, sizes: StepSizes) -> StepState:
        if state.pending.mask is not None:
            raise ValueError('a state with a store_mask cannot be gone on from token by token: its chunk is open')

        def in_buffer(rows: Tensor, length: int, start: int = 0) -> Tensor:
            return F.pad(rows, (0, 0, start, length - start - rows.shape[-2])).clone()

        tokens, _, queries, before = state.pending
        if before is None:
            before = tokens.new_zeros(*tokens.shape[:-2], sizes.reach, tokens.shape[-1])
        if queries is None:
            queries = tokens.new_zeros(tokens.shape[-3], sizes.reach, tokens.shape[-1])
        place = sizes.queries(tokens.shape[-2])
        base, last, momentum = map(_cloned, (state.base, state.last, state.momentum))
        pending = in_buffer(torch.cat((before, tokens), dim=-2), sizes.reach + sizes.chunk - 1)
        rows = in_buffer(queries, sizes.reach + sizes.group, place.start) if sizes.reach + sizes.group else None
        return cls(base, last, momentum, pending, rows)

    def take_over(self, after: StepState) -> None:
        """Write the weights and momentum of `after` into these buffers."""
        take_over([(self, after)])

    def closed(self, position: int, sizes: StepSizes) -> NeuralMemState:
        """The state after `position` tokens, to hand out: it shares nothing with the buffers."""
        waiting = position % sizes.chunk
        queries = before = None
        if self.queries is not None:
            queries = self.queries[:, sizes.queries(waiting)].clone()
        if sizes.reach:
            before = self.pending[..., : sizes.reach, :].clone()
        tokens = self.pending[..., sizes.reach : sizes.reach + waiting, :].clone()
        base, last, momentum = (TensorDict(_cloned(weights)) for weights in self[:3])
        pending = PendingSegment(tokens, None, queries, before)
        return NeuralMemState(position - waiting, base, pending.simplified(), (last, momentum), None)


def take_over(states: Iterable[tuple[StepState, StepState]]) -> None:
    """Write weights and momentum of each second into the buffers of the first: of all at once, which is one launch."""
    pairs = [
        (buffers[name], w)
        for to, after in states
        for buffers, new in zip(to[:3], after[:3])
        for name, w in new.items()
        if w is not buffers[name]
    ]
    for dtypes in dict.fromkeys((buffer.dtype, w.dtype) for buffer, w in pairs):
        of_these = [pair for pair in pairs if (pair[0].dtype, pair[1].dtype) == dtypes]
        torch._foreach_copy_([buffer for buffer, _ in of_these], [w for _, w in of_these])


def _cloned(weights: Weights) -> Weights:
    return {name: w.clone() for name, w in weights.items()}


def mem_state_detach(state: NeuralMemState) -> NeuralMemState:
    """`state.detach()`, under the reference's name."""
    if not isinstance(state, NeuralMemState):
        raise TypeError(f'state must be a NeuralMemState, got {type(state).__name__}')
    return state.detach()
