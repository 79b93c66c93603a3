"""Checks of a model's memory settings, of labels, and of a state passed to a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from titans_pytorch.attention.rotary import KeyValues
from titans_pytorch.memory.settings import check_memory_model
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.models.block import Block
from titans_pytorch.models.documents import IGNORED
from titans_pytorch.models.state import ModelState
from titans_pytorch.utils.checks import (
    check_integer,
    check_integers,
    check_keywords,
    check_module,
    check_multiple,
    checked_state,
    described,
    values_are_at_hand,
)
from titans_pytorch.utils.shapes import Int

OF_MODELS = {
    'dim': 'dim',
    'chunk_size': 'neural_memory_segment_len',
    'batch_size': 'neural_memory_batch_size',
    'model': 'neural_memory_model',
}
"""Arguments of `NeuralMemory`, and the arguments of models that set them."""

SET_BY_MODELS = ('qkv_receives_diff_views', 'accept_weight_residual')
"""Arguments of `NeuralMemory` that depend on the layer."""


def check_left_out(kwargs: Mapping[str, Any], arguments: Mapping[str, str], owner_has: str) -> None:
    """Raise an error for `neural_memory_kwargs` that their owner sets by its own `arguments`."""
    for name, argument in arguments.items():
        if name in kwargs:
            raise ValueError(f'neural_memory_kwargs must not hold {name!r}: {owner_has} {argument} for it')


def checked_memory_settings(
    dim: int, chunk_size: Any, batch_size: Any, model: Module | None, kwargs: Mapping[str, Any]
) -> tuple[int, int | None]:
    """Chunk size and memory-batch size of a model's memories. Their network and further arguments are checked too."""
    chunk_size = check_integer('neural_memory_segment_len', chunk_size, 1)
    if batch_size is not None:
        batch_size = check_multiple('neural_memory_batch_size', batch_size, 'neural_memory_segment_len', chunk_size)
    check_module(neural_memory_model=model)
    check_keywords(neural_memory_kwargs=kwargs)
    check_left_out(kwargs, OF_MODELS, 'models have')
    for name in SET_BY_MODELS:
        if name in kwargs:
            raise ValueError(f'neural_memory_kwargs must not hold {name!r}: models set it for each layer')
    if model is not None:
        dim_head = kwargs.get('dim_head')
        dim_head = dim if dim_head is None else check_integer('dim_head', dim_head, 1)
        check_memory_model(model, dim_head, 'neural_memory_model')
    return chunk_size, batch_size


def layers_with_memory(layers: Sequence[int] | None, depth: int) -> list[int]:
    """Numbers of the layers that have a memory, counted from 1; `None` selects all."""
    chosen = [*range(1, depth + 1)] if layers is None else check_integers('neural_memory_layers', layers)
    missing = [layer for layer in chosen if layer not in range(1, depth + 1)]
    if missing:
        raise ValueError(f'neural_memory_layers must be layers from 1 to depth={depth}, got {missing}')
    return chosen


def check_beside_documents(has_state: bool, return_surprises: bool) -> None:
    """Raise an error for what a call with `mask` or `document_ids` cannot take or return."""
    if has_state:
        raise ValueError(
            'mask and document_ids start and end sequences within rows, so that no single state describes the '
            'batch: leave out state, cache and return_state'
        )
    if return_surprises:
        raise ValueError(
            'return_surprises needs rows of one sequence each: leave out mask and document_ids, and call the '
            'model for each document'
        )


def check_labels(labels: Int[Tensor, 'b n'], num_tokens: int | None) -> None:
    """Check that each label to be predicted is `IGNORED` or a token id, if the number of token ids is known."""
    if num_tokens is not None and values_are_at_hand(labels):
        counted = labels[labels != IGNORED]
        if counted.numel() and not 0 <= counted.min() <= counted.max() < num_tokens:
            raise ValueError(
                f'labels must be token ids in [0, num_tokens={num_tokens}), or {IGNORED} to ignore a position, '
                f'got labels in [{counted.min()}, {counted.max()}]; with return_loss alone they are the tokens of x'
            )


def checked_model_state(state: Any, blocks: Sequence[Block], batch: int) -> ModelState:
    """Return `state` as a `ModelState`, after checking that it fits a model of these blocks and this batch size."""
    position, key_values, memories = checked_state('state', state, ModelState)
    position = check_integer('state.seq_index', position, 0)
    if isinstance(key_values, Tensor) and key_values.ndim > 1 and key_values.shape[1] == 2:  # the reference's format
        key_values = [pair.unbind(0) for pair in key_values]
    if not isinstance(key_values, (tuple, list)) or not isinstance(memories, (tuple, list)):
        given = f'{described(key_values)} and {described(memories)}'
        raise TypeError(f'state must hold lists of key_values and of memories, got {given}')
    num_memories = sum(block.memory is not None for block in blocks)
    if (len(key_values), len(memories)) != (len(blocks), num_memories):
        raise ValueError(
            f'state must be of a model like this one, with {len(blocks)} layers and {num_memories} memories, '
            f'got {len(key_values)} and {len(memories)}'
        )
    checked: list[KeyValues | None] = []
    for layer, (block, pair) in enumerate(zip(blocks, key_values)):
        name = f'state.key_values[{layer}]'
        if block.attention is not None:
            pair, _ = block.attention.checked_cache(name, pair, position, None)
            held = pair[0].shape[-2] // block.attention.keys_per_position
            visible = block.attention.num_visible(position)
            if isinstance(held, int) and held < visible:
                raise ValueError(
                    f'{name} must hold the {visible} positions that position {position} sees, got {held}: '
                    'state must be of a model with windows of this length'
                )
        elif pair is not None:
            raise ValueError(f'{name} must be None, as the layer has no attention, got {described(pair)}')
        checked.append(pair)
    memories = [checked_state(f'state.memories[{n}]', memory, NeuralMemState) for n, memory in enumerate(memories)]
    state = ModelState(seq_index=position, key_values=checked, memories=memories)
    # `not in` would compare symbolic sizes as objects in a compiled call
    if state.batch_size is not None and state.batch_size != batch:
        raise ValueError(
            f'state must be of a batch of {batch}, as x is, got one of {state.batch_size}: see ModelState.select'
        )
    return state
