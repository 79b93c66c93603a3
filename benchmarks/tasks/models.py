"""The models that the tasks compare, at equal numbers of parameters."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
)
from titans_pytorch.models.base import Transformer
from titans_pytorch.presets import memory_settings

ARCHITECTURES: dict[str, tuple[type[Transformer], dict[str, Any], dict[str, Any]]] = {
    # name: class, arguments of the model, arguments of its memories
    'attention alone': (MemoryAsGateTransformer, {'neural_memory_layers': ()}, {}),
    'LMM': (LongTermMemoryModel, {}, {}),
    'MAC': (MemoryAsContextTransformer, {'num_longterm_mem_tokens': 4, 'num_residual_streams': 1}, {}),
    'MAC, paper order': (MemoryAsContextTransformer, {'paper_order': True, 'num_residual_streams': 1}, {}),
    'MAG': (MemoryAsGateTransformer, {}, {}),
    'MAL': (MemoryAsLayerTransformer, {}, {}),
}
PEERS: dict[str, tuple[type[Transformer], dict[str, Any], dict[str, Any]]] = {
    # windows longer than any text
    'full attention': (MemoryAsGateTransformer, {'neural_memory_layers': (), 'segment_len': 2**20}, {}),
}
HYBRIDS: dict[str, tuple[type[Transformer], dict[str, Any], dict[str, Any]]] = {
    f'{name}, one memory': ARCHITECTURES[name] for name in ('MAC', 'MAG', 'MAL')
}
ABLATIONS: dict[str, dict[str, Any]] = {
    'no momentum': {'momentum': False},
    'no decay': {'init_decay_bias': -30.0},
    'linear memory': {'default_model_kwargs': {'depth': 1}},
    'memory depth 3': {'default_model_kwargs': {'depth': 3, 'expansion_factor': 2.0}},
    'no convolution': {'conv_kernel': None},
    'plain steps': {'proximal_steps': False},
}
OF_LMM = {f'LMM, {name}': (LongTermMemoryModel, {}, own) for name, own in ABLATIONS.items()}
MODELS = {**ARCHITECTURES, **PEERS, **HYBRIDS, **OF_LMM}


def build(
    name: str, seed: int, memory_batch: int | None = None, memory: Mapping[str, Any] = {}, **sizes: Any
) -> Transformer:
    """One of `MODELS`, with feedforwards widened so that all models have as many parameters as the largest.

    Without `memory_batch` gradients are taken at the initial weights of the memories, except in the paper's order,
    where a memory batch is a segment. `memory` are arguments of all memories, except where a model has its own; `sizes`
    are arguments common to all models.
    """

    common = {'memory_batch': memory_batch, 'memory': memory, 'sizes': sizes}
    if (key := repr(common)) not in _largest:
        _largest[key] = max(_count(other, **common) for other in MODELS)
    # a feedforward of width w has about 3 · dim · w weights; products need widths that are multiples of 8 to be fast
    missing = _largest[key] - _count(name, **common)
    dim, depth = sizes['dim'], sizes['depth']
    width = 8 * round((8 / 3 * dim + missing / (3 * dim * depth)) / 8)
    # a little more, so that rounding down gives this width
    return _built(name, seed, (width + 0.5) * 3 / (2 * dim), **common)


_largest: dict[str, int] = {}
"""Parameters of the largest model, by the arguments common to all."""


def _count(name: str, **common: Any) -> int:
    with torch.device('meta'):
        return num_parameters(_built(name, 0, 4.0, **common))


def _built(
    name: str, seed: int, ff_mult: float, memory_batch: int | None, memory: Mapping[str, Any], sizes: dict[str, Any]
) -> Transformer:
    torch.manual_seed(seed)
    kind, kwargs, own = MODELS[name]
    memory = {**memory, **own}
    heads, dim_head = sizes['dim'] // sizes['dim_head'], sizes['dim_head']
    common: dict[str, Any] = {**sizes, 'heads': heads, 'ff_mult': ff_mult, **kwargs}
    if name in HYBRIDS:
        # in the middle, where tokens know the ones before them
        common['neural_memory_layers'] = (max(1, sizes['depth'] // 2),)
    if 'paper_order' in kwargs:
        memory_batch = sizes['segment_len']
        common.pop('use_flex_attn', None)  # has no such implementation
    else:
        common['neural_memory_batch_size'] = memory_batch
    settings = memory_settings(
        memory.pop('heads', heads),
        memory.pop('dim_head', dim_head),
        memory_batch,
        **{'default_model_kwargs': {'depth': 2, 'expansion_factor': 2.0}, **memory},
    )
    model = kind(**common, neural_memory_kwargs=settings)
    if memory.get('init_decay_bias', 0) < -20:
        for module in model.modules():
            decay = getattr(module, 'to_decay_factor', None)
            if isinstance(decay, nn.Sequential):
                decay.requires_grad_(False)  # at a logit of −30 nothing is forgotten
    return model


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
