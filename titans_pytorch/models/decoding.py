"""Decoding steps of a model: one position through all layers, over buffers of constant size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops.layers.torch import Reduce
from torch import Tensor, nn
from torch.nn import Identity, Linear, Module, ModuleList

from titans_pytorch.attention.rotary import frequencies
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.generation import sampling
from titans_pytorch.generation.decodable import StepKind
from titans_pytorch.memory.state import LayerSurprises, Surprises, copy_weights
from titans_pytorch.models.block import Block, Carried, LayerBuffers, LayerState, StepPosition
from titans_pytorch.models.residual_streams import ExpandStreams, Streams, complete, takes_tokens
from titans_pytorch.models.state import ModelState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.ops.token_attention import Position
from titans_pytorch.ops.token_linear import linear_of_token
from titans_pytorch.utils.plain import is_intercepted, is_plain
from titans_pytorch.utils.precision import autocast_dtype
from titans_pytorch.utils.shapes import Float, Int


class ModelBuffers(NamedTuple):
    """A `ModelState` as buffers of constant size, which every step overwrites, and the tables that steps read."""

    position: Int[Tensor, ' 1']
    token: Int[Tensor, 'b 1']
    """Input of the next step."""
    logits: Float[Tensor, 'b l']
    """Output of the last step that read a token."""
    layers: list[LayerBuffers]
    frequencies: Float[Tensor, 'layers d/2']
    """Rotary frequencies of the layers that have attention."""
    embedding: Any
    """Tables of the model's position embedding, if it has one."""


class StepwiseDecoding(Module):
    """The steps of a model, which implement `generation.decodable.Decodable`.

    A subclass in which positions are not just tokens overrides `step_kind`, `_decoding_embedding`, `_embedded_one` and
    `_chunk_ended`.
    """

    token_emb: Module | None
    layers: ModuleList
    expand_streams: Module
    norm: nn.RMSNorm
    to_logits: Linear | None
    neural_memory_segment_len: int
    neural_memory_batch_size: int | None

    sample = sampling.sample
    stream = sampling.stream

    @property
    def _blocks(self) -> list[Block]:
        return [*self.layers]  # type: ignore[list-item]

    @property
    def _attentions(self) -> list[SegmentedAttention]:
        return [block.attention for block in self._blocks if block.attention is not None]

    @property
    def _memories(self) -> list[NeuralMemory]:
        return [block.memory for block in self._blocks if block.memory is not None]

    def obstacle_to_steps(self, state: ModelState) -> str | None:
        """Why steps from `state` would differ from calls; `None` if they agree.

        Steps bypass the calls of most modules, expand and reduce the streams by plain sums, and derive the offset in a
        chunk from the position.
        """
        called = [self.token_emb, self.norm, self.to_logits, *(block.feedforward for block in self._blocks)]
        whole = {module for part in called if part is not None for module in part.modules()}
        networks = [memory._network for memory in self._memories]
        if is_intercepted(m for tree in (self, *networks) for m in tree.modules() if m not in whole):
            return 'a module of it has hooks, or a forward of its own'
        own = (self, *self._blocks, *self._attentions, *self._memories)
        if any(not type(module).forward.__module__.startswith('titans_pytorch.') for module in own):
            return 'a class of it has a forward of its own'
        if not isinstance(self.to_logits, Linear):
            return f'its to_logits is a {type(self.to_logits).__name__}'
        for name, types in (('expand_streams', (ExpandStreams, Identity)), ('reduce_streams', (Reduce, Identity))):
            if not is_plain(getattr(self, name), *types):
                return f'its {name} is a {type(getattr(self, name)).__name__}'
        if getattr(self.reduce_streams, 'reduction', 'sum') != 'sum':
            return 'its reduce_streams does not add the streams'
        if not all(takes_tokens(connection) for block in self._blocks for connection in block.connections):
            return 'a connection of its branches is not one of this package in its plain settings'
        if not all(attention.takes_steps for attention in self._attentions):
            return 'its attention has options, or parts of the caller'
        lengths = self.neural_memory_segment_len, self.neural_memory_batch_size
        if any((memory.store_chunk_size, memory.batch_size) != lengths for memory in self._memories):
            return 'its memories have chunks or memory batches of another length'
        if any(memory.num_tokens != state.seq_index for memory in state.memories):
            return 'its memories were read without being written (store=False)'
        return None

    def decoding_state(self, state: ModelState, with_surprises: bool = False) -> ModelBuffers:
        """`state` as buffers for `step`; they hold values derived from parameters, and are valid until these change."""
        assert self.to_logits is not None
        start = state.seq_index
        pairs = zip(self._blocks, self._layer_states(state))
        layers = [block.to_buffers(own, start, with_surprises) for block, own in pairs]

        weight = self.to_logits.weight
        device = weight.device
        batch = state.batch_size
        if batch is None:
            raise ValueError('a model with neither attention nor memory has no state to decode from')
        position = torch.full((1,), start, device=device)
        dtype = autocast_dtype(device) or weight.dtype
        rotations = [frequencies(attention.rotary_emb, device).detach() for attention in self._attentions]
        return ModelBuffers(
            position=position,
            token=torch.zeros(batch, 1, dtype=torch.long, device=device),
            logits=torch.zeros(batch, len(weight), dtype=dtype, device=device),
            layers=layers,
            frequencies=torch.stack(rotations) if rotations else torch.zeros(0, 0, device=device),
            embedding=self._decoding_embedding(position),
        )

    def decoding_cache(self, state: ModelBuffers, position: int) -> ModelState:
        """Inverse of `decoding_state`, after `position` positions; the result does not alias the buffers."""
        layers = [block.from_buffers(own, position) for block, own in zip(self._blocks, state.layers)]
        return self._model_state(position, layers)

    def step_surprises(self, state: ModelBuffers) -> LayerSurprises:
        """Surprises of the chunk that the last step completed; the result does not alias the buffers."""
        of_layers = [None if layer.memory is None else layer.memory.surprises for layer in state.layers]
        return {
            number: Surprises(*(rows.clone() for rows in own))
            for number, own in enumerate(of_layers, start=1)
            if own is not None
        }

    def _layer_states(self, state: ModelState | None) -> list[LayerState]:
        if state is None:
            return [LayerState()] * len(self._blocks)
        memories = iter(state.memories)
        pairs = zip(self._blocks, state.key_values)
        return [
            LayerState(key_values=key_values, memory=None if block.memory is None else next(memories))
            for block, key_values in pairs
        ]

    def _model_state(self, position: int, layers: list[LayerState]) -> ModelState:
        return ModelState(
            seq_index=position,
            key_values=[layer.key_values for layer in layers],
            memories=[layer.memory for layer in layers if layer.memory is not None],
        )

    def step_kind(self, position: int) -> StepKind:
        """The kind of the step at `position`."""
        batch_size, following = self.neural_memory_batch_size, position + 1
        return StepKind(
            ends_chunk=following % self.neural_memory_segment_len == 0,
            ends_batch=batch_size is not None and following % batch_size == 0,
        )

    def step(self, state: ModelBuffers, kind: StepKind) -> None:
        """Process one position in all layers, reading and writing buffers.

        Shapes and operations are the same for all steps of a kind, so that they can be captured as a CUDA graph:
        anything that depends on the position is computed from the tensor that holds it.
        """
        position = state.position
        chunk_offset = position % self.neural_memory_segment_len
        x: Streams = self._embedded_one(state, kind, chunk_offset)
        here = StepPosition(Position(position, state.frequencies), chunk_offset, kind)
        carried, memories, num_attentions = Carried(), [], 0
        if isinstance(self.expand_streams, ExpandStreams):
            x = complete(x) + self.expand_streams.stream_embed
        for block, layer in zip(self._blocks, state.layers):
            x, carried, memory = block.step(x, carried, layer, here, num_attentions)
            num_attentions += block.attention is not None
            if layer.memory is not None and memory is not None:
                memories.append((layer.memory, memory))
        if not kind.is_longterm:
            assert self.to_logits is not None
            logits, _ = linear_of_token(self.to_logits, complete(x).sum(dim=1, keepdim=True), self.norm)
            state.logits.copy_(logits.squeeze(1))

        position.add_(1)
        if kind.ends_chunk:
            self._chunk_ended(state)
            # only now, because a memory reads the weights that the previous one had at the start of this step
            copy_weights(memories)

    def _token_embedding(self, x: Tensor) -> Float[Tensor, 'b n d']:
        raise NotImplementedError

    def _decoding_embedding(self, position: Int[Tensor, ' 1']) -> Any:
        """Position tables that `_embedded_one` reads, if any."""

    def _embedded_one(
        self, state: ModelBuffers, kind: StepKind, chunk_offset: Int[Tensor, ' 1']
    ) -> Float[Tensor, 'b 1 d']:
        return self._token_embedding(state.token)

    def _chunk_ended(self, state: ModelBuffers) -> None:
        """Update the tables when `state.position` is the first of a chunk."""
