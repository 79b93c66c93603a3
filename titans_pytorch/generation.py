"""Sampling: filters on the logits, and the loop that serves every model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from titans_pytorch.checks import check_positive, check_token_ids
from titans_pytorch.decoding import CallStepper, Decodable, Stepper, evaluation_mode
from titans_pytorch.model_state import ModelState
from titans_pytorch.shapes import Float, Int

__all__ = ['gumbel_noise', 'gumbel_sample', 'min_p_filter', 'sample', 'stream']


def min_p_filter(logits: Float[Tensor, '... l'], min_p: float = 0.1) -> Float[Tensor, '... l']:
    """Rule out tokens less likely than `min_p` times the likeliest (arXiv 2407.01082)."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), float('-inf'))


def gumbel_noise(t: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Standard Gumbel noise of the shape of `t`: −log(−log u) of uniform u."""
    tiny = 1e-20
    return -torch.log((-torch.log(torch.rand_like(t).clamp(min=tiny))).clamp(min=tiny))


def gumbel_sample(logits: Float[Tensor, '... l'], temperature: float = 1.0) -> Int[Tensor, '... 1']:
    """A token from softmax(logits / temperature), by the Gumbel-max trick; the likeliest at temperature 0."""
    if temperature > 0.0:
        logits = logits / temperature + gumbel_noise(logits)
    return logits.argmax(dim=-1, keepdim=True)


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
        prompt: token ids (batch, length), at least one.
        seq_len: total length, prompt included.
        temperature: 0 always takes the likeliest token.
        filter_fn: called as `filter_fn(logits, **filter_kwargs)` on the logits of each step, (batch, num_tokens).
        show_progress: show a progress bar.
        use_cache: keep the state between steps; same tokens, and a step's cost does not grow with the length.
        prompt_lengths: how many tokens of each row of `prompt` count, the rest being padding on the right. What a row
            adds then follows its own prompt, and is padded on the right in its turn.
        stop_tokens: tokens that end a sequence. The token itself is returned, `pad_token` after it, and when all
            sequences have ended there are no more steps.
        pad_token: what stands where a row has nothing.
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
        tokens (batch, seq_len − length of the shortest prompt), or fewer if all sequences end; with `return_cache` a
        pair with the cache.
    """
    lengths = _checked_lengths(prompt, prompt_lengths)
    choose = _chooser(temperature, filter_fn, filter_kwargs)
    stepwise = use_cache or return_cache or cache is not None or state is not None
    reader = _Stepwise(self, cache, state, cuda_graphs, compiled, store) if stepwise else _Rereading(self, store)
    tokens = _tokens(self, reader, prompt, lengths, seq_len, choose, stop_tokens, pad_token)

    out = [prompt[:, :0]]
    with tqdm(total=max(0, seq_len - min(lengths)), disable=not show_progress) as progress:
        try:
            while True:
                out.append(next(tokens).unsqueeze(1))
                progress.update()
        except StopIteration as end:
            next_cache = end.value
    added = _without_prompts(torch.cat(out, dim=1), lengths, pad_token)
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
    lengths = _checked_lengths(prompt, prompt_lengths)
    choose = _chooser(temperature, filter_fn, filter_kwargs)
    reader = _Stepwise(self, cache, state, cuda_graphs, compiled, store)
    return _tokens(self, reader, prompt, lengths, seq_len, choose, stop_tokens, pad_token)


# the loop

Choose = Callable[[Float[Tensor, 'b l']], Int[Tensor, ' b']]


@torch.no_grad()
def _tokens(
    model: Decodable,
    reader: _Rereading | _Stepwise,
    prompt: Int[Tensor, 'b n'],
    lengths: list[int],
    seq_len: int,
    choose: Choose,
    stop_tokens: int | Iterable[int],
    pad_token: int,
) -> Generator[Int[Tensor, ' b'], None, Any]:
    """The tokens of all rows at each position from the end of the shortest prompt on; at last the cache."""
    check_positive(seq_len=seq_len)
    if model.num_tokens is None:
        raise ValueError('a model without num_tokens has no logits to sample from')
    stops = torch.tensor([stop_tokens] if isinstance(stop_tokens, int) else [*stop_tokens], dtype=prompt.dtype)
    stops = stops.to(prompt.device)
    ends = torch.tensor(lengths, device=prompt.device)
    shortest, longest = min(lengths), max(lengths)
    finished = torch.zeros_like(ends, dtype=torch.bool)
    tokens = prompt[:, shortest - 1]

    try:
        with evaluation_mode(model):
            for position in range(shortest, seq_len):
                logits = reader.start(prompt[:, :shortest]) if position == shortest else reader(tokens)
                tokens = choose(logits)
                if position < longest:  # some rows are still given
                    tokens = torch.where(position < ends, prompt[:, position], tokens)
                if len(stops):
                    tokens = tokens.masked_fill(finished, pad_token)
                    finished = finished | (torch.isin(tokens, stops) & (position >= ends))
                yield tokens
                if len(stops) and finished.all():
                    break
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


def _chooser(temperature: float, filter_fn: Callable[..., Tensor], filter_kwargs: Mapping[str, Any]) -> Choose:
    return lambda logits: gumbel_sample(filter_fn(logits, **filter_kwargs), temperature).squeeze(-1)


def _checked_lengths(prompt: Any, lengths: Sequence[int] | Tensor | None) -> list[int]:
    check_token_ids('prompt', prompt, None)
    batch, longest = prompt.shape
    if lengths is None:
        return [longest] * batch
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else [*lengths]
    if len(lengths) != batch or not all(isinstance(n, int) and 1 <= n <= longest for n in lengths):
        raise ValueError(f'prompt_lengths must be {batch} integers from 1 to {longest}, got {lengths}')
    return lengths


def _without_prompts(tokens: Int[Tensor, 'b n'], lengths: list[int], pad_token: int) -> Int[Tensor, 'b n']:
    """Rows moved to the left by what is their own prompt beyond the shortest."""
    if min(lengths) == max(lengths):
        return tokens
    rows = []
    for row, length in zip(tokens, lengths):
        own = row[length - min(lengths) :]
        rows.append(torch.cat((own, own.new_full((len(row) - len(own),), pad_token))))
    return torch.stack(rows)
