"""Decoding step by step, over state of constant size: what a model offers for it, and who runs the steps."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titans_pytorch.model_state import ModelState
from titans_pytorch.shapes import Float, Int


class StepKind(NamedTuple):
    """What a step has to do, by its position: one of a few kinds, each of which always does the same."""

    is_longterm: bool = False
    """It is of a long-term memory token, which is not read and gives no logits."""
    ends_chunk: bool = False
    """It completes a chunk, which the memories store."""
    ends_batch: bool = False
    """It completes a memory batch."""


class StepState(Protocol):
    """Tensors in tuples, lists and dictionaries, among them these."""

    token: Int[Tensor, 'b 1']
    """What the next step reads."""
    logits: Float[Tensor, 'b l']
    """What the last step of a token gave."""


class Decodable(Protocol):
    """What a model needs for `generation.sample` and `generation.stream`."""

    training: bool
    num_tokens: int | None
    """Size of the vocabulary; without one there is nothing to sample."""

    def __call__(
        self, x: Tensor, *, state: Any = None, cache: Any = None, return_cache: bool = False, disable_flex_attn: bool
    ) -> Any:
        """Logits of a whole sequence, of `x` after `state`, or of what in `x` follows on `cache`; and the cache, if
        asked for."""

    def train(self, mode: bool = True) -> Any: ...

    def decoding_state(self, cache: ModelState) -> Any:
        """`cache` as a `StepState`."""

    def decoding_cache(self, state: Any, position: int) -> ModelState:
        """The opposite; it shares nothing with the state."""

    def step_kind(self, position: int) -> StepKind: ...

    def step(self, state: Any, kind: StepKind) -> None:
        """One position, from the tensors of `state` into the tensors of `state`. No shape depends on the position, and
        all else that does on a tensor: so each kind of step can be captured as a CUDA graph, and replayed."""


class Stepper:
    """Decodes token by token: each kind of step is captured once as a CUDA graph and replayed, or simply called.

    Build one by `Stepper.of`, which takes up one that has done its work where it fits: its graphs are then ready.
    """

    def __init__(self, model: Decodable, state: Any, captures: bool):
        # not to keep the model, which the idle ones are found by
        self._model = weakref.proxy(model)
        self._state = state
        self._captures = captures
        self._graphs: dict[StepKind, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if captures else None
        self._position = 0

    @classmethod
    def of(cls, model: Decodable, cache: ModelState, cuda_graphs: bool | None) -> Stepper:
        """From `cache` on. CUDA graphs: `None` uses them where the model is on a CUDA device."""
        state = model.decoding_state(cache)
        on_gpu = state.token.is_cuda
        if cuda_graphs and not on_gpu:
            raise ValueError(f'cuda_graphs=True needs the model on a CUDA device, got {state.token.device}')

        captures = on_gpu and cuda_graphs is not False
        stepper = _IDLE.get(model, {}).pop(_signature(model, state), None) if captures else None
        if stepper is None:
            stepper = cls(model, state, captures)
        else:
            for buffer, new in zip(_tensors(stepper._state), _tensors(state)):
                buffer.copy_(new)
        stepper._position = cache.seq_index
        return stepper

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        """The logits after one more token; the next call overwrites them."""
        while (kind := self._model.step_kind(self._position)).is_longterm:
            self._run(kind)
        self._state.token.copy_(tokens.unsqueeze(1))
        self._run(kind)
        return self._state.logits

    def cache(self) -> ModelState:
        """A copy of the state, to continue from later."""
        return self._model.decoding_cache(self._state, self._position)

    def release(self, model: Decodable) -> None:
        """Done: the graphs may serve the next call for the same shapes."""
        if self._captures:
            # only the newest, as each holds the memory of its graphs
            _IDLE[model] = {_signature(model, self._state): self}

    def _run(self, kind: StepKind) -> None:
        if self._captures:
            if kind not in self._graphs:
                self._graphs[kind] = self._captured(kind)
            self._graphs[kind].replay()
        else:
            self._step(kind)
        self._position += 1

    def _step(self, kind: StepKind) -> None:
        # weights that autocast has cast and kept must not outlive a graph, nor a graph use those of a time before it
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(caches and not self._captures)
        try:
            # the buffers are tensors from outside, and remain so; on a CPU small operations are faster inside
            with torch.inference_mode(not self._state.token.is_cuda):
                self._model.step(self._state, kind)
        finally:
            torch.set_autocast_cache_enabled(caches)

    def _captured(self, kind: StepKind) -> torch.cuda.CUDAGraph:
        buffers = _tensors(self._state)
        kept = [buffer.clone() for buffer in buffers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries set themselves up, kernels are compiled
                self._step(kind)
                for buffer, before in zip(buffers, kept):
                    buffer.copy_(before)
        torch.cuda.current_stream().wait_stream(side)

        graph = torch.cuda.CUDAGraph()
        # one pool for all: they run one after the other, and leave nothing in it
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(kind)
        return graph


_IDLE: weakref.WeakKeyDictionary[Any, dict[Hashable, Stepper]] = weakref.WeakKeyDictionary()


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def _signature(model: Any, state: Any) -> Hashable:
    """What a captured graph depends on: it reads parameters where they lie, and was made for these shapes."""
    device = state.token.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    parameters = tuple((p.data_ptr(), p.dtype) for p in (*model.parameters(), *model.buffers()))
    return autocast, parameters, tuple((t.shape, t.dtype, t.device) for t in _tensors(state))
