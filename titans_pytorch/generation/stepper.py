"""Decoding step by step, over state of constant size: what a model offers for it, and who runs the steps."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titans_pytorch.generation.state import ModelState
from titans_pytorch.ops import _dispatch
from titans_pytorch.utils.shapes import Float, Int


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
        self,
        x: Tensor,
        *,
        state: Any = None,
        cache: Any = None,
        return_cache: bool = False,
        disable_flex_attn: bool,
        store: bool = True,
    ) -> Any:
        """Logits of a whole sequence, of `x` after `state`, or of what in `x` follows on `cache`; and the cache, if
        asked for."""

    def train(self, mode: bool = True) -> Any: ...

    def obstacle_to_steps(self, cache: ModelState) -> str | None:
        """Why `step` does not compute from `cache` on what a call does; `None` if it does."""

    def decoding_state(self, cache: ModelState) -> Any:
        """`cache` as a `StepState`."""

    def decoding_cache(self, state: Any, position: int) -> ModelState:
        """The opposite; it shares nothing with the state."""

    def step_kind(self, position: int) -> StepKind: ...

    def step(self, state: Any, kind: StepKind) -> None:
        """One position, from the tensors of `state` into the tensors of `state`. No shape depends on the position, and
        all else that does on a tensor: so each kind of step can be captured as a CUDA graph, and replayed."""


_LOCK = threading.Lock()
"""Of what is kept for a model between calls; never held while a model runs."""

_SAMPLED: weakref.WeakKeyDictionary[Any, tuple[int, bool]] = weakref.WeakKeyDictionary()
"""For each model that samples now how many do, and whether it was in training mode before."""


@contextlib.contextmanager
def evaluation_mode(model: Decodable) -> Iterator[None]:
    """The model in evaluation mode; of several at a time, the last to leave restores the mode before the first."""
    with _LOCK:
        count, was_training = _SAMPLED.get(model, (0, model.training))
        _SAMPLED[model] = count + 1, was_training
        model.train(False)
    try:
        yield
    finally:
        with _LOCK:
            count, was_training = _SAMPLED.pop(model)
            if count > 1:
                _SAMPLED[model] = count - 1, was_training
            else:
                model.train(was_training)


Mode = tuple[StepKind, torch.dtype | None]
"""A kind of step, and what autocast lowers to."""


class Stepper:
    """Decodes token by token. Build one by `Stepper.of`."""

    def __init__(self, model: Decodable, state: Any, position: int):
        self._model: Any = model
        self._state = state
        self._position = position

    @staticmethod
    def of(
        model: Decodable, cache: ModelState, cuda_graphs: bool | None, compiled: bool = False, store: bool = True
    ) -> Stepper | CallStepper:
        """From `cache` on. CUDA graphs: `None` uses them where the model is on a CUDA device. Compiled: on a CPU.
        Without `store` memories are read and not written."""
        obstacle = model.obstacle_to_steps(cache) if store else 'store=False'
        if obstacle is not None:
            if compiled or cuda_graphs:
                asked = 'compiled' if compiled else 'cuda_graphs'
                raise ValueError(f'{asked}=True cannot serve this model: {obstacle}')
            return CallStepper(model, cache, store)
        state = model.decoding_state(cache)
        on_gpu = state.token.is_cuda
        if cuda_graphs and not on_gpu:
            raise ValueError(f'cuda_graphs=True needs the model on a CUDA device, got {state.token.device}')
        if compiled and on_gpu:
            raise ValueError('compiled=True is for a CPU: on a CUDA device steps are captured as graphs')

        if compiled:
            return CompiledStepper(model, state, cache.seq_index)
        if on_gpu and cuda_graphs is not False:
            return CapturedStepper.of_idle(model, state, cache.seq_index)
        return Stepper(model, state, cache.seq_index)

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
        """Done."""

    def _run(self, kind: StepKind) -> None:
        self._step(kind)
        self._position += 1

    def _step(self, kind: StepKind) -> None:
        # the buffers are tensors from outside, and remain so; on a CPU small operations are faster in inference mode
        with torch.no_grad() if self._state.token.is_cuda else torch.inference_mode():
            self._model.step(self._state, kind)

    def _mode(self, kind: StepKind) -> Mode:
        device = self._state.token.device.type
        return kind, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class CallStepper:
    """Decodes by a call of the whole model for each token, so that every module is called as anywhere else."""

    def __init__(self, model: Decodable, cache: ModelState, store: bool):
        self._model, self._cache, self._store = model, cache, store

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        """The logits after one more token."""
        logits, self._cache = self._model(
            tokens.unsqueeze(1), state=self._cache, return_cache=True, disable_flex_attn=True, store=self._store
        )
        return logits[:, -1]

    def cache(self) -> ModelState:
        """The state, to continue from later."""
        return self._cache

    def release(self) -> None:
        """Done."""


class CompiledStepper(Stepper):
    """On a CPU: each kind of step is compiled once, for all steppers of the same signature."""

    def __init__(self, model: Decodable, state: Any, position: int):
        super().__init__(model, state, position)
        signature = _signature(model, state)
        with _LOCK:
            of_model = _COMPILED.setdefault(model, {})
            self._functions = of_model[signature] = of_model.pop(signature, {})
            while len(of_model) > MOST_COMPILED:
                del of_model[next(iter(of_model))]

    def _step(self, kind: StepKind) -> None:
        mode = self._mode(kind)
        if mode not in self._functions:
            self._functions[mode] = _compiled(kind)
        # not in inference mode, which the compiler does not know
        with torch.no_grad():
            self._functions[mode](self._model, self._state)


class CapturedStepper(Stepper):
    """On a GPU: each kind of step is captured once as a CUDA graph, and replayed."""

    def __init__(self, model: Decodable, state: Any, position: int, signature: Hashable):
        super().__init__(model, state, position)
        self._signature = signature
        self._graphs: dict[Mode, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @classmethod
    def of_idle(cls, model: Decodable, state: Any, position: int) -> CapturedStepper:
        """One that has done its work, with its graphs, or a new one."""
        # graphs read parameters where they lie
        signature = _signature(model, state), tuple(p.data_ptr() for p in _parameters(model))
        with _LOCK:
            idle = _IDLE.get(model, {}).pop(signature, None)
        if idle is None:
            return cls(model, state, position, signature)
        for buffer, new in zip(_tensors(idle._state), _tensors(state)):
            buffer.copy_(new)
        idle._model, idle._position = model, position
        return idle

    def release(self) -> None:
        # only the newest, as each holds the memory of its graphs; an idle one does not keep its model
        with _LOCK:
            _IDLE[self._model], self._model = {self._signature: self}, None

    def _step(self, kind: StepKind) -> None:
        mode = self._mode(kind)
        if mode not in self._graphs:
            self._graphs[mode] = self._captured(kind)
        self._graphs[mode].replay()

    def _captured(self, kind: StepKind) -> torch.cuda.CUDAGraph:
        # weights that autocast has cast and kept must not outlive a graph, nor a graph use those of a time before it
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            self._warm_up(kind)
            graph = torch.cuda.CUDAGraph()
            # one pool for all: they run one after the other, and leave nothing in it. A device captures one graph at a
            # time; other threads may run and replay meanwhile
            own = torch.cuda.Stream()
            with _CAPTURING, torch.cuda.graph(graph, self._pool, own, capture_error_mode='thread_local'):
                super()._step(kind)
        finally:
            torch.set_autocast_cache_enabled(caches)
        return graph

    def _warm_up(self, kind: StepKind) -> None:
        """Libraries set themselves up, and kernels are compiled."""
        buffers = _tensors(self._state)
        kept = [buffer.clone() for buffer in buffers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                super()._step(kind)
                for buffer, before in zip(buffers, kept):
                    buffer.copy_(before)
        torch.cuda.current_stream().wait_stream(side)


_CAPTURING = threading.Lock()

_IDLE: weakref.WeakKeyDictionary[Any, dict[Hashable, CapturedStepper]] = weakref.WeakKeyDictionary()

StepFunction = Callable[[Decodable, Any], None]

_COMPILED: weakref.WeakKeyDictionary[Any, dict[Hashable, dict[Mode, StepFunction]]] = weakref.WeakKeyDictionary()
"""For each model, by signature; the newest last."""

MOST_COMPILED = 8
"""Signatures of a model whose functions are kept: a batch size is one."""


def _compiled(kind: StepKind) -> StepFunction:
    def step(model: Decodable, state: Any) -> None:
        model.step(state, kind)

    # the compiler keeps what it made, and counts how often it did, by code object: each step has its own
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    # no Python between kernels, and no guards, which take longer than they: signatures are compared instead
    options: dict[str, Any] = {'cpp_wrapper': True, 'guard_filter_fn': lambda guards: [False] * len(guards)}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _signature(model: Any, state: Any) -> Hashable:
    """What graphs and compiled functions were made for: modules and their hooks, parameters, buffers, and the kernels'
    switch. A tensor made in inference mode cannot be written to outside."""
    modules = tuple(
        (type(m), *m._forward_hooks.values(), *m._forward_pre_hooks.values(), vars(m).get('forward'))
        for m in model.modules()
    )
    tensors = (*_parameters(model), *_tensors(state))
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device, t.is_inference()) for t in tensors)
    return modules, kinds, _dispatch.kernels_enabled()


def _parameters(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
