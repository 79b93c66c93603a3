"""One layer of a model: memory, attention and feedforward around the residual stream.

A block composes its parts once, in `update_stream`, which serves whole sequences, pieces of them, and decoding one
position at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from titans_pytorch.attention.rotary import KeyValues
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.generation.decodable import StepKind
from titans_pytorch.memory.state import MemoryBuffers, NeuralMemState, Surprises
from titans_pytorch.models.residual_streams import (
    AddResidual,
    FoldedConnection,
    Streams,
    connect,
    connect_token,
    folded,
)
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.ops.token_attention import Position
from titans_pytorch.utils.parameters import Resettable
from titans_pytorch.utils.shapes import Int


class Carried(NamedTuple):
    """Results of earlier blocks that later ones read, besides the residual stream.

    A block returns a new one and modifies nothing, so that it can be recomputed (activation checkpointing).
    """

    views: tuple[Tensor, ...] = ()
    """Inputs and outputs of every attention and feedforward so far, from which a memory may select its views."""
    values: Tensor | None = None
    """Values of the first attention."""
    memory_weights: Mapping[str, Tensor] | None = None
    """Weights over time of the last memory."""
    surprises: tuple[Surprises, ...] = ()
    """Surprises of every memory so far, if requested, for the caller of the model."""


class LayerState(NamedTuple):
    """The state of a block between calls."""

    key_values: KeyValues | None = None
    memory: NeuralMemState | None = None


class LayerBuffers(NamedTuple):
    """The state of a block as buffers of constant size for steps, and the folded weights of its connections."""

    key_values: KeyValues | None
    memory: MemoryBuffers | None
    connections: list[FoldedConnection | None]


class StepPosition(NamedTuple):
    """The position of a step, shared by all layers."""

    position: Position
    chunk_offset: Int[Tensor, ' 1']
    """Offset of the position in the memories' chunk."""
    kind: StepKind


class Parts(NamedTuple):
    """The parts of a block as functions, bound to a sequence or to a single position."""

    connections: Sequence[Callable[[Streams], tuple[Tensor, AddResidual]]]
    """For each branch a function from the residual stream to the branch's input and a function that adds its output."""
    attend: Callable[..., Tensor]
    """Attention of (seq, `output_gating=` or `context=`)."""
    store_and_retrieve: Callable[[Tensor], Tensor]
    """Store a sequence (or its three views) in the memory and retrieve for each of its tokens."""
    retrieve: Callable[[Tensor], Tensor]
    """Retrieve from the weights at the start of the memory batch, storing nothing."""
    earlier_views: tuple[Tensor, ...]
    """`Carried.views` of the blocks before."""
    add_views: Callable[..., None]
    """Add tensors to the views of the blocks after."""
    position: int | None
    """First position of the sequence; `None` for a single position."""


class Block(Resettable):
    """One layer, with a `memory`, an `attention` (either may be `None`), a `feedforward` and `connections`."""

    memory: NeuralMemory | None
    attention: SegmentedAttention | None
    feedforward: Module

    shares_views = False
    """True if a memory of the model selects views among the results of earlier layers."""
    shares_memory_weights = False
    """True if a memory of the model takes the weights of the memory before it."""

    @property
    def connections(self) -> Sequence[Module | None]:
        """Connections to the residual stream, one for each branch."""
        raise NotImplementedError

    def update_stream(self, x: Streams, parts: Parts) -> Streams:
        """The residual stream after this block, from the stream before it.

        The stream is read and written through `parts.connections` only, which may leave the output of the last branch
        pending, to be added by the next one; `complete` adds it.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Streams,
        carried: Carried,
        state: LayerState,
        position: int,
        store: bool = True,
        return_state: bool = True,
        return_surprises: bool = False,
        **attention_kwargs: Any,
    ) -> tuple[Streams, Carried, LayerState]:
        """Process a sequence that begins at `position`.

        Args:
            store: false to read the memory without writing it.
            return_state: false to return an empty state, which frees keys, values and weights over time.
            return_surprises: add the memory's surprises to the results that are carried.
            attention_kwargs: further arguments of the attention.
        """
        views, values, memory_weights, surprises = carried
        key_values, memory_state = state
        end = position

        def attend(seq: Tensor, **inputs: Tensor | None) -> Tensor:
            nonlocal key_values, end, values
            assert self.attention is not None
            if self.attention.to_learned_v_mix is not None:
                inputs['value_residual'] = values
            out, (own_values, key_values) = self.attention(
                seq, cache=key_values, position=end, **inputs, **attention_kwargs
            )
            end += seq.shape[1]
            values = own_values if values is None else values
            return out

        def store_and_retrieve(seq: Tensor) -> Tensor:
            nonlocal memory_state, memory_weights
            assert self.memory is not None
            accepts_weights = self.memory.to_learned_weight_residual_mix is not None
            retrieved, memory_state, *new = self.memory(
                seq,
                state=memory_state,
                prev_weights=memory_weights if accepts_weights else None,
                return_surprises=return_surprises,
                store=store,
            )
            own_surprises.extend(new)
            memory_weights = memory_state.updates if self.shares_memory_weights else None
            return retrieved

        def retrieve(seq: Tensor) -> Tensor:
            assert self.memory is not None
            return self.memory.recall(seq, memory_state)

        own_views: list[Tensor] = []
        own_surprises: list[Surprises] = []
        parts = Parts(
            connections=[partial(connect, connection) for connection in self.connections],  # type: ignore[arg-type]
            attend=attend,
            store_and_retrieve=store_and_retrieve,
            retrieve=retrieve,
            earlier_views=views,
            add_views=lambda *tensors: own_views.extend(tensors),
            position=position,
        )
        x = self.update_stream(x, parts)
        if own_surprises:
            surprises = (*surprises, Surprises.joined(own_surprises))
        carried = Carried((*views, *own_views), values, memory_weights, surprises)
        return x, carried, self._kept(key_values, memory_state, end) if return_state else LayerState()

    def _kept(self, key_values: KeyValues | None, memory: NeuralMemState | None, position: int) -> LayerState:
        """The state that tokens from `position` on need: no earlier windows, and no weights over time."""
        if self.attention is not None and key_values is not None:
            key_values = self.attention.trimmed(key_values, position)
        return LayerState(key_values=key_values, memory=None if memory is None else memory._replace(updates=None))

    def step(
        self, x: Streams, carried: Carried, buffers: LayerBuffers, here: StepPosition, attention_layer: int
    ) -> tuple[Streams, Carried, MemoryBuffers | None]:
        """`forward` for one position, which it writes into the buffers; the streams have an axis of their own in `x`.

        Args:
            attention_layer: number of attentions in earlier blocks.

        Returns:
            the streams, the results that later blocks read, and the memory's state.
        """
        views, values, memory_weights, _ = carried
        memory_state = buffers.memory

        def attend(seq: Tensor, **inputs: Any) -> Tensor:
            nonlocal values
            assert self.attention is not None and buffers.key_values is not None
            if self.attention.to_learned_v_mix is not None:
                inputs['value_residual'] = values
            out, own_values = self.attention.step(seq, buffers.key_values, here.position, attention_layer, **inputs)
            values = own_values if values is None else values
            return out

        def store_and_retrieve(seq: Tensor) -> Tensor:
            nonlocal memory_state, memory_weights
            assert self.memory is not None and memory_state is not None
            before = memory_state.weights.newest
            accepts_weights = self.memory.to_learned_weight_residual_mix is not None
            retrieved, memory_state = self.memory.step(
                seq,
                memory_state,
                here.chunk_offset,
                here.kind.ends_chunk,
                here.kind.ends_batch,
                memory_weights if accepts_weights else None,  # type: ignore[arg-type]
            )
            memory_weights = before
            return retrieved

        def retrieve(seq: Tensor) -> Tensor:
            assert self.memory is not None
            return self.memory.recall(seq, buffers.memory)

        own_views: list[Tensor] = []
        pairs = zip(self.connections, buffers.connections)
        parts = Parts(
            connections=[partial(connect_token, own, weights) for own, weights in pairs],  # type: ignore[arg-type]
            attend=attend,
            store_and_retrieve=store_and_retrieve,
            retrieve=retrieve,
            earlier_views=views,
            add_views=lambda *tensors: own_views.extend(tensors),
            position=None,
        )
        x = self.update_stream(x, parts)
        return x, Carried((*views, *own_views), values, memory_weights), memory_state

    def to_buffers(self, state: LayerState, position: int, with_surprises: bool = False) -> LayerBuffers:
        """`state` after `position` positions as buffers for steps, valid until parameters change."""
        key_values, memory = state
        return LayerBuffers(
            key_values=None if self.attention is None else self.attention.to_buffers(key_values, position),  # type: ignore[arg-type]
            memory=None if self.memory is None else self.memory.to_buffers(memory, with_surprises),  # type: ignore[arg-type]
            connections=[folded(connection) for connection in self.connections],
        )

    def from_buffers(self, buffers: LayerBuffers, position: int) -> LayerState:
        """Inverse of `to_buffers`; the result does not alias the buffers."""
        key_values, memory = buffers.key_values, buffers.memory
        return LayerState(
            key_values=None if self.attention is None else self.attention.from_buffers(key_values, position),  # type: ignore[arg-type]
            memory=None if self.memory is None else memory.to_state(position, self.memory.buffer_sizes),  # type: ignore[union-attr]
        )
