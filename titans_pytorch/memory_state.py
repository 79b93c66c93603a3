"""What a neural memory carries from one call to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._pytree import tree_map

from titans_pytorch.fast_weights import FastWeights, Weights
from titans_pytorch.shapes import Bool, Float


class PendingSegment(NamedTuple):
    """The tokens after the last complete chunk, with what else is needed to complete it in a later call."""

    tokens: Float[Tensor, 'b n d'] | Float[Tensor, 'v b n d']
    """Store inputs of the open chunk; two views (keys, values) where the memory receives different views."""
    mask: Bool[Tensor, 'b n'] | None = None
    """Which of them to store; `None`: all."""
    queries: Float[Tensor, 'b n d'] | None = None
    """Retrieval inputs that read the same weights as the next token, for memory models that mix tokens."""

    def simplified(self) -> Tensor | PendingSegment:
        """The bare tokens where they are all there is."""
        return self.tokens if self.mask is None and self.queries is None else self


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


torch.serialization.add_safe_globals([_rebuild_state, PendingSegment])


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


class StepState(NamedTuple):
    """A state as buffers of constant size, which steps of one token write in place."""

    base: Weights
    last: Weights
    momentum: Weights
    pending: Float[Tensor, 'b c d'] | Float[Tensor, 'v b c d']
    """Store inputs of the open chunk, but for its last token, which is stored as it comes."""
    queries: Float[Tensor, 'b c d'] | None
    """Retrieval inputs that read the same weights, for memory models that mix tokens."""

    @classmethod
    def of(cls, state: OpenState, chunk_size: int, carries_queries: bool) -> StepState:
        if state.pending.mask is not None:
            raise ValueError('a state with a store_mask cannot be gone on from token by token: its chunk is open')

        def in_buffer(rows: Tensor, length: int) -> Tensor:
            buffer = rows.new_zeros(*rows.shape[:-2], length, rows.shape[-1])
            buffer[..., : rows.shape[-2], :] = rows
            return buffer

        tokens, _, queries = state.pending
        if queries is None:
            queries = tokens.new_zeros(tokens.shape[-3], 0, tokens.shape[-1])
        base, last, momentum = map(_cloned, (state.base, state.last, state.momentum))
        rows = in_buffer(queries, chunk_size) if carries_queries else None
        return cls(base, last, momentum, in_buffer(tokens, chunk_size - 1), rows)

    def take_over(self, after: StepState) -> None:
        """Write the weights and momentum of `after` into these buffers."""
        for buffers, new in zip(self[:3], after[:3]):
            for name, w in new.items():
                if w is not buffers[name]:
                    buffers[name].copy_(w)

    def closed(self, position: int) -> NeuralMemState:
        """The state after `position` tokens, to hand out: it shares nothing with the buffers."""
        chunk_size = self.pending.shape[-2] + 1
        seq_index, waiting = position // chunk_size * chunk_size, position % chunk_size
        queries = None if self.queries is None else self.queries[:, : (waiting + 1) % chunk_size].clone()
        base, last, momentum = (TensorDict(_cloned(weights)) for weights in self[:3])
        pending = PendingSegment(self.pending[..., :waiting, :].clone(), None, queries)
        return NeuralMemState(seq_index, base, pending.simplified(), (last, momentum), None)


def _cloned(weights: Weights) -> Weights:
    return {name: w.clone() for name, w in weights.items()}


def mem_state_detach(state: NeuralMemState) -> NeuralMemState:
    """`state.detach()`, under the reference's name."""
    if not isinstance(state, NeuralMemState):
        raise TypeError(f'state must be a NeuralMemState, got {type(state).__name__}')
    return state.detach()
