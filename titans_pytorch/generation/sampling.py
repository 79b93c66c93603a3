"""Sampling: filters on the logits, and the loop that serves every model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from titans_pytorch.generation.state import ModelState
from titans_pytorch.generation.stepper import CallStepper, Decodable, Stepper, evaluation_mode
from titans_pytorch.utils.checks import (
    check_broadcasts,
    check_callable,
    check_flags,
    check_floating,
    check_integer,
    check_integers,
    check_keywords,
    check_number,
    checked_token_ids,
    described,
    values_are_at_hand,
)
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Float, Int

__all__ = ['gumbel_noise', 'gumbel_sample', 'min_p_filter', 'sample', 'stream']


def min_p_filter(logits: Float[Tensor, '... l'], min_p: float = 0.1) -> Float[Tensor, '... l']:
    """Rule out tokens less likely than `min_p` times the likeliest (arXiv 2407.01082).

    `min_p` is a share from 0 to 1, or a tensor of them that broadcasts to the logits.
    """
    _check_logits(logits)
    if isinstance(min_p, Tensor):
        check_broadcasts('min_p', min_p, logits)
    elif check_number('min_p', min_p, at_least=0) > 1:
        raise ValueError(f'min_p must be a share of the likeliest token, from 0 to 1, got {min_p}')
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), float('-inf'))


def gumbel_noise(t: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Standard Gumbel noise of the shape of `t`, in float32 at least: −log(−log u) of uniform u."""
    tiny = 1e-20
    return -torch.log((-torch.log(torch.rand_like(at_least_float32(t)).clamp(min=tiny))).clamp(min=tiny))


def gumbel_sample(logits: Float[Tensor, '... l'], temperature: float = 1.0) -> Int[Tensor, '... 1']:
    """A token from softmax(logits / temperature), by the Gumbel-max trick; the likeliest at temperature 0.

    Raises:
        ValueError: for a temperature below 0, and for rows of logits that leave nothing to choose from (NaN, or all
            −inf). These are looked for on a CPU only: on a GPU that would stop the stream.
    """
    temperature = check_number('temperature', temperature, at_least=0)
    _check_logits(logits)
    tokens, best = _drawn(logits, temperature)
    if values_are_at_hand(best):
        _check_choice(best)
    return tokens.unsqueeze(-1)


def _check_logits(logits: Any) -> None:
    check_floating('logits', logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f'logits must be (…, num_tokens), got {tuple(logits.shape)}')


def _drawn(logits: Float[Tensor, '... l'], temperature: float) -> tuple[Int[Tensor, ...], Float[Tensor, ...]]:
    """A token for each row, and its logit with the noise added: NaN or −inf where there was none to choose."""
    if temperature > 0.0:
        logits = logits / temperature + gumbel_noise(logits)
    best, tokens = logits.max(dim=-1)
    return tokens, best


def _check_choice(best: Float[Tensor, ...]) -> None:
    if not (best > float('-inf')).all():  # nor is NaN
        raise ValueError(
            'logits must leave a token to choose, and those of a row are NaN or all -inf: '
            'the model gave them, or filter_fn left none'
        )


# methods of every model


def sample(
    self: Decodable,
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
    cache: ModelState | None = None,
    state: ModelState | None = None,
    return_cache: bool = False,
    cuda_graphs: bool | None = None,
    compiled: bool = False,
    store: bool = True,
) -> Any:
    """Continue `prompt` to a total length of `seq_len` tokens; returns what was added.

    Args:
        prompt: token ids (batch, length) of any integer dtype, at least one.
        seq_len: total length, prompt included.
        temperature: 0 always takes the likeliest token; it cannot be negative.
        filter_fn: called as `filter_fn(logits, **filter_kwargs)` on the logits of each step, (batch, num_tokens).
        show_progress: show a progress bar.
        use_cache: keep the state between steps; same tokens, and a step's cost does not grow with the length.
        prompt_lengths: how many tokens of each row of `prompt` count, the rest being padding on the right. What a row
            adds then follows its own prompt, and is padded on the right in its turn.
        stop_tokens: token or tokens that end a sequence. The token itself is returned, `pad_token` after it, and when
            all sequences have ended there are no more steps.
        pad_token: what stands where a row has nothing. It need not be in the vocabulary, as −1 and −100 are not: the
            model then reads token 0 in its place, in rows that have ended.
        cache: of the call before, whose prompt and result `prompt` begins with; only what follows is processed.
        state: the same, but `prompt` is only what follows: the last token that the call before added, which it did not
            read, and what is new.
        return_cache: also return the cache for the next call. Both imply `use_cache`.
        cuda_graphs: with a cache, replay the steps as CUDA graphs. Default: on a CUDA device.
        compiled: with a cache, on a CPU, compile the steps by `torch.compile`: some times as fast. It needs a C++
            compiler, Python's headers and, in the first call for a batch size, minutes, so that it is not the default.
            Later calls take what is compiled, with the parameters' values of then; a change of the model's modules,
            their hooks, shapes or precision compiles anew, but other attributes of modules are taken as they were.
        store: false to read the memories without writing them; see `forward`. Steps are then calls of the whole model,
            as they are where one of its modules has hooks: exact, of constant cost, and slower.

    Returns:
        tokens (batch, seq_len − length of the shortest prompt), int64, or fewer if all sequences end; with
        `return_cache` a pair with the cache.

    Raises:
        ValueError, TypeError: for arguments that do not fit; and for logits that leave no token to choose, NaN or all
            −inf. On a GPU, where looking at each step would wait for it, these are found at the end.
    """
    check_flags(show_progress=show_progress, use_cache=use_cache, return_cache=return_cache, store=store)
    task = _Task.of(self, prompt, prompt_lengths, seq_len, stop_tokens, pad_token)
    choose = _chooser(temperature, filter_fn, filter_kwargs)
    stepwise = use_cache or return_cache or cache is not None or state is not None
    reader = _Stepwise(self, cache, state, cuda_graphs, compiled, store) if stepwise else _Rereading(self, store)
    tokens = _tokens(self, reader, task, choose)

    out = [task.prompt[:, :0]]
    with tqdm(total=max(0, task.seq_len - min(task.lengths)), disable=not show_progress) as progress:
        try:
            while True:
                out.append(next(tokens).unsqueeze(1))
                progress.update()
        except StopIteration as end:
            next_cache = end.value
    added = _without_prompts(torch.cat(out, dim=1), task.lengths, task.pad_token)
    return (added, next_cache) if return_cache else added


def stream(
    self: Decodable,
    prompt: Int[Tensor, 'b n'],
    seq_len: int,
    temperature: float = 1.5,
    filter_fn: Callable[..., Tensor] = min_p_filter,
    filter_kwargs: Mapping[str, Any] = {'min_p': 0.1},
    *,
    prompt_lengths: Sequence[int] | Tensor | None = None,
    stop_tokens: int | Iterable[int] = (),
    pad_token: int = 0,
    cache: ModelState | None = None,
    state: ModelState | None = None,
    cuda_graphs: bool | None = None,
    compiled: bool = False,
    store: bool = True,
) -> Generator[Int[Tensor, ' b'], None, ModelState]:
    """Yield the tokens of `sample(…, use_cache=True)` one position after the other, as they come: (batch,).

    The arguments are those of `sample`. With `prompt_lengths` positions are counted from the start of the prompts: a
    row yields the tokens of its own prompt, from where the shortest one ends, and then what it adds.

    The model is in evaluation mode until the generator ends or is closed. Its value, `cache = yield from
    model.stream(…)`, is the cache for a later call.
    """
    task = _Task.of(self, prompt, prompt_lengths, seq_len, stop_tokens, pad_token)
    choose = _chooser(temperature, filter_fn, filter_kwargs)
    return _tokens(self, _Stepwise(self, cache, state, cuda_graphs, compiled, store), task, choose)


# the loop

Choose = Callable[[Float[Tensor, 'b l']], tuple[Int[Tensor, ' b'], Float[Tensor, ' b']]]


class _Task(NamedTuple):
    """What to generate, checked."""

    prompt: Int[Tensor, 'b n']
    lengths: list[int]
    """Of each row of the prompt; the rest is padding."""
    seq_len: int
    stops: Int[Tensor, ' s']
    pad_token: int
    reads_pad: int
    """What the model reads for `pad_token`: that, or a token of its vocabulary."""

    @classmethod
    def of(
        cls, model: Decodable, prompt: Any, prompt_lengths: Any, seq_len: Any, stop_tokens: Any, pad_token: Any
    ) -> _Task:
        num_tokens = model.num_tokens
        if num_tokens is None:
            raise ValueError('a model without num_tokens has no logits to sample from')
        prompt = checked_token_ids('prompt', prompt, None)
        lengths = _checked_lengths(prompt_lengths, *prompt.shape)
        if values_are_at_hand(prompt):  # where it is no padding
            of_prompt = torch.cat([row[:length] for row, length in zip(prompt, lengths)])
            checked_token_ids('prompt', of_prompt.unsqueeze(0), num_tokens)
        seq_len, pad_token = check_integer('seq_len', seq_len, 1), check_integer('pad_token', pad_token)
        stops = torch.tensor(_checked_stops(stop_tokens), dtype=torch.long, device=prompt.device)
        return cls(prompt, lengths, seq_len, stops, pad_token, pad_token if 0 <= pad_token < num_tokens else 0)


@torch.no_grad()
def _tokens(
    model: Decodable, reader: _Rereading | _Stepwise, task: _Task, choose: Choose
) -> Generator[Int[Tensor, ' b'], None, Any]:
    """The tokens of all rows at each position from the end of the shortest prompt on; at last the cache."""
    prompt, lengths, seq_len, stops, pad_token, reads_pad = task
    ends = torch.tensor(lengths, device=prompt.device)
    shortest, longest = min(lengths), max(lengths)
    finished = torch.zeros_like(ends, dtype=torch.bool)
    worst = torch.zeros(len(prompt), device=prompt.device)
    tokens = prompt[:, shortest - 1]

    try:
        with evaluation_mode(model):
            for position in range(shortest, seq_len):
                logits = reader.start(prompt[:, :shortest]) if position == shortest else reader(tokens)
                tokens, best = choose(logits)
                if position < longest:  # some rows are still given
                    tokens = torch.where(position < ends, prompt[:, position], tokens)
                    best = best.masked_fill(position < ends, 0.0)
                if len(stops):
                    best = best.masked_fill(finished, 0.0)
                worst = torch.minimum(worst, best)
                if values_are_at_hand(worst):
                    _check_choice(worst)
                shown = tokens
                if len(stops):
                    shown, tokens = (tokens.masked_fill(finished, pad) for pad in (pad_token, reads_pad))
                    finished = finished | (torch.isin(tokens, stops) & (position >= ends))
                yield shown
                if len(stops) and finished.all():
                    break
            _check_choice(worst)
            return reader.cache()
    finally:
        reader.release()


class _Rereading:
    """Reads the whole sequence for each token."""

    def __init__(self, model: Decodable, store: bool):
        self.model, self.store = model, store

    def start(self, prompt: Int[Tensor, 'b n']) -> Float[Tensor, 'b l']:
        self.read = prompt
        return self.model(prompt, disable_flex_attn=True, store=self.store)[:, -1]

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        return self.start(torch.cat((self.read, tokens.unsqueeze(1)), dim=1))

    def cache(self) -> None: ...

    def release(self) -> None: ...


class _Stepwise:
    """Reads the prompt at once, and then each token by a step."""

    def __init__(
        self,
        model: Decodable,
        cache: ModelState | None,
        state: ModelState | None,
        cuda_graphs: bool | None,
        compiled: bool,
        store: bool,
    ):
        if cache is not None and state is not None:
            raise ValueError('prompt begins with what cache has read, or follows on state: give one of them')
        check_flags(compiled=compiled, **({} if cuda_graphs is None else {'cuda_graphs': cuda_graphs}))
        self.model = model
        self.before = {'cache': cache} if state is None else {'state': state}
        self.read = cache if state is None else state
        self.cuda_graphs, self.compiled, self.store = cuda_graphs, compiled, store
        self.stepper: Stepper | CallStepper | None = None

    def start(self, prompt: Int[Tensor, 'b n']) -> Float[Tensor, 'b l']:
        logits, self.read = self.model(
            prompt, **self.before, return_cache=True, disable_flex_attn=True, store=self.store
        )
        self.before = {}
        return logits[:, -1]

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        if self.stepper is None:
            assert self.read is not None
            self.stepper = Stepper.of(self.model, self.read, self.cuda_graphs, self.compiled, self.store)
            self.read = None
        return self.stepper(tokens)

    def cache(self) -> ModelState | None:
        return self.read if self.stepper is None else self.stepper.cache()

    def release(self) -> None:
        if self.stepper is not None:
            self.stepper.release()


def _chooser(temperature: Any, filter_fn: Any, filter_kwargs: Any) -> Choose:
    """From logits to a token for each row, as `_drawn` does."""
    temperature = check_number('temperature', temperature, at_least=0)
    check_callable(filter_fn=filter_fn)
    check_keywords(filter_kwargs=filter_kwargs)

    def choose(logits: Float[Tensor, 'b l']) -> tuple[Int[Tensor, ' b'], Float[Tensor, ' b']]:
        filtered = filter_fn(logits, **filter_kwargs)
        if not isinstance(filtered, Tensor) or filtered.shape != logits.shape:
            raise ValueError(f'filter_fn must return logits {tuple(logits.shape)}, got {described(filtered)}')
        return _drawn(filtered, temperature)

    return choose


def _checked_lengths(lengths: Any, batch: int, longest: int) -> list[int]:
    """How many tokens of each prompt count; `None`: all."""
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
    """Rows moved to the left by what is their own prompt beyond the shortest."""
    if min(lengths) == max(lengths):
        return tokens
    rows = []
    for row, length in zip(tokens, lengths):
        own = row[length - min(lengths) :]
        rows.append(torch.cat((own, own.new_full((len(row) - len(own),), pad_token))))
    return torch.stack(rows)
