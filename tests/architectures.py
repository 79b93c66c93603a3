"""Small models of every architecture, in several variants."""

from __future__ import annotations

import pytest
import torch
from compare import randomised

from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    MemoryMLP,
)
from titans_pytorch.presets import memory_settings

TOKENS, DIM = 16, 16
MEMORY = {'dim_head': 8, 'heads': 2, 'default_step_transform_max_lr': 0.3}
PAPER_MEMORY = {'neural_memory_kwargs': memory_settings(dim_head=8, heads=2, default_step_transform_max_lr=0.3)}
CLASSES = {
    'MAC': MemoryAsContextTransformer,
    'MAC, paper order': MemoryAsContextTransformer,
    'MAG': MemoryAsGateTransformer,
    'MAL': MemoryAsLayerTransformer,
    'LMM': LongTermMemoryModel,
}
VARIANTS = {
    'plain': {},
    'as in the paper': {**PAPER_MEMORY, 'num_persist_mem_tokens': 2},
    'streams, some layers': {'num_residual_streams': 4, 'neural_memory_layers': (2,)},
    'memory batches': {'neural_memory_segment_len': 2, 'neural_memory_batch_size': 6, 'num_persist_mem_tokens': 1},
}
architectures = pytest.mark.parametrize('name', CLASSES)
variants = pytest.mark.parametrize('variant', VARIANTS)


def build(name: str, variant: str = 'plain', **changes):
    torch.manual_seed(len(name) + len(variant))
    kwargs = {'num_tokens': TOKENS, 'segment_len': 6, 'neural_memory_segment_len': 3, **VARIANTS[variant], **changes}
    if name == 'MAC':
        kwargs = {'num_longterm_mem_tokens': 2, 'sliding_window_attn': True, **kwargs}
        if 'neural_memory_batch_size' in kwargs:
            kwargs['neural_memory_segment_len'] = 3
    elif name == 'MAC, paper order':
        kwargs['paper_order'] = True
        kwargs.pop('neural_memory_batch_size', None)
    model = CLASSES[name](
        **{'dim': DIM, 'depth': 2, 'dim_head': 8, 'heads': 2, 'neural_memory_kwargs': MEMORY, **kwargs}
    )
    return randomised(model, 0.1).double()


def smallest_memory() -> dict:
    """Arguments for a memory of one matrix without momentum, where a compiler traces the model around it."""
    return {'neural_memory_model': MemoryMLP(8, depth=1), 'neural_memory_kwargs': {**MEMORY, 'momentum': False}}


def ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, TOKENS, (batch, length))
