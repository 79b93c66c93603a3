"""A memory in front of a decoder layer, and its state within the cache of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from titans_pytorch.hf.row_groups import GroupedRows, RowGroup, padding_last, rearranged, split_by_count
from titans_pytorch.neural_memory import NeuralMemory, NeuralMemState
from titans_pytorch.utils.functional import replaced
from titans_pytorch.utils.plain import is_intercepted
from titans_pytorch.utils.shapes import Bool, Float

PADDING = 'memory_padding_mask'
"""Keyword by which the decoder passes the padding mask to its layers."""


def cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a call, whatever its name."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


class LayerMemory(nn.Module):
    """A memory that adds to the input of a decoder layer: x + gate · memory(x), with one gate per channel, 0 at first.

    Padding is neither stored nor counted, so each row of a batch is read as if it were alone. The memory computes in
    the precision of its own parameters, whatever the precision of the hidden states.
    """

    def __init__(self, memory: NeuralMemory, layer: int, num_layers: int):
        super().__init__()
        self.memory = memory
        self.gate = nn.Parameter(torch.zeros(memory.dim))
        self.layer, self.num_layers = layer, num_layers

    def forward(
        self, hidden: Float[Tensor, 'b n d'], real: Bool[Tensor, 'b n'] | None, cache: Cache | None
    ) -> Float[Tensor, 'b n d']:
        """Hidden states with the gated memory added.

        Args:
            hidden: input of the decoder layer.
            real: false for padding; `None` if there is none.
            cache: keys and values of earlier calls, beside which the memory keeps its state; `None` for a single call.
        """
        x = hidden.to(self.gate.dtype)
        if cache is not None:
            retrieved = self._states(cache).read(self.memory, x, real)
        elif real is None:
            retrieved, _ = self.memory(x)
        else:
            retrieved = self._read_padded(x, real)
        return hidden + (self.gate * retrieved).to(hidden.dtype)

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the decoder layer, which replaces its input."""
        if PADDING not in kwargs:
            raise TypeError(
                f'model must pass its keyword arguments on to its layers, as the memory needs the padding mask there; '
                f'{type(layer).__name__} received none'
            )
        real = kwargs.pop(PADDING)
        cache = cache_of(args, kwargs)
        if args:
            return (self(args[0], real, cache), *args[1:]), kwargs
        return args, {**kwargs, 'hidden_states': self(kwargs['hidden_states'], real, cache)}

    def _read_padded(self, x: Float[Tensor, 'b n d'], real: Bool[Tensor, 'b n']) -> Float[Tensor, 'b n d']:
        order = padding_last(real)  # no token comes after the padding
        retrieved, _ = self.memory(rearranged(x, order))
        return rearranged(retrieved, order.argsort(dim=1)).masked_fill(~real.unsqueeze(-1), 0.0)

    def _states(self, cache: Cache) -> MemoryStates:
        """The states of this memory in a cache, stored after the entries of the decoder layers."""
        entries: list[Any] = cache.layers
        for entry in entries:
            if isinstance(entry, MemoryStates) and entry.layer == self.layer:
                return entry
        if cache.offloading:
            raise ValueError('cache must not be offloaded: the states of memories stay on their device')
        if any(isinstance(entry, StaticLayer) for entry in entries):
            # if it cannot compile one entry, transformers makes no mask for the empty places of the others
            raise ValueError('cache must not be static, as decoding with memories is not compiled: use a DynamicCache')
        if (new_entry := cache.layer_class_to_replicate) is not None:  # it adds the entries of layers one by one
            entries.extend(new_entry() for _ in range(len(entries), self.num_layers))
        slides = any(getattr(entry, 'is_sliding', False) for entry in entries)
        entries.append(states := MemoryStates(self.layer, slides))
        return states


class DecodingSteps:
    """A memory that reads one token at a time, without gradients, in buffers of constant size."""

    def __init__(self, memory: NeuralMemory, state: NeuralMemState):
        self.position = state.num_tokens
        self.buffers = memory.to_buffers(state)
        self.sizes = memory.buffer_sizes

    def read(self, memory: NeuralMemory, token: Float[Tensor, 'r 1 d']) -> Float[Tensor, 'r 1 d']:
        """Store the next token and return the value retrieved for it."""
        in_chunk = torch.tensor([self.position % self.sizes.chunk], device=token.device)
        self.position += 1
        ends_chunk = self.position % self.sizes.chunk == 0
        ends_batch = memory.batch_size is not None and self.position % memory.batch_size == 0
        retrieved, self.buffers = memory.step(token, self.buffers, in_chunk, ends_chunk, ends_batch)
        return retrieved

    @property
    def state(self) -> NeuralMemState:
        """The state after the tokens read so far."""
        return self.buffers.to_state(self.position, self.sizes)


class Rows(RowGroup[NeuralMemState]):
    """Rows of a batch and their state, which is kept in buffers while they read single tokens."""

    def __init__(self, rows: Sequence[int], state: NeuralMemState | None = None, num_tokens: int = 0):
        super().__init__(rows, state, num_tokens)
        self._steps: DecodingSteps | None = None

    @property
    def state(self) -> NeuralMemState | None:
        return self._state if self._steps is None else self._steps.state

    def read(self, memory: NeuralMemory, tokens: Float[Tensor, 'r n d']) -> Float[Tensor, 'r n d']:
        """Store the next tokens and return the values retrieved for them."""
        self.num_tokens += tokens.shape[1]
        one = tokens.shape[1] == 1 and not torch.is_grad_enabled()
        # a step calls only a few of the modules, and would bypass hooks on the others
        if one and self.is_started and not is_intercepted((*memory.modules(), *memory._network.modules())):
            if self._steps is None:
                assert self._state is not None
                self._steps, self._state = DecodingSteps(memory, self._state), None
            return self._steps.read(memory, tokens)
        retrieved, state = memory(tokens, state=self.state)
        self._steps, self._state = None, replaced(state, updates=None)
        return retrieved

    @property
    def is_started(self) -> bool:
        """True once the rows have read a token."""
        return self._state is not None or self._steps is not None


class MemoryStates(GroupedRows[Rows]):
    """States of a memory for all rows of a batch, as an entry of `cache.layers`.

    As part of the cache they belong to one sequence of calls, and follow whatever `generate` does to it: beams are
    reordered, rows repeated and selected.
    """

    # read by transformers from every entry of a cache
    keys = values = None
    is_compileable = is_croppable = is_initialized = supports_early_init = False

    def __init__(self, layer: int, is_sliding: bool):
        self.layer = layer
        # of a kind that the decoder's own entries have too: transformers makes a mask from the first entry of each kind
        self.is_sliding = is_sliding
        self.groups: list[Rows] = []

    def read(
        self, memory: NeuralMemory, x: Float[Tensor, 'b n d'], real: Bool[Tensor, 'b n'] | None
    ) -> Float[Tensor, 'b n d']:
        """Store the tokens of a call and return the values retrieved for them, with zeros for padding."""
        batch, length = x.shape[:2]
        counts = [length] * batch if real is None else real.sum(dim=1).tolist()
        retrieved = torch.zeros_like(x)
        self.groups = split_by_count(self.groups or [Rows(range(batch))], counts)
        for group in self.groups:
            if count := counts[group.rows[0]]:
                tokens = group.positions(count, real, x.device)
                retrieved[tokens] = group.read(memory, x[tokens]).to(x.dtype)
        return retrieved

    # called by transformers for every entry of a cache, as are the methods of `GroupedRows`

    def reset(self) -> None:
        self.groups = []

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                'cache cannot be cropped: a memory has already learned from the tokens to be removed. Assisted '
                'decoding and prompt lookup, which take tokens back, do not work with a memory'
            )
