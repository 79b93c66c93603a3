"""Sampling from any model: `sample` returns the tokens added to a prompt, `stream` yields them as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from titans_pytorch.generation.decodable import CacheT, Decodable
from titans_pytorch.generation.evaluation import evaluation_mode
from titans_pytorch.generation.logits import (
    check_best,
    checked_min_p,
    filters,
    log_probabilities,
    min_p_filter,
    sampled,
)
from titans_pytorch.generation.stepper import CallStepper, Stepper
from titans_pytorch.memory.state import LayerSurprises, Surprises
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

DEFAULT_FILTER: Mapping[str, Any] = {'min_p': 0.1}
"""Arguments of `min_p_filter`, the default filter."""


class Sampled(NamedTuple):
    """Sampled tokens and more about them: the result of `sample`, or one position of `stream`."""

    tokens: Int[Tensor, 'b n'] | Int[Tensor, ' b']
    logprobs: Float[Tensor, 'b n'] | Float[Tensor, ' b'] | None = None
    """Log-probability of each token under the model's own distribution, softmax(logits), before temperature and
    filters; 0 for padding. `None` if not requested."""
    surprises: LayerSurprises | None = None
    """Surprises of the chunks that were completed by reading the prompt and all tokens but the last; in a stream, those
    since the position before. Rows are aligned by position, whatever the lengths of the prompts. `None` if not
    requested; empty if there are none."""
    cache: Any = None
    """The cache, from `sample(…, return_cache=True)`. A stream returns it at its end."""


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
    """Tokens that continue `prompt`, to a total length of `seq_len` or by `max_new_tokens`.

    Args:
        prompt: token ids (batch, length) of any integer dtype, at least one.
        seq_len: total length, prompt included.
        temperature: 0 always picks the likeliest token; it cannot be negative. Default: that of the reference, 1.5, as
            is the filter, `min_p` at 0.1.
        filter_fn: called as `filter_fn(logits, **filter_kwargs)` on the logits of each step, (batch, num_tokens).
            Filters see the model's own distribution: the temperature is applied to what they leave.
        show_progress: show a progress bar.
        use_cache: carry the state from step to step. The tokens are the same, and the cost of a step does not grow with
            the length.
        max_new_tokens: tokens to add to each row, in place of `seq_len`.
        top_k: keep the `top_k` likeliest tokens.
        top_p: keep the fewest likeliest tokens whose probabilities add up to `top_p`, from 0 to 1.
        min_p: keep tokens at least `min_p` times as likely as the likeliest, from 0 to 1. `top_k`, `top_p` and `min_p`
            are applied in this order and replace the default filter; they cannot be combined with `filter_fn`.
        generator: random numbers of its own for this call, which then neither depends on PyTorch's global random state
            nor changes it. It must be on the device of `prompt`.
        return_logprobs: also return the log-probability of each token; see `Sampled`.
        return_surprises: also return the surprises of every memory layer; see `forward` and `Sampled`.
        prompt_lengths: length of each row of `prompt`, the rest of the row being padding. A row's tokens then follow
            its own prompt, and are padded on the right in turn.
        stop_tokens: token or tokens of the vocabulary that end a sequence. The stop token itself is returned, followed
            by `pad_token`; sampling ends once every sequence has.
        pad_token: filler for the ends of rows. It need not be in the vocabulary (−1 and −100 are common): in its place
            the model then reads token 0, in rows that have ended.
        cache: cache of an earlier call, whose prompt and result `prompt` begins with; only the rest is processed.
        state: the same, but `prompt` holds only the rest: the last token of the earlier call, which that call did not
            read, and any new ones.
        return_cache: also return the cache for a later call. `cache`, `state` and `return_cache` imply `use_cache`. A
            cache has one position for all rows, so prompts of different lengths need `seq_len`, where rows end
            together. Rows that a stop token has ended earlier have read the filler after it.
        cuda_graphs: with a cache, replay the steps as CUDA graphs. Default: on a CUDA device.
        compiled: with a cache, on a CPU, compile the steps with `torch.compile`, which makes them several times as
            fast. Off by default, as it needs a C++ compiler, Python's headers and minutes in the first call for a batch
            size. Later calls reuse the compiled steps with the current values of the parameters. Changes to the model's
            modules, hooks, shapes or precision recompile them; changes to other attributes of modules have no effect.
        store: false to read the memories without writing them; see `forward`. Each step is then a call of the whole
            model, as it is when a module has hooks: exact and of constant cost, but slower.

    Returns:
        tokens (batch, seq_len − length of the shortest prompt) or (batch, max_new_tokens), int64, or fewer if all
        sequences end; with `return_cache` a pair with the cache; with `return_logprobs` or `return_surprises` a
        `Sampled`. The cache covers all tokens but the last; it is `None` after a prompt of one token to which nothing
        was added.

    Raises:
        ValueError, TypeError: for invalid arguments; and for rows of logits that hold NaN or +inf, or are all −inf. On
            a GPU, where a check in each step would synchronise with the device, these are reported at the end.
    """
    check_flags(show_progress=show_progress, use_cache=use_cache, return_cache=return_cache, store=store)
    check_flags(return_logprobs=return_logprobs, return_surprises=return_surprises)
    cached = use_cache or return_cache or cache is not None or state is not None
    _check_runner(cached, cuda_graphs, compiled)
    request = _Request.of(self, prompt, prompt_lengths, seq_len, max_new_tokens, stop_tokens, pad_token)
    if return_cache and not request.has_one_limit:
        raise ValueError(
            'return_cache=True needs rows that end together: '
            'with prompts of different lengths pass seq_len in place of max_new_tokens'
        )
    kept = _Filter.of(filter_fn, filter_kwargs, top_k, top_p, min_p)
    choose = _chooser(temperature, kept, generator, request.prompt)
    reader: _Reader
    if cached:
        reader = _CachedReader(self, store, return_surprises, cache, state, cuda_graphs, compiled)
    else:
        reader = _UncachedReader(self, store, return_surprises)
    positions = _positions(self, reader, request, choose, return_logprobs)

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
        surprises=_joined(surprises) if return_surprises else None,
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
    """Yield the tokens of `sample(…, use_cache=True)` position by position, (batch,) each, as they come.

    The arguments are those of `sample`. With `return_logprobs` or `return_surprises` each position is a `Sampled`. With
    `prompt_lengths`, positions start where the shortest prompt ends: a row first yields the rest of its own prompt, and
    then the tokens sampled for it.

    The model is in evaluation mode until the generator ends or is closed. The generator returns the cache for a later
    call: `cache = yield from model.stream(…)`. It is `None` where `sample` refuses `return_cache`.
    """
    check_flags(return_logprobs=return_logprobs, return_surprises=return_surprises)
    _check_runner(True, cuda_graphs, compiled)
    request = _Request.of(self, prompt, prompt_lengths, seq_len, max_new_tokens, stop_tokens, pad_token)
    kept = _Filter.of(filter_fn, filter_kwargs, top_k, top_p, min_p)
    choose = _chooser(temperature, kept, generator, request.prompt)
    reader = _CachedReader(self, store, return_surprises, cache, state, cuda_graphs, compiled)
    positions = _positions(self, reader, request, choose, return_logprobs)
    return _copied_positions(positions, whole=return_logprobs or return_surprises)


def _check_runner(cached: bool, cuda_graphs: Any, compiled: Any) -> None:
    """Check the flags that say how steps run, of which there are some only with a cache."""
    flags = {'compiled': compiled} | ({} if cuda_graphs is None else {'cuda_graphs': cuda_graphs})
    check_flags(**flags)
    for name, flag in flags.items():
        if flag and not cached:
            raise ValueError(f'{name}=True needs use_cache=True')


# the loop

Choose = Callable[[Float[Tensor, 'b l']], tuple[Int[Tensor, ' b'], Float[Tensor, ' b']]]


class _Request(NamedTuple):
    """Checked arguments that say which tokens to sample."""

    prompt: Int[Tensor, 'b n']
    lengths: list[int]
    """Length of each row's prompt; the rest of the row is padding."""
    limits: list[int]
    """Length of each row, prompt included, unless a stop token ends it earlier."""
    stops: Int[Tensor, ' s']
    pad_token: int
    pad_input: int
    """The model's input in place of `pad_token`: the same, or a token of its vocabulary."""

    @classmethod
    def of(
        cls,
        model: Decodable,
        prompt: Any,
        prompt_lengths: Any,
        seq_len: Any,
        max_new_tokens: Any,
        stop_tokens: Any,
        pad_token: Any,
    ) -> _Request:
        num_tokens = model.num_tokens
        if num_tokens is None:
            raise ValueError('a model without num_tokens has no logits to sample from')
        prompt = checked_token_ids('prompt', prompt, None)
        lengths = _checked_lengths(prompt_lengths, *prompt.shape)
        if values_are_at_hand(prompt):  # padding may be outside the vocabulary
            unpadded = torch.cat([row[:length] for row, length in zip(prompt, lengths)])
            checked_token_ids('prompt', unpadded.unsqueeze(0), model.num_input_tokens)
        if (seq_len is None) == (max_new_tokens is None):
            raise ValueError('pass either seq_len, the total length, or max_new_tokens')
        if seq_len is not None:
            limits = [check_integer('seq_len', seq_len, 1)] * len(lengths)
        else:
            limits = [length + check_integer('max_new_tokens', max_new_tokens, 0) for length in lengths]
        if max(limits) >= 2**63:  # positions are int64
            name, given = ('max_new_tokens', max_new_tokens) if seq_len is None else ('seq_len', seq_len)
            raise ValueError(f'{name} must give rows of fewer than 2**63 tokens, prompt included, got {given}')
        pad_token = check_integer('pad_token', pad_token)
        return cls(
            prompt=prompt.clone(),  # a stream reads it later than it is checked
            lengths=lengths,
            limits=limits,
            stops=torch.tensor(_checked_stops(stop_tokens, num_tokens), dtype=torch.long, device=prompt.device),
            pad_token=pad_token,
            pad_input=pad_token if 0 <= pad_token < num_tokens else 0,
        )

    @property
    def seq_len(self) -> int:
        """Length of the longest row."""
        return max(self.limits)

    @property
    def has_one_limit(self) -> bool:
        """True if all rows end together, unless a stop token ends them earlier."""
        return min(self.limits) == self.seq_len

    @property
    def rows_end_early(self) -> bool:
        """True if a row may end before the longest one."""
        return len(self.stops) > 0 or not self.has_one_limit

    def by_row(self, positions: list[Any], filler: float) -> Tensor:
        """Results of all positions as rows, without their own prompts beyond the shortest one, padded on the right."""
        if not positions:
            return torch.full((len(self.prompt), 0), filler, device=self.prompt.device)
        rows = torch.stack(positions, dim=1)
        if min(self.lengths) == max(self.lengths):
            return rows
        moved = []
        for row, length in zip(rows, self.lengths):
            own = row[length - min(self.lengths) :]
            moved.append(torch.cat((own, own.new_full((len(row) - len(own),), filler))))
        longest = max(limit - length for limit, length in zip(self.limits, self.lengths))
        return torch.stack(moved)[:, : max(0, longest)]


@torch.no_grad()
def _positions(
    model: Decodable, reader: _Reader, request: _Request, choose: Choose, logprobs: bool
) -> Generator[Sampled, None, Any]:
    """Yield all rows at each position from the end of the shortest prompt on; return the cache."""
    prompt, lengths, _, stops, pad_token, pad_input = request
    ends, limits = (torch.tensor(of_rows, device=prompt.device) for of_rows in (lengths, request.limits))
    shortest, longest = min(lengths), max(lengths)
    may_end_early, finished = request.rows_end_early, limits <= shortest
    unchecked: list[Tensor] = []  # of chosen tokens, the results of `choose` that say whether they were valid
    tokens = prompt[:, shortest - 1]

    try:
        with evaluation_mode(model):
            if request.seq_len <= shortest:
                reader.read_all_but_last(prompt[:, :shortest])
            for position in range(shortest, request.seq_len):
                logits = reader.start(prompt[:, :shortest]) if position == shortest else reader(tokens)
                # a filter may change them in place
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
"""Steps after which results to be checked are reduced to their minimum, which keeps NaN."""


def _checked_at_hand(unchecked: list[Tensor]) -> list[Tensor]:
    """Check that chosen tokens were valid, where that does not wait for a GPU, and return what to check later."""
    if values_are_at_hand(unchecked[-1]):
        check_best(unchecked[-1])
        return []
    return unchecked if len(unchecked) < _MOST_UNCHECKED else [torch.stack(unchecked).amin(dim=0)]


def _copied_positions(positions: Generator[Sampled, None, Any], whole: bool) -> Generator[Any, None, Any]:
    """Yield whole positions, or the tokens alone; return the cache. Tokens are copies, as the next step reads them."""
    with contextlib.closing(positions):
        while True:
            try:
                position = next(positions)
            except StopIteration as end:
                return end.value
            tokens = position.tokens.clone()
            yield position._replace(tokens=tokens) if whole else tokens


class _Reader:
    """Logits of the next token, and the surprises of the chunks completed by reading, if requested."""

    def __init__(self, model: Decodable, store: bool, return_surprises: bool):
        self.model = model
        self.return_surprises = return_surprises
        self.kwargs: dict[str, Any] = {'disable_flex_attn': True, 'store': store}
        self.kwargs |= {'return_surprises': True} if return_surprises else {}
        self.surprises: list[LayerSurprises] = []

    def start(self, prompt: Int[Tensor, 'b n']) -> Float[Tensor, 'b l']:
        """Read the prompt."""
        raise NotImplementedError

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        """Read one more token."""
        raise NotImplementedError

    def read_all_but_last(self, prompt: Int[Tensor, 'b n']) -> None:
        """Read a prompt to which no token is added."""
        raise NotImplementedError

    def new_surprises(self) -> LayerSurprises | None:
        """Surprises since the last call of this method; `None` if not requested."""
        if not self.return_surprises:
            return None
        new = _joined(self.surprises)
        # no rows, but the layers and the shape for the next call
        self.surprises[:] = [{layer: own.since(own.num_rows) for layer, own in new.items()}]
        return new

    def cache(self) -> Any:
        return None

    def release(self) -> None:
        """End of use."""


class _UncachedReader(_Reader):
    """The whole sequence is read again for every token."""

    num_rows: Mapping[int, int] = {}
    """Surprises of each layer that are in `surprises` already."""

    def start(self, prompt: Int[Tensor, 'b n']) -> Float[Tensor, 'b l']:
        self.read = prompt
        out = self.model(prompt, **self.kwargs)
        if not self.return_surprises:
            return out[:, -1]
        logits, every = out
        self.surprises.append({layer: own.since(self.num_rows.get(layer, 0)) for layer, own in every.items()})
        self.num_rows = {layer: own.num_rows for layer, own in every.items()}
        return logits[:, -1]

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        return self.start(torch.cat((self.read, tokens.unsqueeze(1)), dim=1))

    def read_all_but_last(self, prompt: Int[Tensor, 'b n']) -> None:
        if self.return_surprises and prompt.shape[1] > 1:
            self.start(prompt[:, :-1])


class _CachedReader(_Reader, Generic[CacheT]):
    """The prompt is read by one call, each further token by a step."""

    def __init__(
        self,
        model: Decodable[CacheT],
        store: bool,
        return_surprises: bool,
        cache: CacheT | None,
        state: CacheT | None,
        cuda_graphs: bool | None,
        compiled: bool,
    ):
        if cache is not None and state is not None:
            raise ValueError(
                'pass cache (the prompt repeats the history) or state (the prompt holds only new tokens), not both'
            )
        super().__init__(model, store, return_surprises)
        self.before = {'cache': cache} if state is None else {'state': state}
        self.after = cache if state is None else state
        self.cuda_graphs, self.compiled, self.store = cuda_graphs, compiled, store
        self.stepper: Stepper | CallStepper | None = None

    def start(self, prompt: Int[Tensor, 'b n']) -> Float[Tensor, 'b l']:
        logits, self.after, *surprises = self.model(prompt, **self.before, return_cache=True, **self.kwargs)
        self.before = {}
        self.surprises += surprises
        return logits[:, -1]

    def read_all_but_last(self, prompt: Int[Tensor, 'b n']) -> None:
        """Bring the cache to the last token of the prompt."""
        repeated = self.before.get('cache')
        num_read = 0 if repeated is None else self.model.num_tokens_until(repeated.seq_index)
        if prompt.shape[1] - 1 != num_read:
            self.start(prompt[:, :-1])

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        if self.stepper is None:
            assert self.after is not None
            surprises = self.surprises if self.return_surprises else None
            self.stepper = Stepper.of(self.model, self.after, self.cuda_graphs, self.compiled, self.store, surprises)
            self.after = None
        return self.stepper(tokens)

    def cache(self) -> CacheT | None:
        return self.after if self.stepper is None else self.stepper.cache()

    def release(self) -> None:
        if self.stepper is not None:
            self.stepper.release()


def _joined(parts: Iterable[LayerSurprises]) -> LayerSurprises:
    """Surprises of consecutive parts of a sequence."""
    by_layer: dict[int, list[Surprises]] = {}
    for part in parts:
        for layer, own in part.items():
            by_layer.setdefault(layer, []).append(own)
    return {layer: Surprises.joined(every) for layer, every in by_layer.items()}


class _Filter(NamedTuple):
    """A filter of the logits of one step."""

    keep: Callable[[Tensor], Tensor]
    min_p: float | None
    """That of `min_p_filter`, which is applied last."""

    @classmethod
    def of(cls, filter_fn: Any, filter_kwargs: Any, top_k: Any, top_p: Any, min_p: Any) -> _Filter:
        """The filter that these arguments of `sample` describe."""
        check_callable(filter_fn=filter_fn)
        check_keywords(filter_kwargs=filter_kwargs)
        if top_k is None and top_p is None and min_p is None:
            is_min_p = filter_fn is min_p_filter and [*filter_kwargs] == ['min_p']
            if not is_min_p or isinstance(filter_kwargs['min_p'], Tensor):
                return cls(partial(filter_fn, **filter_kwargs), None)
            return cls(filters(), checked_min_p(filter_kwargs['min_p']))
        if filter_fn is not min_p_filter or filter_kwargs is not DEFAULT_FILTER:
            raise ValueError('pass filter_fn with filter_kwargs, or top_k, top_p and min_p, not both')
        return cls(filters(top_k, top_p), None if min_p is None else checked_min_p(min_p))


def _chooser(temperature: Any, kept: _Filter, generator: Any, prompt: Tensor) -> Choose:
    """A function from logits to a token for each row, with the results of `sampled`."""
    temperature = check_number('temperature', temperature, at_least=0)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f'generator must be a torch.Generator, got {described(generator)}')
        if generator.device.type != prompt.device.type:
            raise ValueError(f'generator must be on the device of prompt, {prompt.device}, got {generator.device}')

    def choose(logits: Float[Tensor, 'b l']) -> tuple[Int[Tensor, ' b'], Float[Tensor, ' b']]:
        filtered = kept.keep(logits)
        if not isinstance(filtered, Tensor) or filtered.shape != logits.shape:
            raise ValueError(f'filter_fn must return logits {tuple(logits.shape)}, got {described(filtered)}')
        return sampled(filtered, temperature, generator, kept.min_p)

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


def _checked_stops(stop_tokens: Any, num_tokens: int) -> list[int]:
    is_single = isinstance(stop_tokens, (Tensor, np.ndarray)) and stop_tokens.ndim == 0
    if is_single or isinstance(stop_tokens, (int, np.integer)):
        stops = [check_integer('stop_tokens', stop_tokens)]
    else:
        stops = check_integers('stop_tokens', stop_tokens)
    if not all(0 <= stop < num_tokens for stop in stops):
        raise ValueError(f'stop_tokens must be in [0, num_tokens={num_tokens}), got {stops}')
    return stops
