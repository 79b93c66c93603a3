"""The sizes and settings of the paper's models (Titans, section 5.1), as arguments of the models here."""

from __future__ import annotations

from typing import Any

from torch import nn

from titans_pytorch.utils.checks import check_integer, check_positive, described

SIZES = {'170M': (12, 768, 16), '340M': (24, 1024, 16), '760M': (24, 1536, 16)}
"""Layers, width and heads, by the paper's names for them. With a vocabulary of 32,000 and default feedforwards the
models here have 145, 407 and 865 million parameters (LMM), 174, 508 and 1,092 (MAG, MAL), 181, 521 and 1,122 (MAC)."""


def memory_settings(heads: int, dim_head: int, memory_batch: int | None = None, **changes: Any) -> dict[str, Any]:
    """Arguments of `NeuralMemory` for the memory that section 4.4 describes; `changes` come last.

    SiLU and a convolution on queries, keys and values, queries and keys of length 1, a normalised and gated output, and
    a network that is an MLP and nothing more. The paper gives neither step sizes nor initial gates. Here forgetting
    starts at less than 1 % a chunk, as a memory that forgets faster from the start learns little to keep.

    Step sizes: the loss is a mean over `dim_head` features, so that a step of dim_head / 2 moves what a key of length 1
    retrieves all the way to its value; they are up to that. Where base weights move on every `memory_batch` tokens,
    all of whose steps are taken at the same weights, such steps add up and diverge: then it is
    dim_head / (32 · memory_batch), as training on text at eight times that diverged too, after some hundred steps. In
    `MemoryAsContextTransformer(paper_order=True)` a memory batch is a segment.
    """
    heads, dim_head = check_positive(heads=heads, dim_head=dim_head)
    memory_batch = None if memory_batch is None else check_integer('memory_batch', memory_batch, 1)
    return {
        'heads': heads,
        'dim_head': dim_head,
        'activation': nn.SiLU(),
        'qk_l2norm': True,
        'conv_kernel': 4,
        'post_rmsnorm': True,
        'channel_gate': True,
        'init_decay_bias': -5.0,
        'mem_model_norm_add_residual': False,
        'default_step_transform_max_lr': dim_head / (2 if memory_batch is None else 32 * memory_batch),
        **changes,
    }


def preset(size: str, memory_batch: int | None = None, **memory_changes: Any) -> dict[str, Any]:
    """Arguments of any of the models for one of the paper's `SIZES`; the others are those of `memory_settings`.

        MemoryAsGateTransformer(num_tokens=32000, segment_len=512, neural_memory_segment_len=16, **preset('170M'))

    With `paper_order=True` give `memory_batch`, the length of a segment: steps for gradients at the initial weights
    diverge there.

    Raises:
        ValueError: for a size that the paper does not have.
    """
    if not isinstance(size, str) or size not in SIZES:
        raise ValueError(f'size must be one of {[*SIZES]}, got {described(size)}')
    depth, dim, heads = SIZES[size]
    return {
        'depth': depth,
        'dim': dim,
        'heads': heads,
        'dim_head': dim // heads,
        'neural_memory_batch_size': memory_batch,
        'neural_memory_kwargs': memory_settings(heads, dim // heads, memory_batch, **memory_changes),
    }
