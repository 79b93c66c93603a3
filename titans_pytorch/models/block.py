"""One layer of a model: memory, attention and feedforward, and how they are put together.

That is written once (`Block.arranged`), and serves whole sequences, pieces of them, and decoding a position at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from titans_pytorch.attention.rotary import KeyValues
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.generation.stepper import StepKind
from titans_pytorch.memory.state import NeuralMemState, StepState
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
    """Results of earlier blocks that later ones read, beside the residual stream.

    A block returns a new one and changes nothing, so that it can be computed again (activation checkpointing).
    """

    inputs: tuple[Tensor, ...] = ()
    """Inputs and outputs of every attention and feedforward so far, which a memory may choose its views from."""
    values: Tensor | None = None
    """The first attention's values."""
    memory_weights: Mapping[str, Tensor] | None = None
    """The last memory's weights over time."""


class LayerState(NamedTuple):
    """What a block carries from one call to the next."""

    key_values: KeyValues | None
    memory: NeuralMemState | None


class LayerBuffers(NamedTuple):
    """The same as buffers of constant size for steps, and the weights of the block's connections."""

    key_values: KeyValues | None
    memory: StepState | None
    connections: list[FoldedConnection | None]


class Place(NamedTuple):
    """A position, for all layers."""

    position: Position
    in_chunk: Int[Tensor, ' 1']
    """Its number in the memories' chunk."""
    kind: StepKind


class Parts(NamedTuple):
    """A block's parts at work, on a sequence or on a single position."""

    connections: Sequence[Callable[[Streams], tuple[Tensor, AddResidual]]]
    """For each branch: from the residual stream to the branch's input, and the function that adds its output."""
    attend: Callable[..., Tensor]
    """(seq, `output_gating=` or `context=`) to what attention gives."""
    remember: Callable[[Tensor], Tensor]
    """What memory retrieves, (seq or its views) being stored."""
    recall: Callable[[Tensor], Tensor]
    """What memory knew when its memory batch began; nothing is stored."""
    earlier: tuple[Tensor, ...]
    """`Carried.inputs` of the blocks before."""
    keep: Callable[..., None]
    """Adds tensors to them, for the blocks after."""
    position: int | None
    """Of the first of the sequence; `None` for a single one."""


class Block(Resettable):
    """One layer. It has a `memory`, an `attention` (either may be `None`), a `feedforward` and `connections`."""

    memory: NeuralMemory | None
    attention: SegmentedAttention | None
    feedforward: Module

    @property
    def connections(self) -> Sequence[Module | None]:
        """From and to the residual stream, one for each branch."""
        raise NotImplementedError

    def arranged(self, x: Streams, parts: Parts) -> Streams:
        """How the parts are put together: the residual stream after this block, from that before it.

        It is read and written by `parts.connections` only, which may leave the last branch's output to be added by the
        next one: `residual_streams.complete` adds it.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Streams,
        carried: Carried,
        state: LayerState,
        position: int,
        store: bool = True,
        **attention_kwargs: Any,
    ) -> tuple[Streams, Carried, LayerState]:
        """Positions from `position` on through this block; without `store` its memory is read, and not written."""
        earlier, values, memory_weights = carried
        key_values, memory_state = state
        reached = position
        kept: list[Tensor] = []

        def attend(seq: Tensor, **inputs: Tensor | None) -> Tensor:
            nonlocal key_values, reached, values
            assert self.attention is not None
            if self.attention.to_learned_v_mix is not None:
                inputs['value_residual'] = values
            out, (own_values, key_values) = self.attention(
                seq, cache=key_values, position=reached, **inputs, **attention_kwargs
            )
            reached += seq.shape[1]
            values = own_values if values is None else values
            return out

        def remember(seq: Tensor) -> Tensor:
            nonlocal memory_state, memory_weights
            assert self.memory is not None
            accepts_weights = self.memory.to_learned_weight_residual_mix is not None
            retrieved, memory_state = self.memory(
                seq, state=memory_state, prev_weights=memory_weights if accepts_weights else None, store=store
            )
            memory_weights = memory_state.updates
            return retrieved

        def recall(seq: Tensor) -> Tensor:
            assert self.memory is not None
            return self.memory.recall(seq, memory_state)

        connections = [partial(connect, connection) for connection in self.connections]  # type: ignore[arg-type]
        x = self.arranged(x, Parts(connections, attend, remember, recall, earlier, lambda *t: kept.extend(t), position))
        return x, Carried((*earlier, *kept), values, memory_weights), LayerState(key_values, memory_state)

    def step(
        self, x: Streams, carried: Carried, buffers: LayerBuffers, place: Place, attention_layer: int
    ) -> tuple[Streams, Carried, StepState | None]:
        """`forward` for one position; its streams stand in a dimension of their own. There were `attention_layer`
        attentions before.

        Writes the position into the buffers. Returns the streams, what later blocks read, and the memory's state.
        """
        earlier, values, memory_weights = carried
        memory_state = buffers.memory
        kept: list[Tensor] = []
        pairs = zip(self.connections, buffers.connections)
        connections = [partial(connect_token, own, weights) for own, weights in pairs]  # type: ignore[arg-type]

        def attend(seq: Tensor, **inputs: Any) -> Tensor:
            nonlocal values
            assert self.attention is not None and buffers.key_values is not None
            if self.attention.to_learned_v_mix is not None:
                inputs['value_residual'] = values
            out, own_values = self.attention.step(seq, buffers.key_values, place.position, attention_layer, **inputs)
            values = own_values if values is None else values
            return out

        def remember(seq: Tensor) -> Tensor:
            nonlocal memory_state, memory_weights
            assert self.memory is not None and memory_state is not None
            before = memory_state.last
            accepts_weights = self.memory.to_learned_weight_residual_mix is not None
            retrieved, memory_state = self.memory.step(
                seq,
                memory_state,
                place.in_chunk,
                place.kind.ends_chunk,
                place.kind.ends_batch,
                memory_weights if accepts_weights else None,  # type: ignore[arg-type]
            )
            memory_weights = before
            return retrieved

        def recall(seq: Tensor) -> Tensor:
            assert self.memory is not None
            return self.memory.recall(seq, buffers.memory)

        x = self.arranged(x, Parts(connections, attend, remember, recall, earlier, lambda *t: kept.extend(t), None))
        return x, Carried((*earlier, *kept), values, memory_weights), memory_state

    def to_buffers(self, state: LayerState, position: int) -> LayerBuffers:
        """`state` after `position` positions, for steps. Weights are read here: it serves until they change."""
        key_values, memory = state
        return LayerBuffers(
            None if self.attention is None else self.attention.to_ring(key_values, position),  # type: ignore[arg-type]
            None if self.memory is None else self.memory.step_state(memory),  # type: ignore[arg-type]
            [folded(connection) for connection in self.connections],
        )

    def from_buffers(self, buffers: LayerBuffers, position: int) -> LayerState:
        """The opposite; it shares nothing with the buffers."""
        key_values, memory = buffers[:2]
        return LayerState(
            None if self.attention is None else self.attention.from_ring(key_values, position),  # type: ignore[arg-type]
            None if self.memory is None else memory.closed(position, self.memory.step_sizes),  # type: ignore[union-attr]
        )
