"""Choosing a token from logits: filters that remove unlikely tokens, and sampling by the Gumbel-max trick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.ops.token_choice import gumbel, token_choice, without_unlikely
from titans_pytorch.utils.checks import (
    check_broadcasts,
    check_callable,
    check_floating,
    check_integer,
    check_keywords,
    check_number,
    described,
    values_are_at_hand,
)
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Float, Int

DEFAULT_FILTER: Mapping[str, Any] = {'min_p': 0.1}
"""Arguments of `min_p_filter`, the default filter."""

Choose = Callable[[Float[Tensor, 'b l']], tuple[Int[Tensor, ' b'], Float[Tensor, ' b']]]
"""Maps logits to a token for each row; returns what `sampled` returns."""


def min_p_filter(logits: Float[Tensor, '... l'], min_p: float = 0.1) -> Float[Tensor, '... l']:
    """Set logits to −inf for tokens less likely than `min_p` times the likeliest (arXiv 2407.01082).

    `min_p` is a fraction from 0 to 1, or a tensor of fractions that broadcasts to the logits.
    """
    _check_logits(logits)
    if isinstance(min_p, Tensor):
        check_broadcasts('min_p', min_p, logits)
    else:
        checked_min_p(min_p)
    return without_unlikely(logits, min_p)


def top_k_filter(logits: Float[Tensor, '... l'], top_k: int) -> Float[Tensor, '... l']:
    """Set logits to −inf for all but the `top_k` likeliest tokens and those that tie with the last of them."""
    _check_logits(logits)
    top_k = min(_checked_top_k(top_k), logits.shape[-1])
    return logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float('-inf'))


def top_p_filter(logits: Float[Tensor, '... l'], top_p: float) -> Float[Tensor, '... l']:
    """Set logits to −inf for all but the fewest likeliest tokens whose probabilities add up to `top_p`, and those that
    tie with the last of them (nucleus sampling, arXiv 1904.09751). `top_p` is from 0 (keep the likeliest) to 1 (keep
    all)."""
    _check_logits(logits)
    top_p = _checked_top_p(top_p)
    if top_p == 1:
        return logits  # the rounded sum of all probabilities may reach 1 too early
    ordered = logits.sort(dim=-1, descending=True).values
    probs = at_least_float32(ordered).softmax(dim=-1)
    num_kept = (probs.cumsum(dim=-1) - probs < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return logits.masked_fill(logits < ordered.gather(-1, num_kept - 1), float('-inf'))


def filters(top_k: int | None = None, top_p: float | None = None) -> Callable[[Tensor], Tensor]:
    """Combine the filters that are not `None` into one function of logits; each sees only what the one before kept."""
    chosen: list[Callable[[Tensor], Tensor]] = []
    if top_k is not None:
        chosen.append(partial(top_k_filter, top_k=_checked_top_k(top_k)))
    if top_p is not None:
        chosen.append(partial(top_p_filter, top_p=_checked_top_p(top_p)))
    return lambda logits: reduce(lambda left, keep: keep(left), chosen, logits)


def gumbel_noise(t: Float[Tensor, ' ...'], generator: torch.Generator | None = None) -> Float[Tensor, ' ...']:
    """Standard Gumbel noise in the shape of `t`, in float32 at least: −log(−log u) of uniform u.

    `generator` supplies u, in place of PyTorch's global random state.
    """
    return gumbel(_uniform_noise(t, generator))


def gumbel_sample(
    logits: Float[Tensor, '... l'], temperature: float = 1.0, generator: torch.Generator | None = None
) -> Int[Tensor, '... 1']:
    """Sample a token from softmax(logits / temperature) by the Gumbel-max trick; temperature 0 picks the likeliest.

    `generator` supplies the noise, in place of PyTorch's global random state.

    Raises:
        ValueError: for a negative temperature, and for rows of logits without a valid token (NaN, or all −inf). Rows
            are checked on a CPU only: on a GPU the check would synchronise with the device.
    """
    temperature = check_number('temperature', temperature, at_least=0)
    _check_logits(logits)
    tokens, best = sampled(logits, temperature, generator)
    if values_are_at_hand(best):
        check_best(best)
    return tokens.unsqueeze(-1)


def sampled(
    logits: Float[Tensor, '... l'],
    temperature: float,
    generator: torch.Generator | None,
    min_p: float | None = None,
) -> tuple[Int[Tensor, ' ...'], Float[Tensor, ' ...']]:
    """A token for each row, and its logit plus noise, which is NaN or −inf if no token was valid.

    `min_p`: if given, the argument of `min_p_filter`, which is applied first.
    """
    # lower temperatures round to 0 in float32
    is_random = temperature >= torch.finfo(torch.float32).tiny
    return token_choice(logits, _uniform_noise(logits, generator) if is_random else None, temperature, min_p)


def chooser(
    temperature: Any,
    filter_fn: Any,
    filter_kwargs: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    generator: Any,
    device: torch.device,
) -> Choose:
    """The function that chooses tokens, from logits on `device`, as these arguments of `sample` describe."""
    keep, last_min_p = _checked_filter(filter_fn, filter_kwargs, top_k, top_p, min_p)
    temperature = check_number('temperature', temperature, at_least=0)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f'generator must be a torch.Generator, got {described(generator)}')
        if generator.device.type != device.type:
            raise ValueError(f'generator must be on the device of prompt, {device}, got {generator.device}')

    def choose(logits: Float[Tensor, 'b l']) -> tuple[Int[Tensor, ' b'], Float[Tensor, ' b']]:
        filtered = keep(logits)
        if not isinstance(filtered, Tensor) or filtered.shape != logits.shape:
            raise ValueError(f'filter_fn must return logits {tuple(logits.shape)}, got {described(filtered)}')
        return sampled(filtered, temperature, generator, last_min_p)

    return choose


def check_best(best: Float[Tensor, ' ...']) -> None:
    """Raise an error if a row had no valid token, judging by the second result of `sampled`."""
    if not (best > float('-inf')).all():  # NaN compares false too
        raise ValueError(
            'logits must leave a token to choose, and those of a row hold NaN or +inf, or are all -inf: '
            'the model returned them, or filter_fn removed every token'
        )


def log_probabilities(logits: Float[Tensor, '... l'], tokens: Int[Tensor, ' ...']) -> Float[Tensor, ' ...']:
    """Log-probability of each token under softmax(logits), in float32 at least."""
    return at_least_float32(logits).log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def checked_min_p(min_p: Any) -> float:
    """Return `min_p` as a number, or raise an error that names it."""
    return _checked_fraction('min_p', min_p, 'a fraction of the likeliest probability')


def _checked_filter(
    filter_fn: Any, filter_kwargs: Any, top_k: Any, top_p: Any, min_p: Any
) -> tuple[Callable[[Tensor], Any], float | None]:
    """A filter, and the `min_p` of the `min_p_filter` to apply after it, if any."""
    check_callable(filter_fn=filter_fn)
    check_keywords(filter_kwargs=filter_kwargs)
    if top_k is None and top_p is None and min_p is None:
        is_min_p = filter_fn is min_p_filter and [*filter_kwargs] == ['min_p']
        if not is_min_p or isinstance(filter_kwargs['min_p'], Tensor):
            return partial(filter_fn, **filter_kwargs), None
        return filters(), checked_min_p(filter_kwargs['min_p'])
    if filter_fn is not min_p_filter or filter_kwargs is not DEFAULT_FILTER:
        raise ValueError('pass filter_fn with filter_kwargs, or top_k, top_p and min_p, not both')
    return filters(top_k, top_p), None if min_p is None else checked_min_p(min_p)


def _uniform_noise(t: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(at_least_float32(t)).uniform_(generator=generator)


def _checked_top_k(top_k: Any) -> int:
    return check_integer('top_k', top_k, 1)


def _checked_top_p(top_p: Any) -> float:
    return _checked_fraction('top_p', top_p, 'a probability')


def _checked_fraction(name: str, value: Any, kind: str) -> float:
    if (checked := check_number(name, value, at_least=0)) > 1:
        raise ValueError(f'{name} must be {kind}, from 0 to 1, got {value}')
    return checked


def _check_logits(logits: Any) -> None:
    check_floating('logits', logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f'logits must be (…, num_tokens), got {tuple(logits.shape)}')
