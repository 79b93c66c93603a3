"""Functional calls of modules with weights as arguments, under tracing and `torch.func`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _autograd as autograd_c
from torch.func import functional_call
from torch.nn import Module, Parameter
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

Fields = TypeVar('Fields', bound=tuple[Any, ...])

# seen with 2.11, and not with 2.13
WRONG_IN_INFERENCE = TorchVersion(torch.__version__) < '2.13'


def call_with_weights(model: Module, weights: Mapping[str, Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    """`model(x)` with `weights`, by parameter name, in place of its own; other parameters keep their values.

    `torch.func.functional_call` writes the weights into the module during the call, where other threads would see them.
    Here the call uses copies of the modules, which share everything but parameters with `model`: hooks work, but
    attributes that a forward assigns to `self` are lost after the call, as with `nn.DataParallel`.
    """
    if torch.compiler.is_compiling():
        # the compiler does not accept modules created during tracing, and functional_call writes to none there
        return functional_call(model, dict(weights), (x,), kwargs)
    return with_tensors(model, {id(p): weights[name] for name, p in model.named_parameters() if name in weights})(
        x, **kwargs
    )


def transformed(transform: Callable[..., Any], fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`transform(fn, **options)` for `torch.func.grad` or `vmap`, also under hooks on saved tensors.

    PyTorch refuses transforms under such hooks, that is, inside `torch.utils.checkpoint` and `save_on_cpu`. Here the
    hooks are suspended during the call: the result is the same, and tensors that the transform saves are not hooked.
    """
    inner = transform(fn, **options)
    if torch.compiler.is_compiling():
        return inner

    def call(*args: Any) -> Any:
        hooks = []
        while (pair := autograd_c._top_saved_tensors_default_hooks(False)) is not None:
            hooks.append(pair)
            autograd_c._pop_saved_tensors_default_hooks()
        try:
            return inner(*args)
        finally:
            for pair in reversed(hooks):
                autograd_c._push_saved_tensors_default_hooks(*pair)

    return call


def replaced(fields: Fields, /, **changes: Any) -> Fields:
    """A named tuple with some fields changed.

    In a compiled function, `_replace` of a named tuple that the function returns gives an empty tuple (PyTorch 2.11).
    """
    return type(fields)(**{**fields._asdict(), **changes})  # type: ignore[attr-defined]


def is_traced() -> bool:
    """True while the compiler traces and under transforms of `torch.func`, where tensors have no values to read and
    `requires_grad` is not reliable."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def keeping_random_state(device: torch.device) -> AbstractContextManager[None]:
    """A context for drawing random numbers on the CPU and on `device`; their states are restored at its end."""
    return torch.random.fork_rng([device] if device.type == 'cuda' else [])


@contextmanager
def on_cpu() -> Iterator[None]:
    """Run on the CPU, and restore its random state at the end."""
    with keeping_random_state(torch.device('cpu')), torch.device('cpu'):
        yield


def can_checkpoint() -> bool:
    """True if activation checkpointing has an effect: with gradients, and outside transforms of `torch.func`, which do
    not support it."""
    return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def checkpointed(fn: Callable[..., Any], compiles: bool) -> Callable[..., Any]:
    """`fn` with activation checkpointing: the backward pass recomputes what is not kept.

    compiles: false if `fn` uses `torch.func`, which the compiler cannot trace here; it then runs uncompiled.
    """
    return partial(checkpoint if compiles else _checkpoint_eagerly, fn, use_reentrant=False)


@torch.compiler.disable
def _checkpoint_eagerly(*args: Any, **kwargs: Any) -> Any:
    return checkpoint(*args, **kwargs)


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """True while `torch.export` traces. PyTorch's own function, traced itself, is always true (at least up to 2.11)."""
    return torch.compiler.is_exporting()


def constant(value: int) -> int:
    """`value` as a constant to the compiler, which then makes a graph for each value, each as fast as the first.

    By default, `torch.compile` treats a number or length as a symbol once it has changed. Sizes that depend on it are
    then symbolic, and a graph, which still serves only one schedule of chunks, takes ten times as long.
    """
    if torch.compiler.is_compiling() and not is_exporting():
        return len(range(value))  # the compiler treats the ends of a range as constants
    return value


def compile_each_length(*lengths: int) -> None:
    """Make the compiler build a graph for each of these tensor lengths; see `constant`."""
    for length in lengths:
        constant(length)


def frozen_as_buffers(model: Module) -> Module:
    """A copy of a network in which parameters without `requires_grad` have become buffers."""
    copy = deepcopy(model)
    buffers = {parameter: parameter.detach() for parameter in copy.parameters()}  # tied ones stay tied
    for module in copy.modules():
        for name, parameter in [*module._parameters.items()]:
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, buffers[parameter])
    return copy


def on_meta(model: Module) -> Module:
    """A copy of a network on the meta device. Unlike with `Module.to`, tied tensors stay tied."""
    empty: dict[int, Any] = {id(p): Parameter(p.detach().to('meta')) for p in model.parameters()}
    return deepcopy(model, empty | {id(buffer): buffer.to('meta') for buffer in model.buffers()})


def with_tensors(model: Module, tensors: dict[int, Any]) -> Module:
    """A shallow copy of a module tree with `tensors` in place of the tensors with these `id`s.

    Modules and tensors in lists, tuples and dictionaries among a module's attributes, which `nn.LSTM` has, are replaced
    too, and bound methods among the attributes are bound to the copy.
    """
    substitutes = {id(module): object.__new__(type(module)) for module in model.modules()} | tensors

    def of(value: Any) -> Any:
        if id(value) in substitutes:
            return substitutes[id(value)]
        if isinstance(value, MethodType) and id(value.__self__) in substitutes:
            return MethodType(value.__func__, substitutes[id(value.__self__)])
        if type(value) in (list, tuple):
            items = [of(item) for item in value]
            return type(value)(items) if any(new is not old for new, old in zip(items, value)) else value
        if type(value) in (dict, OrderedDict):
            entries = {key: of(item) for key, item in value.items()}
            return type(value)(entries) if any(entries[key] is not value[key] for key in value) else value
        return value

    for module in model.modules():
        substitutes[id(module)].__dict__.update({name: of(value) for name, value in vars(module).items()})
    return substitutes[id(model)]


def outside_inference(t: Tensor) -> Tensor:
    """`t`, or, if it was made in inference mode but is used outside, where autograd refuses it, a copy of it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not t.is_inference():
        return t
    return t.clone()


def call_outside_inference(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, outside inference mode in cases where `torch.func` takes wrong gradients inside it."""
    if torch.compiler.is_compiling() or not (WRONG_IN_INFERENCE and torch.is_inference_mode_enabled()):
        return fn(*args)
    with torch.inference_mode(False), torch.no_grad():
        return fn(*tree_map_only(Tensor, outside_inference, args))
