"""Sampling: filters on the logits, and the decoding loop that serves every model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from titans_pytorch.checks import check_positive, check_token_ids
from titans_pytorch.memory_state import NeuralMemState
from titans_pytorch.shapes import Float, Int


class DecodingCache(NamedTuple):
    """A model's state after some tokens; hand it to the next forward pass to continue from there."""

    seq_index: int
    """Positions processed, long-term memory tokens included."""
    key_values: list[tuple[Tensor, Tensor]]
    """For each layer the keys and values that later tokens can still see, (b, h, n, d)."""
    memories: list[NeuralMemState]
    """For each memory layer its state."""


class Decodable(Protocol):
    training: bool

    def __call__(self, x: Tensor, *, cache: Any, return_cache: bool, disable_flex_attn: bool) -> tuple[Tensor, Any]: ...
    def train(self, mode: bool = True) -> Any: ...


def min_p_filter(logits: Float[Tensor, '... l'], min_p: float = 0.1) -> Float[Tensor, '... l']:
    """Rule out tokens less likely than `min_p` times the likeliest (arXiv 2407.01082)."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), float('-inf'))


def gumbel_sample(logits: Float[Tensor, '... l'], temperature: float = 1.0) -> Int[Tensor, '... 1']:
    """A token from softmax(logits / temperature), by the Gumbel-max trick; the likeliest at temperature 0."""
    if temperature > 0.0:
        tiny = 1e-20
        uniform = torch.rand_like(logits)
        logits = logits / temperature - torch.log((-torch.log(uniform.clamp(min=tiny))).clamp(min=tiny))
    return logits.argmax(dim=-1, keepdim=True)


@torch.no_grad()
def sample(
    model: Decodable,
    prompt: Int[Tensor, 'b n'],
    seq_len: int,
    temperature: float,
    filter_fn: Callable[..., Tensor],
    filter_kwargs: Mapping[str, Any],
    show_progress: bool,
    use_cache: bool,
) -> Int[Tensor, 'b n']:
    """Tokens that `model` adds to `prompt` up to a total length of `seq_len`.

    With `use_cache` each step processes one token, otherwise the whole sequence; the result is the same.
    """
    check_token_ids('prompt', prompt, None)
    check_positive(seq_len=seq_len)

    was_training, out, cache = model.training, prompt, None
    model.train(False)
    try:
        for _ in tqdm(range(seq_len - prompt.shape[-1]), disable=not show_progress):
            logits, next_cache = model(out, cache=cache, return_cache=True, disable_flex_attn=True)
            cache = next_cache if use_cache else None
            logits = filter_fn(logits[:, -1], **filter_kwargs)
            out = torch.cat((out, gumbel_sample(logits, temperature)), dim=-1)
    finally:
        model.train(was_training)

    return out[:, prompt.shape[-1] :]
