"""Runners of decoding steps over buffers of constant size: eager, compiled, captured as CUDA graphs, or as calls."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titans_pytorch.generation.decodable import Decodable, StepKind
from titans_pytorch.memory.state import LayerSurprises
from titans_pytorch.ops import _dispatch
from titans_pytorch.ops._compilation import kernels_compiled_together
from titans_pytorch.utils.precision import autocast_dtype
from titans_pytorch.utils.shapes import Float, Int

_LOCK = threading.RLock()
"""Guards `_IDLE` and `_COMPILED`; never held while a model runs. Reentrant, because garbage collection may release a
stepper at any point."""

Mode = tuple[StepKind, torch.dtype | None]
"""A kind of step, and autocast's dtype if it is enabled."""


class Stepper:
    """Eager steps of a model, one token at a time; `Stepper.of` picks the subclass."""

    def __init__(self, model: Decodable, state: Any, position: int, surprises: list[LayerSurprises] | None = None):
        self._model: Any = model
        self._state = state
        self._position = position
        self._surprises = surprises

    @staticmethod
    def of(
        model: Decodable,
        cache: Any,
        cuda_graphs: bool | None,
        compiled: bool = False,
        store: bool = True,
        surprises: list[LayerSurprises] | None = None,
    ) -> Stepper | CallStepper:
        """A stepper that continues from `cache`.

        Args:
            cuda_graphs: capture the steps as CUDA graphs. Default: on a CUDA device.
            compiled: compile the steps, on a CPU.
            store: false to read the memories without writing them.
            surprises: a list to which the surprises of each completed chunk are added.
        """
        obstacle = model.obstacle_to_steps(cache) if store else 'store=False'
        if obstacle is not None:
            if compiled or cuda_graphs:
                requested = 'compiled' if compiled else 'cuda_graphs'
                raise ValueError(f'{requested}=True cannot serve this model: {obstacle}')
            return CallStepper(model, cache, store, surprises)
        state = model.decoding_state(cache) if surprises is None else model.decoding_state(cache, with_surprises=True)
        on_gpu = state.token.is_cuda
        if cuda_graphs and not on_gpu:
            raise ValueError(f'cuda_graphs=True needs the model on a CUDA device, got {state.token.device}')
        if compiled and on_gpu:
            raise ValueError('compiled=True is for a CPU: on a CUDA device steps are captured as graphs')

        if compiled:
            return CompiledStepper(model, state, cache.seq_index, surprises)
        if on_gpu and cuda_graphs is not False:
            return CapturedStepper.of_idle(model, state, cache.seq_index, surprises)
        return Stepper(model, state, cache.seq_index, surprises)

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        """Read one more token and return logits, which the next call overwrites."""
        while (kind := self._model.step_kind(self._position)).is_longterm:
            self._run(kind)
        self._state.token.copy_(tokens.unsqueeze(1))
        self._run(kind)
        return self._state.logits

    def cache(self) -> Any:
        """A copy of the model's state, for a later call."""
        return self._model.decoding_cache(self._state, self._position)

    def release(self) -> None:
        """Called when the stepper is no longer needed; a subclass may keep itself for the next sampler."""

    def _run(self, kind: StepKind) -> None:
        self._step(kind)
        self._position += 1
        if self._surprises is not None and kind.ends_chunk:
            self._surprises.append(self._model.step_surprises(self._state))

    def _step(self, kind: StepKind) -> None:
        # inference mode speeds up small operations on a CPU; in-place writes leave the buffers ordinary tensors
        with torch.no_grad() if self._state.token.is_cuda else torch.inference_mode():
            self._model.step(self._state, kind)

    def _mode(self, kind: StepKind) -> Mode:
        return kind, autocast_dtype(self._state.token.device)


class CallStepper:
    """Decoding by one call of the whole model per token, for cases where steps would bypass hooks of its modules."""

    def __init__(self, model: Decodable, cache: Any, store: bool, surprises: list[LayerSurprises] | None):
        self._model, self._cache, self._surprises = model, cache, surprises
        self._kwargs: dict[str, Any] = {'return_cache': True, 'disable_flex_attn': True, 'store': store}
        self._kwargs |= {} if surprises is None else {'return_surprises': True}

    def __call__(self, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        """Read one more token and return logits."""
        logits, self._cache, *new = self._model(tokens.unsqueeze(1), state=self._cache, **self._kwargs)
        if self._surprises is not None:
            self._surprises += new
        return logits[:, -1]

    def cache(self) -> Any:
        """The model's state, for a later call."""
        return self._cache

    def release(self) -> None:
        """Do nothing, as there is nothing to keep."""


class CompiledStepper(Stepper):
    """Steps compiled on a CPU. Each kind is compiled once for all steppers with the same signature."""

    def __init__(self, model: Decodable, state: Any, position: int, surprises: list[LayerSurprises] | None):
        super().__init__(model, state, position, surprises)
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
        # the compiler does not support inference mode
        with torch.no_grad():
            self._functions[mode](self._model, self._state)


class CapturedStepper(Stepper):
    """Steps on a GPU, each kind captured once as a CUDA graph and then replayed."""

    def __init__(
        self,
        model: Decodable,
        state: Any,
        position: int,
        surprises: list[LayerSurprises] | None,
        signature: Hashable,
    ):
        super().__init__(model, state, position, surprises)
        self._signature = signature
        self._graphs: dict[Mode, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @classmethod
    def of_idle(
        cls, model: Decodable, state: Any, position: int, surprises: list[LayerSurprises] | None
    ) -> CapturedStepper:
        """A released stepper that still has its graphs, or a new one."""
        # graphs hold the addresses of parameters
        signature = _signature(model, state), tuple(p.data_ptr() for p in _parameters(model))
        with _LOCK:
            idle = _IDLE.get(model, {}).pop(signature, None)
        if idle is None:
            return cls(model, state, position, surprises, signature)
        _copy(_tensors(state), _tensors(idle._state))
        idle._model, idle._position, idle._surprises = model, position, surprises
        return idle

    def release(self) -> None:
        # only the newest is kept, because each holds the memory of its graphs; it must not keep its model alive
        with _LOCK:
            _IDLE[self._model], self._model = {self._signature: self}, None

    def _step(self, kind: StepKind) -> None:
        mode = self._mode(kind)
        if mode not in self._graphs:
            self._graphs[mode] = self._captured(kind)
        self._graphs[mode].replay()

    def _captured(self, kind: StepKind) -> torch.cuda.CUDAGraph:
        # a graph must neither leave cast weights in autocast's cache nor use older ones from it
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with _dispatch.constant_weights():
                self._warm_up(kind)
                graph = torch.cuda.CUDAGraph()
                # one pool serves all graphs, since they run in sequence and leave nothing in it. A device captures one
                # graph at a time, while other threads may run and replay
                stream = torch.cuda.Stream()
                with _CAPTURING, torch.cuda.graph(graph, self._pool, stream, capture_error_mode='thread_local'):
                    super()._step(kind)
        finally:
            torch.set_autocast_cache_enabled(caches)
        return graph

    def _warm_up(self, kind: StepKind) -> None:
        """Run the step before capture, to compile kernels and initialise libraries; then restore the buffers."""
        buffers = _tensors(self._state)
        saved = [buffer.clone() for buffer in buffers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            with kernels_compiled_together(in_all_threads=False):
                super()._step(kind)
            _copy(saved, buffers)
            for _ in range(3):
                super()._step(kind)
                _copy(saved, buffers)
        torch.cuda.current_stream().wait_stream(side)


_CAPTURING = threading.Lock()

_IDLE: weakref.WeakKeyDictionary[Any, dict[Hashable, CapturedStepper]] = weakref.WeakKeyDictionary()

StepFunction = Callable[[Decodable, Any], None]

_COMPILED: weakref.WeakKeyDictionary[Any, dict[Hashable, dict[Mode, StepFunction]]] = weakref.WeakKeyDictionary()
"""Compiled functions of each model, by signature, the most recently used last."""

MOST_COMPILED = 8
"""Number of signatures for which a model keeps compiled functions; each batch size has its own."""


def _compiled(kind: StepKind) -> StepFunction:
    def step(model: Decodable, state: Any) -> None:
        model.step(state, kind)

    # the compiler caches, and limits recompilation, by code object, so each step gets its own
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    # no Python between kernels, and no guards, which take longer than the kernels: `_signature` replaces them
    options: dict[str, Any] = {'cpp_wrapper': True, 'guard_filter_fn': lambda guards: [False] * len(guards)}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _signature(model: Any, state: Any) -> Hashable:
    """What graphs and compiled functions depend on: modules and their hooks, layouts of parameters and buffers, and
    whether kernels are enabled. Inference tensors are distinguished, because they cannot be written to outside
    inference mode."""
    modules = tuple(
        (type(m), *map(_weakly, (*m._forward_hooks.values(), *m._forward_pre_hooks.values(), vars(m).get('forward'))))
        for m in model.modules()
    )
    tensors = (*_parameters(model), *_tensors(state))
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device, t.is_inference()) for t in tensors)
    return modules, kinds, _dispatch.kernels_enabled()


def _weakly(function: Any) -> Hashable:
    """A reference to a hook that keeps alive neither the hook nor the model whose method it may be."""
    for reference in (weakref.WeakMethod, weakref.ref):
        with contextlib.suppress(TypeError):
            return reference(function)
    return function


def _parameters(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets):
        target.copy_(source)


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
