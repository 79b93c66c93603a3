"""Decoding step by step, over state of constant size: what a model offers for it, and who runs the steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from types import FunctionType
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
    """Decodes token by token. A kind of step is called, or captured once as a CUDA graph, or compiled once on a CPU.

    Build one by `Stepper.of`, which takes up one that has done its work where it fits: it is then ready.
    """

    def __init__(self, model: Decodable, state: Any, captures: bool, compiles: bool):
        self._model: Any = model
        self._state = state
        self._captures = captures
        self._compiles = compiles
        self._functions: dict[StepKind, Callable[[Decodable, Any], None]] = {}
        self._graphs: dict[StepKind, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if captures else None
        self._position = 0

    @classmethod
    def of(cls, model: Decodable, cache: ModelState, cuda_graphs: bool | None, compiled: bool = False) -> Stepper:
        """From `cache` on. CUDA graphs: `None` uses them where the model is on a CUDA device."""
        state = model.decoding_state(cache)
        on_gpu = state.token.is_cuda
        if cuda_graphs and not on_gpu:
            raise ValueError(f'cuda_graphs=True needs the model on a CUDA device, got {state.token.device}')
        if compiled and on_gpu:
            raise ValueError('compiled=True is for a CPU: on a CUDA device steps are captured as graphs')

        stepper = cls(model, state, on_gpu and cuda_graphs is not False, compiled)
        idle = _IDLE.get(model, {}).pop(stepper._signature(), None)
        if idle is not None:
            for buffer, new in zip(_tensors(idle._state), _tensors(state)):
                buffer.copy_(new)
            idle._model, stepper = model, idle
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

    def release(self) -> None:
        """Done: what was compiled and captured may serve the next call for the same shapes."""
        if self._captures or self._compiles:
            # only the newest, as each holds the memory of its graphs
            _IDLE[self._model] = {self._signature(): self}
            # which it is found by, as long as there is one
            self._model = None

    def _signature(self) -> Hashable:
        """What graphs and compiled functions depend on: graphs read parameters where they lie, and both were made for
        these shapes."""
        device = self._state.token.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        parameters = tuple((p.data_ptr(), p.dtype) for p in (*self._model.parameters(), *self._model.buffers()))
        buffers = tuple((t.shape, t.dtype, t.device, t.is_inference()) for t in _tensors(self._state))
        return self._captures, self._compiles, autocast, parameters, buffers

    def _run(self, kind: StepKind) -> None:
        if self._captures:
            if kind not in self._graphs:
                self._graphs[kind] = self._captured(kind)
            self._graphs[kind].replay()
        else:
            self._step(kind)
        self._position += 1

    def _step(self, kind: StepKind) -> None:
        if kind not in self._functions:
            self._functions[kind] = _compiled(kind) if self._compiles else _called(kind)
        # weights that autocast has cast and kept must not outlive a graph, nor a graph use those of a time before it
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(caches and not self._captures)
        # on a CPU small operations are faster in inference mode; the buffers are tensors from outside, and remain so
        plainly = not (self._compiles or self._state.token.is_cuda)
        try:
            with torch.inference_mode() if plainly else torch.no_grad():
                self._functions[kind](self._model, self._state)
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


def _called(kind: StepKind) -> Callable[[Decodable, Any], None]:
    def step(model: Decodable, state: Any) -> None:
        model.step(state, kind)

    return step


def _compiled(kind: StepKind) -> Callable[[Decodable, Any], None]:
    step = _called(kind)
    # the compiler keeps what it made, and counts how often it did, by code object: each step has its own
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    # no Python between kernels, and no guards, which take longer than they: `Stepper` compares signatures
    options: dict[str, Any] = {'cpp_wrapper': True, 'guard_filter_fn': lambda guards: [False] * len(guards)}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)
