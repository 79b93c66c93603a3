"""The sizes and settings of the paper's models (Titans, section 5.1), as arguments of the models here."""

from __future__ import annotations

from typing import Any

from torch import nn

SIZES = {'170M': (12, 768, 16), '340M': (24, 1024, 16), '760M': (24, 1536, 16)}
"""Layers, width and heads, by the paper's names for them. With a vocabulary of 32,000 and default feedforwards the
models here have 145, 407 and 865 million parameters (LMM), 174, 508 and 1,092 (MAG, MAL), a few more (MAC)."""


def memory_settings(**changes: Any) -> dict[str, Any]:
    """Arguments of `NeuralMemory` for the memory that section 4.4 describes.

    SiLU and a convolution on queries, keys and values, queries and keys of length 1, a normalised and gated output. The
    paper gives neither step sizes nor initial gates. Here forgetting starts at less than 1 % a chunk, as a memory that
    forgets faster from the start learns little to keep, and steps at up to 1, as keys have length 1.
    """
    return {
        'activation': nn.SiLU(),
        'qk_l2norm': True,
        'conv_kernel': 4,
        'post_rmsnorm': True,
        'channel_gate': True,
        'init_decay_bias': -5.0,
        'default_step_transform_max_lr': 1.0,
        **changes,
    }


def preset(size: str, **memory_changes: Any) -> dict[str, Any]:
    """Arguments of any of the models for one of the paper's `SIZES`; `memory_changes` go to `memory_settings`.

        MemoryAsGateTransformer(num_tokens=32000, segment_len=512, neural_memory_segment_len=16, **preset('170M'))

    Raises:
        ValueError: for a size that the paper does not have.
    """
    if size not in SIZES:
        raise ValueError(f'size must be one of {[*SIZES]}, got {size!r}')
    depth, dim, heads = SIZES[size]
    return {
        'depth': depth,
        'dim': dim,
        'heads': heads,
        'dim_head': dim // heads,
        'neural_memory_kwargs': memory_settings(heads=heads, dim_head=dim // heads, **memory_changes),
    }
