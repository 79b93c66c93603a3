"""Sizes and settings of the paper's models (Titans, section 5.1), as arguments of the models in this package."""

from __future__ import annotations

from typing import Any

from torch import nn

from titans_pytorch.utils.checks import check_integer, check_positive, described

SIZES = {'170M': (12, 768, 16), '340M': (24, 1024, 16), '760M': (24, 1536, 16)}
"""Depth, width and heads of each size in the paper. With a vocabulary of 32,000 and default feedforwards, the models in
this package have 145, 407 and 865 million parameters (LMM), 174, 508 and 1,092 (MAG, MAL), 181, 521 and 1,122 (MAC)."""


def memory_settings(heads: int, dim_head: int, memory_batch: int | None = None, **changes: Any) -> dict[str, Any]:
    """Arguments of `NeuralMemory` for the memory of section 4.4; `changes` override them.

    SiLU and a convolution on queries, keys and values; l2-normalised queries and keys; a normalised and gated output;
    and a plain MLP as the network. The paper specifies neither step sizes nor initial gates. Here decay starts below
    1 % per chunk, because a memory that forgets faster from the start learns to retain little.

    Step sizes: the loss is a mean over `dim_head` features, so a step size of dim_head / 2 moves the value retrieved
    for a key of norm 1 all the way to its target. That is the maximum if gradients are taken at the initial weights (no
    `memory_batch`). If they are taken at newer weights, proximal steps with normalised momentum do not overshoot within
    a memory batch, and the maximum is four times as large. Step sizes then start near dim_head / 2, because models with
    smaller steps learned associative recall later (docs/log.md). The closer the memory batch is to a single chunk, the
    more each step stores. With momentum in chunks of one token, one of two models diverged (docs/guides/stability.md);
    `delta_rule_settings` has no momentum.

    In `MemoryAsContextTransformer(paper_order=True)` a memory batch is a segment. With `proximal_steps=False` the
    maximum is dim_head / (32 · memory_batch), and next to nothing is stored: plain steps add up over a memory batch,
    and a maximum eight times as large diverged after some hundred steps of training on text.
    """
    heads, dim_head = check_positive(heads=heads, dim_head=dim_head)
    memory_batch = None if memory_batch is None else check_integer('memory_batch', memory_batch, 1)
    # proximal steps exclude anything that changes the loss, or a step afterwards
    others = ('spectral_norm_surprises', 'max_grad_norm', 'store_memory_loss_fn')
    plain = memory_batch is None or any(changes.get(name) for name in others)
    proximal = changes.get('proximal_steps', not plain)
    if proximal:
        max_step_size = 2.0 * dim_head
    else:
        max_step_size = dim_head / (2 if memory_batch is None else 32 * memory_batch)
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
        'default_step_transform_max_lr': max_step_size,
        'init_adaptive_step_bias': -1.0 if proximal else None,
        'proximal_steps': proximal,
        'normalized_momentum': proximal and changes.get('momentum', True),
        **changes,
    }


def delta_rule_settings(heads: int, dim_head: int, **changes: Any) -> dict[str, Any]:
    """Arguments of `NeuralMemory` for a gated delta rule in chunks of one token; `changes` override them.

    A linear memory without momentum, W ← (1 − α) W + β kᵀ (v − k W), as in Gated DeltaNet (arXiv 2412.06464), except
    that errors are computed with the weights before they decay. Since β ≤ 1, a step moves the value retrieved for a key
    no further than its target. Everything else is as in `memory_settings`. On long text, no other memory was as good in
    equal time (docs/benchmarks.md).

        LongTermMemoryModel(
            num_tokens=256, dim=512, depth=4, heads=4,
            neural_memory_segment_len=1, neural_memory_batch_size=1,
            neural_memory_kwargs=delta_rule_settings(heads=4, dim_head=128),
        )
    """
    heads, dim_head = check_positive(heads=heads, dim_head=dim_head)
    plain = {'momentum': False, 'proximal_steps': False, 'default_step_transform_max_lr': dim_head / 2}
    return memory_settings(heads, dim_head, 1, **{'default_model_kwargs': {'depth': 1}, **plain, **changes})


def preset(size: str, memory_batch: int | None = None, **memory_changes: Any) -> dict[str, Any]:
    """Arguments of any of the models for one of the paper's `SIZES`; `memory_changes` are passed to `memory_settings`.

        sizes = preset('170M', memory_batch=16)
        MemoryAsGateTransformer(num_tokens=32000, segment_len=512, neural_memory_segment_len=16, **sizes)

    With `paper_order=True`, pass the length of a segment as `memory_batch`: without it, plain steps diverge there. Pass
    the same `neural_memory_segment_len` too, and `detach_context=True`, because gradients explode in long windows
    otherwise.

    Raises:
        ValueError: for a size that is not in the paper.
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
