"""How a module is called: with weights given as arguments, traced or transformed, and whether something intercepts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd as autograd_c
from torch.func import functional_call
from torch.nn import Module, Parameter
from torch.nn.modules import module as module_hooks


def call_with_weights(model: Module, weights: Mapping[str, Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    """`model(x)` computed with `weights`, by parameter name, in place of the module's own; others keep their value.

    `torch.func.functional_call` writes the weights into the module while it runs, where another thread meets them. Here
    the call has modules of its own, which share everything but parameters with `model`: hooks and submodules that keep
    records work, but attributes that a forward assigns to `self` are gone after the call, as with `nn.DataParallel`.
    """
    if torch.compiler.is_compiling():
        # the compiler takes no module that is made while it traces; and what it traces writes to no module
        return functional_call(model, dict(weights), (x,), kwargs)
    return with_tensors(model, {id(p): weights[name] for name, p in model.named_parameters() if name in weights})(
        x, **kwargs
    )


def transformed(transform: Callable[..., Any], fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`transform(fn, **options)` for `torch.func.grad` or `vmap`, also where saved tensors pass through hooks.

    PyTorch refuses the transforms there, that is, inside `torch.utils.checkpoint` and `save_on_cpu`. Here the hooks are
    set aside meanwhile: the result is right, and what the transform saves stays where it is.
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


def is_traced() -> bool:
    """Whether tensors belong to a trace of the compiler or to a transform of `torch.func`: they then have no values to
    read, and do not tell whether they need a gradient."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_intercepted(modules: Iterable[Module]) -> bool:
    """Whether hooks, or a `forward` set on an instance, see calls of one of `modules`: then only a call of that module
    has its effect, and no shortcut for its class."""
    own = any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or 'forward' in vars(m)
        for m in modules
    )
    return own or bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def frozen_as_buffers(model: Module) -> Module:
    """A copy of a network in which parameters that need no gradient are buffers."""
    copy = deepcopy(model)
    for module in copy.modules():
        for name, parameter in [*module._parameters.items()]:
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return copy


def on_meta(model: Module) -> Module:
    """A copy of a network without the values of its tensors. Tied ones stay tied, which `Module.to` would part."""
    empty: dict[int, Any] = {id(p): Parameter(p.detach().to('meta')) for p in model.parameters()}
    return deepcopy(model, empty | {id(buffer): buffer.to('meta') for buffer in model.buffers()})


def with_tensors(model: Module, tensors: dict[int, Any]) -> Module:
    """A shallow copy of a module tree with `tensors` in place of the tensors with these `id`s.

    Modules and tensors are also replaced in lists, tuples and dictionaries that a module keeps, as `nn.LSTM` does, and
    methods that it keeps are those of the copy.
    """
    replaced = {id(module): object.__new__(type(module)) for module in model.modules()} | tensors

    def of(value: Any) -> Any:
        if id(value) in replaced:
            return replaced[id(value)]
        if isinstance(value, MethodType) and id(value.__self__) in replaced:
            return MethodType(value.__func__, replaced[id(value.__self__)])
        if type(value) in (list, tuple):
            items = [of(item) for item in value]
            return type(value)(items) if any(new is not old for new, old in zip(items, value)) else value
        if type(value) in (dict, OrderedDict):
            entries = {key: of(item) for key, item in value.items()}
            return type(value)(entries) if any(entries[key] is not value[key] for key in value) else value
        return value

    for module in model.modules():
        replaced[id(module)].__dict__.update({name: of(value) for name, value in vars(module).items()})
    return replaced[id(model)]


def outside_inference(t: Tensor) -> Tensor:
    """`t`, or a copy of it if it was made in inference mode and is used outside, where autograd does not accept it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not t.is_inference():
        return t
    return t.clone()
