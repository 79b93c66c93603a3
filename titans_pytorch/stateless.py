"""Calls of a network with weights that are given as arguments, from any number of threads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module


def call_with_weights(model: Module, weights: Mapping[str, Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    """`model(x)` computed with `weights`, by parameter name, in place of the module's own; others keep their value.

    `torch.func.functional_call` writes the weights into the module while it runs, where another thread meets them. Here
    the call has modules of its own, which share everything but parameters with `model`: hooks and submodules that keep
    records work, but attributes that a forward assigns to `self` are gone after the call, as with `nn.DataParallel`.
    """
    if torch.compiler.is_compiling():
        # the compiler takes no module that is made while it traces; and what it traces writes to no module
        return functional_call(model, dict(weights), (x,), kwargs)
    replaced: dict[int, Any] = {id(p): weights[name] for name, p in model.named_parameters() if name in weights}
    return _copied(model, replaced)(x, **kwargs)


def _copied(module: Module, replaced: dict[int, Any]) -> Module:
    """A shallow copy of a module tree in which everything in `replaced`, by `id`, is replaced."""
    if id(module) not in replaced:
        copy = replaced[id(module)] = object.__new__(type(module))
        attributes = dict(module.__dict__)
        children = {name: child if child is None else _copied(child, replaced) for name, child in module._modules.items()}
        parameters = {name: replaced.get(id(p), p) for name, p in module._parameters.items()}
        for name, value in attributes.items():
            # modules and parameters that a module also keeps in a list of its own, as `nn.LSTM` does
            if type(value) in (list, tuple):
                attributes[name] = type(value)(replaced.get(id(item), item) for item in value)
        copy.__dict__.update(attributes, _modules=children, _parameters=parameters)
    return replaced[id(module)]
