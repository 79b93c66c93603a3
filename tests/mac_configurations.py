"""Configurations of `MemoryAsContextTransformer` that together cover every value of every setting."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from compare import randomised

from titans_pytorch import MemoryAsContextTransformer, MemoryAttention, MemoryMLP

TOKENS = 16

CHOICES = {
    'sliding_window_attn': [False, True],
    'neural_mem_gate_attn_output': [False, True],
    'neural_mem_weight_residual': [False, True],
    'neural_memory_qkv_receives_diff_views': [False, True],
    'num_longterm_mem_tokens': [0, 3],
    'num_persist_mem_tokens': [0, 2],
    'neural_memory_segment_len': [None, 2],
    'neural_memory_batch_size': [None, 2],  # in memory segments
    'num_residual_streams': [1, 4],
    'neural_memory_layers': [None, (2, 3)],
    'memory': [MemoryMLP, MemoryAttention],
}
# every combination of the first four switches, twice; the other settings are drawn at random
drawn = random.Random(0)
CONFIGURATIONS = [
    {**dict(zip(CHOICES, first)), **{key: drawn.choice(values) for key, values in [*CHOICES.items()][4:]}}
    for first in itertools.product(*[*CHOICES.values()][:4])
    for _ in range(2)
]
every_configuration = pytest.mark.parametrize('index', range(len(CONFIGURATIONS)))


def transformer(index: int = 0, **changes) -> MemoryAsContextTransformer:
    kwargs = {**CONFIGURATIONS[index], **changes}
    memory, memory_kwargs = kwargs.pop('memory'), kwargs.pop('neural_memory_kwargs', {})
    segment_len = kwargs.pop('segment_len', 5)
    segment = kwargs['neural_memory_segment_len'] or segment_len + kwargs['num_longterm_mem_tokens']
    if kwargs['neural_memory_batch_size']:
        kwargs['neural_memory_batch_size'] *= segment
    model = MemoryAsContextTransformer(
        num_tokens=TOKENS,
        dim=16,
        depth=kwargs.pop('depth', 3),
        segment_len=segment_len,
        dim_head=8,
        heads=2,
        neural_memory_model=memory(8, **({'depth': 2} if memory is MemoryMLP else {})),
        neural_memory_kwargs={'dim_head': 8, 'heads': 2, 'default_step_transform_max_lr': 0.3, **memory_kwargs},
        **kwargs,
    )
    return randomised(model, 0.1).double()


def ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, TOKENS, (batch, length))
