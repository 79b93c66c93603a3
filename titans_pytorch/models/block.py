"""One layer of a model: memory, attention and feedforward around the residual stream.

A block composes its parts in one place, `update_stream`, which serves whole sequences, pieces of them, and decoding one
position at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from titans_pytorch.attention.rotary import KeyValues
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.generation.decodable import StepKind
from titans_pytorch.memory.packing import PackedDocuments
from titans_pytorch.memory.state import MemoryBuffers, NeuralMemState, Surprises
from titans_pytorch.models.feedforward import feedforward_of_token
from titans_pytorch.models.residual_streams import (
    AddResidual,
    FoldedConnection,
    Streams,
    connect,
    connect_token,
    folded,
)
from titans_pytorch.models.views import selected_views, selected_views_of_token
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.ops.token_attention import Position
from titans_pytorch.utils.functional import constant, replaced
from titans_pytorch.utils.parameters import Resettable
from titans_pytorch.utils.shapes import Float, Int


class Carried(NamedTuple):
    """Results of earlier blocks that later blocks read in addition to the residual stream.

    A block returns a new instance and modifies nothing, so that it can be recomputed (activation checkpointing).
    """

    views: tuple[Tensor, ...] = ()
    """Inputs and outputs of every attention and feedforward so far, from which a memory may select its views."""
    values: Tensor | None = None
    """Values of the first attention."""
    memory_weights: Mapping[str, Tensor] | None = None
    """Weights over time of the last memory."""
    surprises: tuple[Surprises, ...] = ()
    """Surprises of every memory so far, if requested; the model returns them to its caller."""


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


class Block(Resettable):
    """One layer, with a `memory`, an `attention` (either may be `None`), a `feedforward` and `connections`."""

    memory: NeuralMemory | None
    attention: SegmentedAttention | None
    feedforward: Module

    shares_views = False
    """True if a memory of the model selects its views among results of earlier layers."""
    shares_memory_weights = False
    """True if a memory of the model takes the weights of the previous memory."""

    @property
    def connections(self) -> Sequence[Module | None]:
        """Connections to the residual stream, one for each branch."""
        raise NotImplementedError

    def update_stream(self, x: Streams, parts: Parts) -> Streams:
        """Compute the residual stream after this block from the stream before it.

        The stream is read and written only through `parts.connections`. These may leave the output of the last branch
        pending, for the next one to add; `complete` adds it.
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
        documents: PackedDocuments | None = None,
        **attention_kwargs: Any,
    ) -> tuple[Streams, Carried, LayerState]:
        """Process a sequence that begins at `position`.

        Args:
            store: false to read the memory without writing to it.
            return_state: false to return an empty state, which frees keys, values and weights over time.
            return_surprises: add the memory's surprises to the carried results.
            documents: several documents packed into each row, which are read separately.
            attention_kwargs: further arguments of the attention.
        """
        memory_kwargs: dict[str, Any] = {'store': store, 'return_surprises': return_surprises}
        if documents is not None:
            memory_kwargs['documents'] = attention_kwargs['documents'] = documents
        parts = SequenceParts(self, carried, state, position, memory_kwargs, attention_kwargs)
        x = self.update_stream(x, parts)
        kept = self._kept(parts.key_values, parts.memory_state, parts.end) if return_state else LayerState()
        return x, parts.carried, kept

    def _kept(self, key_values: KeyValues | None, memory: NeuralMemState | None, position: int) -> LayerState:
        """The state that tokens from `position` on need, without earlier windows and without weights over time."""
        if self.attention is not None and key_values is not None:
            key_values = self.attention.trimmed(key_values, position)
        return LayerState(key_values=key_values, memory=None if memory is None else replaced(memory, updates=None))

    def step(
        self, x: Streams, carried: Carried, buffers: LayerBuffers, here: StepPosition, attention_layer: int
    ) -> tuple[Streams, Carried, MemoryBuffers | None]:
        """`forward` for one position, which writes into the buffers; in `x`, the streams have an axis of their own.

        Args:
            attention_layer: number of attentions in earlier blocks.

        Returns:
            the streams, the results that later blocks read, and the memory's state.
        """
        parts = StepParts(self, carried, buffers, here, attention_layer)
        return self.update_stream(x, parts), parts.carried, parts.memory_state

    def to_buffers(self, state: LayerState, position: int, with_surprises: bool = False) -> LayerBuffers:
        """`state`, after `position` positions, as buffers for steps, which are valid until parameters change."""
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


class Parts:
    """The parts of a block, bound to its input: a sequence, or a single position.

    Args:
        connections: for each branch, a function from the residual stream to the branch's input and to a function that
            adds the branch's output.
        carried: results of earlier blocks.
    """

    def __init__(
        self, block: Block, connections: Iterable[Callable[[Streams], tuple[Tensor, AddResidual]]], carried: Carried
    ):
        self.connections = [*connections]
        self._attention, self._memory, self._feedforward = block.attention, block.memory, block.feedforward
        self._carried = carried
        self._own_views: tuple[Tensor, ...] = ()
        self._own_surprises: list[Surprises] = []

    @property
    def carried(self) -> Carried:
        """Results of the blocks so far, this one included."""
        carried = replaced(self._carried, views=(*self._carried.views, *self._own_views))
        if not self._own_surprises:
            return carried
        return replaced(carried, surprises=(*carried.surprises, Surprises.joined(self._own_surprises)))

    def select_views(self, selector: Module, own: Tensor) -> Tensor:
        """Select the views of a memory, (3, b, n, d), from its own input and the `Carried.views` of earlier blocks."""
        return self._select(selector, own, torch.stack((own, *self._carried.views), dim=2))

    def add_views(self, *views: Tensor) -> None:
        """Add tensors to the views that later blocks select from."""
        self._own_views = (*self._own_views, *views)

    def attend(self, seq: Tensor, **inputs: Tensor | None) -> Tensor:
        """Attend over a sequence; `inputs` are `output_gating` or `context`."""
        assert self._attention is not None
        if self._attention.to_learned_v_mix is not None:
            inputs['value_residual'] = self._carried.values
        out, values = self._attend(self._attention, seq, inputs)
        if self._carried.values is None:
            self._carried = replaced(self._carried, values=values)
        return out

    def attend_without_gradient_of_context(self, seq: Tensor, context: Tensor) -> Tensor | None:
        """What the next call of `attend` will return, without gradients through any context; `None` if there are no
        gradients at all."""
        raise NotImplementedError

    def segments(self, seq: Float[Tensor, 'b n d'], length: int) -> Sequence[Float[Tensor, 'b _n d']]:
        """Split `seq` wherever attention begins a segment of this length, or the memory a memory batch of this length,
        from which on retrieval reads other weights."""
        raise NotImplementedError

    def store_and_retrieve(self, seq: Tensor) -> Tensor:
        """Store a sequence (or its three views) in the memory and retrieve for each of its tokens."""
        assert self._memory is not None
        accepts_weights = self._memory.to_learned_weight_residual_mix is not None
        previous = self._carried.memory_weights if accepts_weights else None
        retrieved, weights = self._store_and_retrieve(self._memory, seq, previous)
        self._carried = replaced(self._carried, memory_weights=weights)
        return retrieved

    def retrieve(self, seq: Tensor) -> Tensor:
        """Retrieve from the weights at the start of the memory batch, storing nothing."""
        assert self._memory is not None
        return self._memory.recall(seq, self.memory_state)

    def feed_forward(self, seq: Tensor) -> Tensor:
        """The feedforward's output."""
        raise NotImplementedError

    memory_state: Any

    def _select(self, selector: Module, own: Tensor, choices: Tensor) -> Tensor:
        """Mixtures of `choices`, (b, n, c, d)."""
        raise NotImplementedError

    def _attend(self, attention: SegmentedAttention, seq: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The output of attention, and the values before any residual."""
        raise NotImplementedError

    def _store_and_retrieve(
        self, memory: NeuralMemory, seq: Tensor, previous: Any
    ) -> tuple[Tensor, Mapping[str, Tensor] | None]:
        """Retrieved values, and the weights that the next memory may take; `previous` are from the memory before."""
        raise NotImplementedError


class SequenceParts(Parts):
    """The parts of a block, bound to a sequence that begins at `position`, and to the state before it."""

    def __init__(
        self,
        block: Block,
        carried: Carried,
        state: LayerState,
        position: int,
        memory_kwargs: dict[str, Any],
        attention_kwargs: dict[str, Any],
    ):
        super().__init__(block, (partial(connect, connection) for connection in block.connections), carried)  # type: ignore[arg-type]
        self.key_values, self.memory_state = state
        self.end = position
        self._shares_memory_weights = block.shares_memory_weights
        self._memory_kwargs, self._attention_kwargs = memory_kwargs, attention_kwargs

    def attend_without_gradient_of_context(self, seq: Tensor, context: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        assert self._attention is not None
        inputs = {'context': context, 'detach_context': True, **self._attention_kwargs}
        return self._attention(seq, cache=self.key_values, position=self.end, **inputs)[0]

    def segments(self, seq: Float[Tensor, 'b n d'], length: int) -> Sequence[Float[Tensor, 'b _n d']]:
        num_stored = 0 if self.memory_state is None else self.memory_state.num_tokens
        # the two positions differ once tokens have been read without being stored
        in_segment, in_batch = constant(self.end % length), constant(num_stored % length)
        lengths: list[int] = []
        while left := seq.shape[1] - sum(lengths):
            lengths.append(min(left, length - in_segment, length - in_batch))
            in_segment, in_batch = (in_segment + lengths[-1]) % length, (in_batch + lengths[-1]) % length
        return seq.split(lengths, dim=1)

    def feed_forward(self, seq: Tensor) -> Tensor:
        return self._feedforward(seq)

    def _select(self, selector: Module, own: Tensor, choices: Tensor) -> Tensor:
        return selected_views(selector, own, choices)

    def _attend(self, attention: SegmentedAttention, seq: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out, (values, self.key_values) = attention(
            seq, cache=self.key_values, position=self.end, **inputs, **self._attention_kwargs
        )
        self.end += seq.shape[1]
        return out, values

    def _store_and_retrieve(
        self, memory: NeuralMemory, seq: Tensor, previous: Any
    ) -> tuple[Tensor, Mapping[str, Tensor] | None]:
        retrieved, self.memory_state, *surprises = memory(
            seq, state=self.memory_state, prev_weights=previous, **self._memory_kwargs
        )
        self._own_surprises.extend(surprises)
        return retrieved, self.memory_state.updates if self._shares_memory_weights else None


class StepParts(Parts):
    """The parts of a block, bound to a single position, which they write into `buffers`.

    Args:
        attention_layer: number of attentions in earlier blocks.
    """

    def __init__(self, block: Block, carried: Carried, buffers: LayerBuffers, here: StepPosition, attention_layer: int):
        pairs = zip(block.connections, buffers.connections)
        super().__init__(block, (partial(connect_token, own, weights) for own, weights in pairs), carried)  # type: ignore[arg-type]
        self.memory_state = buffers.memory
        self._buffers, self._here, self._attention_layer = buffers, here, attention_layer

    def attend_without_gradient_of_context(self, seq: Tensor, context: Tensor) -> Tensor | None:
        return None

    def segments(self, seq: Float[Tensor, 'b n d'], length: int) -> Sequence[Float[Tensor, 'b _n d']]:
        return [seq]

    def feed_forward(self, seq: Tensor) -> Tensor:
        return feedforward_of_token(self._feedforward, seq)

    def _select(self, selector: Module, own: Tensor, choices: Tensor) -> Tensor:
        return selected_views_of_token(selector, own, choices)

    def _attend(self, attention: SegmentedAttention, seq: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        assert self._buffers.key_values is not None
        return attention.step(seq, self._buffers.key_values, self._here.position, self._attention_layer, **inputs)

    def _store_and_retrieve(
        self, memory: NeuralMemory, seq: Tensor, previous: Any
    ) -> tuple[Tensor, Mapping[str, Tensor] | None]:
        assert self.memory_state is not None
        before, kind = self.memory_state.weights.newest, self._here.kind
        retrieved, self.memory_state = memory.step(
            seq, self.memory_state, self._here.chunk_offset, kind.ends_chunk, kind.ends_batch, previous
        )
        return retrieved, before
