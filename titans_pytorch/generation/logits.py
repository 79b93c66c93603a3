"""A choice of one token from logits: the min-p filter, and sampling by the Gumbel-max trick."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_pytorch.utils.checks import check_broadcasts, check_floating, check_number, values_are_at_hand
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Float, Int


def min_p_filter(logits: Float[Tensor, '... l'], min_p: float = 0.1) -> Float[Tensor, '... l']:
    """Logits with −inf for tokens less likely than `min_p` times the likeliest (arXiv 2407.01082).

    `min_p` is a fraction from 0 to 1, or a tensor of fractions that broadcasts to the logits.
    """
    _check_logits(logits)
    if isinstance(min_p, Tensor):
        check_broadcasts('min_p', min_p, logits)
    elif check_number('min_p', min_p, at_least=0) > 1:
        raise ValueError(f'min_p must be a fraction of the likeliest probability, from 0 to 1, got {min_p}')
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), float('-inf'))


def gumbel_noise(t: Float[Tensor, ' ...']) -> Float[Tensor, ' ...']:
    """Standard Gumbel noise of the shape of `t`, in float32 at least: −log(−log u) of uniform u."""
    tiny = 1e-20
    return -torch.log((-torch.log(torch.rand_like(at_least_float32(t)).clamp(min=tiny))).clamp(min=tiny))


def gumbel_sample(logits: Float[Tensor, '... l'], temperature: float = 1.0) -> Int[Tensor, '... 1']:
    """A token from softmax(logits / temperature), by the Gumbel-max trick; the likeliest at temperature 0.

    Raises:
        ValueError: for a negative temperature, and for rows of logits without a valid token (NaN, or all −inf). Rows
            are checked on a CPU only: on a GPU the check would synchronise with the device.
    """
    temperature = check_number('temperature', temperature, at_least=0)
    _check_logits(logits)
    tokens, best = sampled(logits, temperature)
    if values_are_at_hand(best):
        check_best(best)
    return tokens.unsqueeze(-1)


def sampled(logits: Float[Tensor, '... l'], temperature: float) -> tuple[Int[Tensor, ' ...'], Float[Tensor, ' ...']]:
    """A token for each row, and its logit with the noise added, which is NaN or −inf if no token was valid."""
    if temperature > 0.0:
        logits = logits / temperature + gumbel_noise(logits)
    best, tokens = logits.max(dim=-1)
    return tokens, best


def check_best(best: Float[Tensor, ' ...']) -> None:
    """Refuse rows without a valid token, by the logits of the tokens sampled."""
    if not (best > float('-inf')).all():  # NaN compares false too
        raise ValueError(
            'logits must leave a token to choose, and those of a row are NaN or all -inf: '
            'the model returned them, or filter_fn removed every token'
        )


def _check_logits(logits: Any) -> None:
    check_floating('logits', logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f'logits must be (…, num_tokens), got {tuple(logits.shape)}')
