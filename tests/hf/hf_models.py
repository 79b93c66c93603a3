"""Small Hugging Face models of every architecture."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from compare import randomised
from torch import Tensor

from titans_pytorch.hf import TitansConfig, TitansForCausalLM

MEMORY = {'dim_head': 4, 'heads': 2, 'default_step_transform_max_lr': 0.3}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    'MAC': {
        'architecture': 'mac',
        'num_longterm_mem_tokens': 1,
        'num_persist_mem_tokens': 1,
        'neural_memory_batch_size': 4,
        'neural_mem_weight_residual': True,
        'neural_memory_qkv_receives_diff_views': True,
    },
    'MAC, paper order': {'architecture': 'mac', 'paper_order': True, 'num_residual_streams': 1},
    'MAG': {'architecture': 'mag', 'neural_memory_kwargs': {**MEMORY, 'conv_kernel': 3}},
    'MAL': {'architecture': 'mal', 'neural_memory_layers': [2], 'num_residual_streams': 2},
    'LMM': {'architecture': 'lmm', 'neural_memory_model': {'type': 'MemorySwiGluMLP', 'dim': 4}},
}
SIZES = {'num_tokens': 13, 'dim': 8, 'depth': 2, 'segment_len': 4, 'heads': 2, 'dim_head': 4, 'pad_token_id': 0}
architectures = pytest.mark.parametrize('name', ARCHITECTURES)


def config(name: str = 'MAG', **changes: Any) -> TitansConfig:
    common = {**SIZES, 'neural_memory_segment_len': 2, 'neural_memory_kwargs': MEMORY}
    return TitansConfig(**{**common, **ARCHITECTURES[name], **changes})


def model(name: str = 'MAG', **changes: Any) -> TitansForCausalLM:
    """In float64 and evaluation mode, with no parameter at its initial value."""
    torch.manual_seed(len(name))
    random.seed(0)
    return randomised(TitansForCausalLM(config(name, **changes)), 0.1).double().eval()


def batch(padding: str = 'left') -> tuple[Tensor, Tensor]:
    """Three rows of 9, 5 and 2 tokens, and their mask."""
    lengths = torch.tensor([[9], [5], [2]])
    columns = torch.arange(9)
    mask = columns >= 9 - lengths if padding == 'left' else columns < lengths
    return torch.randint(1, 13, (3, 9)), mask.long()


def rows(x: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row without its padding, as a batch of one."""
    return [row[real.bool()].unsqueeze(0) for row, real in zip(x, mask)]
