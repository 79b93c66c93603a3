"""Sampling from any model: `sample` returns the tokens added to a prompt, `stream` yields them as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from tqdm import tqdm

from titans_pytorch.generation.decodable import CacheT, Decodable
from titans_pytorch.generation.evaluation import evaluation_mode
from titans_pytorch.generation.logits import (
    DEFAULT_FILTER,
    Choose,
    check_best,
    chooser,
    log_probabilities,
    min_p_filter,
)
from titans_pytorch.generation.readers import CachedReader, Reader, UncachedReader, joined_surprises
from titans_pytorch.generation.request import Request
from titans_pytorch.memory.state import LayerSurprises
from titans_pytorch.utils.checks import check_flags, values_are_at_hand
from titans_pytorch.utils.shapes import Float, Int


class Sampled(NamedTuple):
    """Sampled tokens with further results: what `sample` returns, or one position of a `stream`."""

    tokens: Int[Tensor, 'b n'] | Int[Tensor, ' b']
    logprobs: Float[Tensor, 'b n'] | Float[Tensor, ' b'] | None = None
    """Log-probability of each token under the model's own distribution, softmax(logits), before temperature and
    filters; 0 for padding. `None` if not requested."""
    surprises: LayerSurprises | None = None
    """Surprises of the chunks that were completed by reading the prompt and all tokens but the last; in a stream, those
    since the previous position. Rows are aligned by position, whatever the lengths of the prompts. `None` if not
    requested; empty if there are none."""
    cache: Any = None
    """The cache, from `sample(…, return_cache=True)`. A stream returns it when it ends."""


# methods of every model


@overload
def sample(
    self: Decodable[CacheT], prompt: Tensor, *args: Any, return_logprobs: Literal[True], **kwargs: Any
) -> Sampled: ...


@overload
def sample(
    self: Decodable[CacheT], prompt: Tensor, *args: Any, return_surprises: Literal[True], **kwargs: Any
) -> Sampled: ...


@overload
def sample(
    self: Decodable[CacheT], prompt: Tensor, *args: Any, return_cache: Literal[True], **kwargs: Any
) -> tuple[Int[Tensor, 'b n'], CacheT]: ...


@overload
def sample(
    self: Decodable[CacheT],
    prompt: Tensor,
    *args: Any,
    return_cache: Literal[False] = False,
    return_logprobs: Literal[False] = False,
    return_surprises: Literal[False] = False,
    **kwargs: Any,
) -> Int[Tensor, 'b n']: ...


def sample(  # type: ignore[misc]  # the overloads name only what decides the result
    self: Decodable[CacheT],
    prompt: Int[Tensor, 'b n'],
    seq_len: int | None = None,
    temperature: float = 1.5,
    filter_fn: Callable[..., Tensor] = min_p_filter,
    filter_kwargs: Mapping[str, Any] = DEFAULT_FILTER,
    show_progress: bool = True,
    use_cache: bool = False,
    *,
    max_new_tokens: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    return_logprobs: bool = False,
    return_surprises: bool = False,
    prompt_lengths: Sequence[int] | Tensor | None = None,
    stop_tokens: int | Iterable[int] = (),
    pad_token: int = 0,
    cache: CacheT | None = None,
    state: CacheT | None = None,
    return_cache: bool = False,
    cuda_graphs: bool | None = None,
    compiled: bool = False,
    store: bool = True,
) -> Any:
    """Sample tokens that continue `prompt`, to a total length of `seq_len` or by `max_new_tokens`.

    Args:
        prompt: token ids (batch, length) of any integer dtype, with at least one token.
        seq_len: total length, prompt included.
        temperature: 0 always picks the likeliest token; negative values are an error. The default temperature, 1.5, and
            the default filter, `min_p` at 0.1, are the reference's.
        filter_fn: called as `filter_fn(logits, **filter_kwargs)` on the logits of each step, (batch, num_tokens).
            Filters see the model's own distribution: the temperature is applied to what they leave.
        show_progress: show a progress bar.
        use_cache: carry the state from step to step. The tokens are the same, but the cost of a step does not grow with
            the length.
        max_new_tokens: tokens to add to each row, in place of `seq_len`.
        top_k: keep the `top_k` likeliest tokens.
        top_p: keep the fewest likeliest tokens whose probabilities add up to `top_p`, from 0 to 1.
        min_p: keep tokens at least `min_p` times as likely as the likeliest, from 0 to 1. `top_k`, `top_p` and `min_p`
            are applied in this order and replace the default filter; they cannot be combined with `filter_fn`.
        generator: source of random numbers for this call, which then neither uses nor changes PyTorch's global random
            state. It must be on the device of `prompt`.
        return_logprobs: also return the log-probability of each token; see `Sampled`.
        return_surprises: also return the surprises of every memory layer; see `forward` and `Sampled`.
        prompt_lengths: length of each row of `prompt`; the rest of the row is padding. Sampled tokens follow the row's
            own prompt, and are padded on the right in turn.
        stop_tokens: token or tokens of the vocabulary that end a sequence. The stop token itself is returned, followed
            by `pad_token`; sampling stops once every sequence has ended.
        pad_token: filler for the ends of rows. It need not be in the vocabulary (−1 and −100 are common): in rows that
            have ended, the model then reads token 0 in its place.
        cache: cache of an earlier call. `prompt` must begin with that call's prompt and result; only the rest is
            processed.
        state: the same as `cache`, but `prompt` holds only the rest: the last token of the earlier call, which that
            call did not read, and any new ones.
        return_cache: also return the cache for a later call. `cache`, `state` and `return_cache` imply `use_cache`. A
            cache has one position for all rows, so prompts of different lengths need `seq_len`, with which rows end
            together. Rows that a stop token ended earlier have also read the filler after it.
        cuda_graphs: with a cache, replay the steps as CUDA graphs. Default: on a CUDA device.
        compiled: with a cache, on a CPU, compile the steps with `torch.compile`, which makes them several times faster.
            Off by default, because it needs a C++ compiler and Python's headers, and takes minutes in the first call
            for each batch size. Later calls reuse the compiled steps with the current values of the parameters. Changes
            to the model's modules, hooks, shapes or precision recompile them; changes to other attributes of modules
            have no effect.
        store: false to read the memories without writing to them; see `forward`. Each step is then a call of the whole
            model, as it is when a module has hooks: exact and of constant cost, but slower.

    Returns:
        tokens (batch, seq_len − length of the shortest prompt) or (batch, max_new_tokens), int64; fewer if all
        sequences end early. With `return_cache`, a pair of tokens and cache; with `return_logprobs` or
        `return_surprises`, a `Sampled`. The cache covers all tokens but the last. It is `None` after a prompt of one
        token to which nothing was added.

    Raises:
        ValueError, TypeError: for invalid arguments, and for rows of logits that hold NaN or +inf, or are all −inf. On
            a GPU such rows are reported at the end, because a check in each step would synchronise with the device.
    """
    check_flags(show_progress=show_progress, use_cache=use_cache, return_cache=return_cache, store=store)
    check_flags(return_logprobs=return_logprobs, return_surprises=return_surprises)
    cached = use_cache or return_cache or cache is not None or state is not None
    _check_runner(cached, cuda_graphs, compiled)
    request = Request.of(self, prompt, prompt_lengths, seq_len, max_new_tokens, stop_tokens, pad_token)
    if return_cache and not request.has_one_limit:
        raise ValueError(
            'return_cache=True needs rows that end together: '
            'with prompts of different lengths pass seq_len in place of max_new_tokens'
        )
    choose = chooser(temperature, filter_fn, filter_kwargs, top_k, top_p, min_p, generator, request.prompt.device)
    reader: Reader
    if cached:
        reader = CachedReader(self, store, return_surprises, cache, state, cuda_graphs, compiled)
    else:
        reader = UncachedReader(self, store, return_surprises)
    positions = _positions(reader, request, choose, return_logprobs)

    out: list[Sampled] = []
    with tqdm(total=max(0, request.seq_len - min(request.lengths)), disable=not show_progress) as progress:
        try:
            while True:
                out.append(next(positions))
                progress.update()
        except StopIteration as end:
            next_cache = end.value
    added = request.by_row([position.tokens for position in out], request.pad_token)
    if not (return_logprobs or return_surprises):
        return (added, next_cache) if return_cache else added
    surprises = [position.surprises or {} for position in out] + [reader.new_surprises() or {}]
    return Sampled(
        tokens=added,
        logprobs=request.by_row([position.logprobs for position in out], 0.0) if return_logprobs else None,
        surprises=joined_surprises(surprises) if return_surprises else None,
        cache=next_cache if return_cache else None,
    )


def stream(
    self: Decodable[CacheT],
    prompt: Int[Tensor, 'b n'],
    seq_len: int | None = None,
    temperature: float = 1.5,
    filter_fn: Callable[..., Tensor] = min_p_filter,
    filter_kwargs: Mapping[str, Any] = DEFAULT_FILTER,
    *,
    max_new_tokens: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    return_logprobs: bool = False,
    return_surprises: bool = False,
    prompt_lengths: Sequence[int] | Tensor | None = None,
    stop_tokens: int | Iterable[int] = (),
    pad_token: int = 0,
    cache: CacheT | None = None,
    state: CacheT | None = None,
    cuda_graphs: bool | None = None,
    compiled: bool = False,
    store: bool = True,
) -> Generator[Any, None, CacheT | None]:
    """Yield the tokens of `sample(…, use_cache=True)` as they come, one position at a time, (batch,) each.

    The arguments are those of `sample`. With `return_logprobs` or `return_surprises` each position is a `Sampled`. With
    `prompt_lengths`, positions start where the shortest prompt ends: a row first yields the rest of its own prompt, and
    then the tokens sampled for it.

    The model stays in evaluation mode until the generator ends or is closed. The generator returns the cache for a
    later call: `cache = yield from model.stream(…)`. It is `None` where `sample` would refuse `return_cache`.
    """
    check_flags(return_logprobs=return_logprobs, return_surprises=return_surprises)
    _check_runner(True, cuda_graphs, compiled)
    request = Request.of(self, prompt, prompt_lengths, seq_len, max_new_tokens, stop_tokens, pad_token)
    choose = chooser(temperature, filter_fn, filter_kwargs, top_k, top_p, min_p, generator, request.prompt.device)
    reader = CachedReader(self, store, return_surprises, cache, state, cuda_graphs, compiled)
    positions = _positions(reader, request, choose, return_logprobs)
    return _copied_positions(positions, whole=return_logprobs or return_surprises)


def _check_runner(cached: bool, cuda_graphs: Any, compiled: Any) -> None:
    """Check the flags that say how steps run. They require a cache, because there are no steps without one."""
    flags = {'compiled': compiled} | ({} if cuda_graphs is None else {'cuda_graphs': cuda_graphs})
    check_flags(**flags)
    for name, flag in flags.items():
        if flag and not cached:
            raise ValueError(f'{name}=True needs use_cache=True')


# the loop


@torch.no_grad()
def _positions(reader: Reader, request: Request, choose: Choose, logprobs: bool) -> Generator[Sampled, None, Any]:
    """Yield all rows at each position, starting at the end of the shortest prompt; return the cache."""
    prompt, lengths, _, stops, pad_token, pad_input = request
    ends, limits = (torch.tensor(of_rows, device=prompt.device) for of_rows in (lengths, request.limits))
    shortest, longest = min(lengths), max(lengths)
    may_end_early, finished = request.rows_end_early, limits <= shortest
    unchecked: list[Tensor] = []  # for tokens chosen so far, the results of `choose` that say whether they were valid
    tokens = prompt[:, shortest - 1]

    try:
        with evaluation_mode(reader.model):
            if request.seq_len <= shortest:
                reader.read_all_but_last(prompt[:, :shortest])
            for position in range(shortest, request.seq_len):
                logits = reader.start(prompt[:, :shortest]) if position == shortest else reader(tokens)
                # a copy, because a filter may change logits in place
                tokens, best = choose(logits.clone() if logprobs else logits)
                if position < longest:  # some rows still read their prompts
                    tokens = torch.where(position < ends, prompt[:, position], tokens)
                    best = best.masked_fill(position < ends, 0.0)
                if may_end_early:
                    best = best.masked_fill(finished, 0.0)
                unchecked = _checked_at_hand([*unchecked, best])
                shown, of_tokens = tokens, None
                if logprobs:
                    of_tokens = log_probabilities(logits, tokens).masked_fill(finished, 0.0)
                if may_end_early:
                    shown, tokens = (tokens.masked_fill(finished, pad) for pad in (pad_token, pad_input))
                    stopped = torch.isin(tokens, stops) & (position >= ends)
                    finished = finished | stopped | (position + 1 >= limits)
                yield Sampled(shown, of_tokens, reader.new_surprises())
                if may_end_early and finished.all():
                    break
            if unchecked:
                check_best(torch.stack(unchecked))
            return reader.cache() if request.has_one_limit else None
    finally:
        reader.release()


_MOST_UNCHECKED = 64
"""Number of steps after which results to be checked are reduced to their minimum, which keeps NaN."""


def _checked_at_hand(unchecked: list[Tensor]) -> list[Tensor]:
    """Check that chosen tokens were valid where this does not wait for a GPU; return what remains to be checked."""
    if values_are_at_hand(unchecked[-1]):
        check_best(unchecked[-1])
        return []
    return unchecked if len(unchecked) < _MOST_UNCHECKED else [torch.stack(unchecked).amin(dim=0)]


def _copied_positions(positions: Generator[Sampled, None, Any], whole: bool) -> Generator[Any, None, Any]:
    """Yield whole positions, or only their tokens; return the cache. Tokens are copied, as the next step reads them."""
    with contextlib.closing(positions):
        while True:
            try:
                position = next(positions)
            except StopIteration as end:
                return end.value
            tokens = position.tokens.clone()
            yield position._replace(tokens=tokens) if whole else tokens
