"""How sampling reads tokens: the whole sequence again for each new token, or, with a cache, only the new token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Generic

import torch
from torch import Tensor

from titans_pytorch.generation.decodable import CacheT, Decodable
from titans_pytorch.generation.stepper import CallStepper, Stepper
from titans_pytorch.memory.state import LayerSurprises, Surprises
from titans_pytorch.utils.shapes import Float, Int


class Reader:
    """Reads tokens; returns logits of the next one and collects surprises of completed chunks, if requested."""

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
        """Read all but the last token of a prompt to which no token will be added."""
        raise NotImplementedError

    def new_surprises(self) -> LayerSurprises | None:
        """Surprises since the last call of this method; `None` if not requested."""
        if not self.return_surprises:
            return None
        new = joined_surprises(self.surprises)
        # keep entries without rows: they hold the layers and the shape for the next call
        self.surprises[:] = [{layer: own.since(own.num_rows) for layer, own in new.items()}]
        return new

    def cache(self) -> Any:
        return None

    def release(self) -> None:
        """Called when the reader is no longer needed."""


class UncachedReader(Reader):
    """A reader that reads the whole sequence again for every token."""

    num_rows: Mapping[int, int] = {}
    """Rows of surprises that are already in `surprises`, per layer."""

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


class CachedReader(Reader, Generic[CacheT]):
    """A reader that reads the prompt in one call and each further token in a step."""

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
        """Bring the cache up to the last token of the prompt, which stays unread."""
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


def joined_surprises(parts: Iterable[LayerSurprises]) -> LayerSurprises:
    """Join the surprises of consecutive parts of a sequence."""
    by_layer: dict[int, list[Surprises]] = {}
    for part in parts:
        for layer, own in part.items():
            by_layer.setdefault(layer, []).append(own)
    return {layer: Surprises.joined(every) for layer, every in by_layer.items()}
