"""The models that the tasks compare, at equal numbers of parameters."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from titans_pytorch.configuration import build_model, model_config
from titans_pytorch.models.base import Transformer
from titans_pytorch.presets import delta_rule_settings, memory_settings

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # name: architecture, and arguments of the model
    'attention alone': ('mag', {'neural_memory_layers': ()}),
    'LMM': ('lmm', {}),
    'MAC': ('mac', {'num_longterm_mem_tokens': 4, 'num_residual_streams': 1}),
    'MAC, paper order': ('mac', {'paper_order': True, 'detach_context': True, 'num_residual_streams': 1}),
    'MAG': ('mag', {}),
    'MAL': ('mal', {}),
}
SINGLE_TOKENS = {'neural_memory_segment_len': 1, 'neural_memory_batch_size': 1}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    # windows longer than any text
    'full attention': ('mag', {'neural_memory_layers': (), 'segment_len': 2**20}),
    # as in Gated DeltaNet, each token is stored in a step of its own
    'gated delta rule': ('lmm', SINGLE_TOKENS),
}
HYBRIDS = {f'{name}, one memory': ARCHITECTURES[name] for name in ('MAC', 'MAG', 'MAL')}
ABLATIONS: dict[str, dict[str, Any]] = {
    'no momentum': {'momentum': False, 'lookahead_gradients': False},
    'no decay': {'init_decay_bias': -30.0},
    'linear memory': {'default_model_kwargs': {'depth': 1}},
    'memory depth 3': {'default_model_kwargs': {'depth': 3, 'expansion_factor': 2.0}},
    'no convolution': {'conv_kernel': None},
    'plain steps': {'proximal_steps': False, 'lookahead_gradients': False},
}
OF_LMM = {f'LMM, {name}': ARCHITECTURES['LMM'] for name in ABLATIONS} | {'LMM, single tokens': ('lmm', SINGLE_TOKENS)}
MODELS = {**ARCHITECTURES, **PEERS, **HYBRIDS, **OF_LMM}


def build(name: str, seed: int, **options: Any) -> Transformer:
    """The model of `config(name, **options)`."""
    torch.manual_seed(seed)
    model = build_model(config(name, **options))
    if name == 'LMM, no decay':
        for module in model.modules():
            decay = getattr(module, 'to_decay_factor', None)
            if isinstance(decay, nn.Sequential):
                decay.requires_grad_(False)  # at this logit, nothing is forgotten
    return model


def config(name: str, memory_batch: int | None = None, memory: Mapping[str, Any] = {}, **sizes: Any) -> dict[str, Any]:
    """Configuration of one of `MODELS`, with feedforwards widened so that every model has as many parameters as the
    largest, to within 12 · dim · depth.

    Without `memory_batch`, gradients are taken at the initial weights of the memories, except in models that store
    single tokens, and in the paper's order, where a memory batch is a segment that is stored as one chunk. `memory`
    holds arguments of all memories that a model may override; `sizes` are arguments common to all models.
    """
    common = {'memory_batch': memory_batch, 'memory': memory, 'sizes': sizes}
    if (key := repr(common)) not in _largest:
        _largest[key] = max(_count(other, **common) for other in MODELS)
    # a feedforward of width w has about 3 · dim · w weights; products are fast only if widths are multiples of 8
    missing = _largest[key] - _count(name, **common)
    dim, depth = sizes['dim'], sizes['depth']
    width = 8 * round((8 / 3 * dim + missing / (3 * dim * depth)) / 8)
    # a little more, so that rounding down gives this width
    return _config(name, (width + 0.5) * 3 / (2 * dim), **common)


_largest: dict[str, int] = {}
"""Number of parameters of the largest model, by the arguments common to all."""


def _count(name: str, **common: Any) -> int:
    with torch.device('meta'):
        return num_parameters(build_model(_config(name, 4.0, **common)))


def _config(
    name: str, ff_mult: float, memory_batch: int | None, memory: Mapping[str, Any], sizes: dict[str, Any]
) -> dict[str, Any]:
    architecture, kwargs = MODELS[name]
    heads = sizes['dim'] // sizes['dim_head']
    common: dict[str, Any] = {**sizes, 'heads': heads, 'ff_mult': ff_mult, **kwargs}
    if architecture != 'mac':
        common.pop('position_length', None)  # this model has no positions of chunks
    if name in HYBRIDS:
        # in the middle, where tokens already know the ones before them
        common['neural_memory_layers'] = (max(1, sizes['depth'] // 2),)
    if 'paper_order' in kwargs:
        memory_batch = common['neural_memory_segment_len'] = sizes['segment_len']
        common.pop('use_flex_attn', None)  # this model has no such implementation
    else:
        memory_batch = common.setdefault('neural_memory_batch_size', memory_batch)
    memory = {'heads': heads, 'dim_head': sizes['dim_head'], **memory}
    if name == 'gated delta rule':
        own = (
            'default_model_kwargs', 'momentum', 'lookahead_gradients', 'proximal_steps', 'default_step_transform_max_lr'
        )  # fmt: skip
        settings = delta_rule_settings(**{key: value for key, value in memory.items() if key not in own})
    else:
        deep = {'default_model_kwargs': {'depth': 2, 'expansion_factor': 2.0}}
        ablated = ABLATIONS.get(name.removeprefix('LMM, '), {})
        settings = memory_settings(**{'memory_batch': memory_batch, **deep, **memory, **ablated})
    return model_config(architecture, **common, neural_memory_kwargs=settings)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
