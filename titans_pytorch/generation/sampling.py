"""Sampling from any model: `sample` returns the tokens added to a prompt, `stream` yields them as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from titans_pytorch.generation.decodable import CacheT, Decodable
from titans_pytorch.generation.evaluation import evaluation_mode
from titans_pytorch.generation.logits import check_best, min_p_filter, sampled
from titans_pytorch.generation.stepper import CallStepper, Stepper
from titans_pytorch.utils.checks import (
    check_callable,
    check_flags,
    check_integer,
    check_integers,
    check_keywords,
    check_number,
    checked_token_ids,
    described,
    values_are_at_hand,
)
from titans_pytorch.utils.shapes import Float, Int

# methods of every model


@overload
def sample(
    self: Decodable[CacheT], prompt: Tensor, seq_len: int, *args: Any, return_cache: Literal[True], **kwargs: Any
) -> tuple[Int[Tensor, 'b n'], CacheT]: ...


@overload
def sample(
    self: Decodable[CacheT],
    prompt: Tensor,
    seq_len: int,
    *args: Any,
    return_cache: Literal[False] = False,
    **kwargs: Any,
) -> Int[Tensor, 'b n']: ...


def sample(  # type: ignore[misc]  # the overloads name only what decides the result
    self: Decodable[CacheT],
    prompt: Int[Tensor, 'b n'],
    seq_len: int,
    temperature: float = 1.5,
    filter_fn: Callable[..., Tensor] = min_p_filter,
    filter_kwargs: Mapping[str, Any] = {'min_p': 0.1},
    show_progress: bool = True,
    use_cache: bool = False,
    *,
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
    """Tokens that continue `prompt` to a total length of `seq_len`.

    Args:
        prompt: token ids (batch, length) of any integer dtype, at least one.
        seq_len: total length, prompt included.
        temperature: 0 always picks the likeliest token; it cannot be negative.
        filter_fn: called as `filter_fn(logits, **filter_kwargs)` on the logits of each step, (batch, num_tokens).
        show_progress: show a progress bar.
        use_cache: carry the state from step to step. The tokens are the same, and the cost of a step does not grow with
            the length.
        prompt_lengths: length of each row of `prompt`, the rest of the row being padding. A row's tokens then follow
            its own prompt, and are padded on the right in turn.
        stop_tokens: token or tokens that end a sequence. The stop token itself is returned, followed by `pad_token`;
            sampling ends once every sequence has.
        pad_token: filler for the ends of rows. It need not be in the vocabulary (−1 and −100 are common): in its place
            the model then reads token 0, in rows that have ended.
        cache: cache of an earlier call, whose prompt and result `prompt` begins with; only the rest is processed.
        state: the same, but `prompt` holds only the rest: the last token of the earlier call, which that call did not
            read, and any new ones.
        return_cache: also return the cache for a later call. `cache`, `state` and `return_cache` imply `use_cache`.
        cuda_graphs: with a cache, replay the steps as CUDA graphs. Default: on a CUDA device.
        compiled: with a cache, on a CPU, compile the steps with `torch.compile`, which makes them several times as
            fast. Off by default, as it needs a C++ compiler, Python's headers and minutes in the first call for a batch
            size. Later calls reuse the compiled steps with the current values of the parameters. Changes to the model's
            modules, hooks, shapes or precision recompile them; changes to other attributes of modules have no effect.
        store: false to read the memories without writing them; see `forward`. Each step is then a call of the whole
            model, as it is when a module has hooks: exact and of constant cost, but slower.

    Returns:
        tokens (batch, seq_len − length of the shortest prompt), int64, or fewer if all sequences end; with
        `return_cache` a pair with the cache. The cache covers all tokens but the last; it is `None` after a prompt of
        one token to which nothing was added.

    Raises:
        ValueError, TypeError: for invalid arguments; and for logits without a valid token, NaN or all −inf. On a GPU,
            where a check in each step would synchronise with the device, such logits are reported at the end.
    """
    check_flags(show_progress=show_progress, use_cache=use_cache, return_cache=return_cache, store=store)
    request = _Request.of(self, prompt, prompt_lengths, seq_len, stop_tokens, pad_token)
    choose = _chooser(temperature, filter_fn, filter_kwargs)
    if use_cache or return_cache or cache is not None or state is not None:
        reader: _Reader | _CachedReader = _CachedReader(self, cache, state, cuda_graphs, compiled, store)
    else:
        reader = _Reader(self, store)
    tokens = _tokens(self, reader, request, choose)

    out = [request.prompt[:, :0]]
    with tqdm(total=max(0, request.seq_len - min(request.lengths)), disable=not show_progress) as progress:
        try:
            while True:
                out.append(next(tokens).unsqueeze(1))
                progress.update()
        except StopIteration as end:
            next_cache = end.value
    added = _without_prompts(torch.cat(out, dim=1), request.lengths, request.pad_token)
    return (added, next_cache) if return_cache else added


def stream(
    self: Decodable[CacheT],
    prompt: Int[Tensor, 'b n'],
    seq_len: int,
    temperature: float = 1.5,
    filter_fn: Callable[..., Tensor] = min_p_filter,
    filter_kwargs: Mapping[str, Any] = {'min_p': 0.1},
    *,
    prompt_lengths: Sequence[int] | Tensor | None = None,
    stop_tokens: int | Iterable[int] = (),
    pad_token: int = 0,
    cache: CacheT | None = None,
    state: CacheT | None = None,
    cuda_graphs: bool | None = None,
    compiled: bool = False,
    store: bool = True,
) -> Generator[Int[Tensor, ' b'], None, CacheT]:
    """Yield the tokens of `sample(…, use_cache=True)` position by position, (batch,) each, as they come.

    The arguments are those of `sample`. With `prompt_lengths`, positions start where the shortest prompt ends: a row
    first yields the rest of its own prompt, and then the tokens sampled for it.

    The model is in evaluation mode until the generator ends or is closed. The generator returns the cache for a later
    call: `cache = yield from model.stream(…)`.
    """
    request = _Request.of(self, prompt, prompt_lengths, seq_len, stop_tokens, pad_token)
    choose = _chooser(temperature, filter_fn, filter_kwargs)
    return _tokens(self, _CachedReader(self, cache, state, cuda_graphs, compiled, store), request, choose)


# the loop

Choose = Callable[[Float[Tensor, 'b l']], tuple[Int[Tensor, ' b'], Float[Tensor, ' b']]]


class _Request(NamedTuple):
    """Checked arguments that say which tokens to sample."""

    prompt: Int[Tensor, 'b n']
    lengths: list[int]
    """Length of each row's prompt; the rest of the row is padding."""
    seq_len: int
    stops: Int[Tensor, ' s']
    pad_token: int
    pad_input: int
    """The model's input in place of `pad_token`: the same, or a token of its vocabulary."""

    @classmethod
    def of(
        cls, model: Decodable, prompt: Any, prompt_lengths: Any, seq_len: Any, stop_tokens: Any, pad_token: Any
    ) -> _Request:
        num_tokens = model.num_tokens
        if num_tokens is None:
            raise ValueError('a model without num_tokens has no logits to sample from')
        prompt = checked_token_ids('prompt', prompt, None)
        lengths = _checked_lengths(prompt_lengths, *prompt.shape)
        if values_are_at_hand(prompt):  # padding may be outside the vocabulary
            unpadded = torch.cat([row[:length] for row, length in zip(prompt, lengths)])
            checked_token_ids('prompt', unpadded.unsqueeze(0), num_tokens)
        pad_token = check_integer('pad_token', pad_token)
        return cls(
            prompt=prompt,
            lengths=lengths,
            seq_len=check_integer('seq_len', seq_len, 1),
            stops=torch.tensor(_checked_stops(stop_tokens), dtype=torch.long, device=prompt.device),
            pad_token=pad_token,
            pad_input=pad_token if 0 <= pad_token < num_tokens else 0,
        )


@torch.no_grad()
def _tokens(
    model: Decodable, reader: _Reader | _CachedReader, request: _Request, choose: Choose
) -> Generator[Int[Tensor, ' b'], None, Any]:
    """Yield the tokens of all rows at each position from the end of the shortest prompt on; return the cache."""
    prompt, lengths, seq_len, stops, pad_token, pad_input = request
    ends = torch.tensor(lengths, device=prompt.device)
    shortest, longest = min(lengths), max(lengths)
    finished = torch.zeros_like(ends, dtype=torch.bool)
    worst = torch.zeros(len(prompt), device=prompt.device)
    tokens = prompt[:, shortest - 1]

    try:
        with evaluation_mode(model):
            if seq_len <= shortest:
                reader.read_all_but_last(prompt[:, :shortest])
            for position in range(shortest, seq_len):
                logits = reader.start(prompt[:, :shortest]) if position == shortest else reader(tokens)
                tokens, best = choose(logits)
                if position < longest:  # some rows still read their prompts
                    tokens = torch.where(position < ends, prompt[:, position], tokens)
                    best = best.masked_fill(position < ends, 0.0)
                if len(stops):
                    best = best.masked_fill(finished, 0.0)
                worst = torch.minimum(worst, best)
                if values_are_at_hand(worst):
                    check_best(worst)
                shown = tokens
                if len(stops):
                    shown, tokens = (tokens.masked_fill(finished, pad) for pad in (pad_token, pad_input))
                    finished = finished | (torch.isin(tokens, stops) & (position >= ends))
                yield shown
                if len(stops) and finished.all():
                    break
            check_best(worst)
            return reader.cache()
    finally:
        reader.release()


class _Reader:
    """Logits of the next token without a cache: the whole sequence is read again for every token."""

    def __init__(self, model: Decodable, store: bool):
        self.model, self.store = model, store

    def start(self, prompt: Int[Tensor, 'b n']) -> Float[Tensor, 'b l']:
        self.read = prompt
        return self.model(prompt, disable_flex_attn=True, store=self.store)[:, -1]

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        return self.start(torch.cat((self.read, tokens.unsqueeze(1)), dim=1))

    def read_all_but_last(self, prompt: Int[Tensor, 'b n']) -> None: ...

    def cache(self) -> None: ...

    def release(self) -> None: ...


class _CachedReader(Generic[CacheT]):
    """Logits of the next token with a cache: the prompt is read by one call, each further token by a step."""

    def __init__(
        self,
        model: Decodable[CacheT],
        cache: CacheT | None,
        state: CacheT | None,
        cuda_graphs: bool | None,
        compiled: bool,
        store: bool,
    ):
        if cache is not None and state is not None:
            raise ValueError(
                'pass cache (the prompt repeats the history) or state (the prompt holds only new tokens), not both'
            )
        check_flags(compiled=compiled, **({} if cuda_graphs is None else {'cuda_graphs': cuda_graphs}))
        self.model = model
        self.before = {'cache': cache} if state is None else {'state': state}
        self.after = cache if state is None else state
        self.cuda_graphs, self.compiled, self.store = cuda_graphs, compiled, store
        self.stepper: Stepper | CallStepper | None = None

    def start(self, prompt: Int[Tensor, 'b n']) -> Float[Tensor, 'b l']:
        logits, self.after = self.model(
            prompt, **self.before, return_cache=True, disable_flex_attn=True, store=self.store
        )
        self.before = {}
        return logits[:, -1]

    def read_all_but_last(self, prompt: Int[Tensor, 'b n']) -> None:
        """Bring the cache to the last token of a prompt to which no token is added."""
        repeated = self.before.get('cache')
        num_read = 0 if repeated is None else self.model.num_tokens_until(repeated.seq_index)
        if prompt.shape[1] - 1 != num_read:
            self.start(prompt[:, :-1])

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        if self.stepper is None:
            assert self.after is not None
            self.stepper = Stepper.of(self.model, self.after, self.cuda_graphs, self.compiled, self.store)
            self.after = None
        return self.stepper(tokens)

    def cache(self) -> CacheT | None:
        return self.after if self.stepper is None else self.stepper.cache()

    def release(self) -> None:
        if self.stepper is not None:
            self.stepper.release()


def _chooser(temperature: Any, filter_fn: Any, filter_kwargs: Any) -> Choose:
    """A function from logits to a token for each row, with the results of `sampled`."""
    temperature = check_number('temperature', temperature, at_least=0)
    check_callable(filter_fn=filter_fn)
    check_keywords(filter_kwargs=filter_kwargs)

    def choose(logits: Float[Tensor, 'b l']) -> tuple[Int[Tensor, ' b'], Float[Tensor, ' b']]:
        filtered = filter_fn(logits, **filter_kwargs)
        if not isinstance(filtered, Tensor) or filtered.shape != logits.shape:
            raise ValueError(f'filter_fn must return logits {tuple(logits.shape)}, got {described(filtered)}')
        return sampled(filtered, temperature)

    return choose


def _checked_lengths(lengths: Any, batch: int, longest: int) -> list[int]:
    """Length of each prompt; all of them `longest` if `lengths` is `None`."""
    if lengths is None:
        return [longest] * batch
    wanted = f'prompt_lengths must be {batch} integers from 1 to {longest}'
    try:
        checked = check_integers('prompt_lengths', lengths)
    except TypeError as cause:
        raise ValueError(f'{wanted}: {cause}') from cause
    if len(checked) != batch or not all(1 <= length <= longest for length in checked):
        raise ValueError(f'{wanted}, got {checked}')
    return checked


def _checked_stops(stop_tokens: Any) -> list[int]:
    is_single = isinstance(stop_tokens, (Tensor, np.ndarray)) and stop_tokens.ndim == 0
    if is_single or isinstance(stop_tokens, (int, np.integer)):
        return [check_integer('stop_tokens', stop_tokens)]
    return check_integers('stop_tokens', stop_tokens)


def _without_prompts(tokens: Int[Tensor, 'b n'], lengths: list[int], pad_token: int) -> Int[Tensor, 'b n']:
    """Rows without their own prompts beyond the shortest one, moved left and padded on the right."""
    if min(lengths) == max(lengths):
        return tokens
    rows = []
    for row, length in zip(tokens, lengths):
        own = row[length - min(lengths) :]
        rows.append(torch.cat((own, own.new_full((len(row) - len(own),), pad_token))))
    return torch.stack(rows)
