"""Whether modules are plain: their class has a known computation, and nothing intercepts their calls.

Faster paths take the parameters of plain modules and do the computation of a call themselves. Other modules are called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn import Module, Parameter
from torch.nn.modules import module as module_hooks


def is_intercepted(modules: Iterable[Module]) -> bool:
    """True if one of `modules` has hooks or a `forward` set on the instance, so that only a call of that module has the
    right effect, not a shortcut for its class."""
    for m in modules:
        hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        if hooks or 'forward' in vars(m):
            return True
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def is_plain(module: Any, *classes: type[Module]) -> bool:
    """True for a module of exactly one of these classes that nothing intercepts.

    A subclass may compute something else; a parametrization turns a module into an instance of a subclass.
    """
    return type(module) in classes and not is_intercepted((module,))


def is_plain_linear(linear: Any, norm: Any = None) -> bool:
    """True for a plain linear layer, possibly after a plain RMS norm with a gain, with weights that are ordinary
    parameters: neither parametrized nor quantised nor distributed.

    Subclasses of `nn.Linear` that keep its `forward` count too; they differ only in their initial values.
    """
    is_own = type(linear).forward is nn.Linear.forward and type(linear.weight) is Parameter
    has_gain = norm is None or (is_plain(norm, nn.RMSNorm) and type(norm.weight) is Parameter)
    return is_own and has_gain and not is_intercepted((linear,))


def plain_parts(sequence: Any, *classes: type[Module] | None) -> list[Any] | None:
    """The parts of a plain `nn.Sequential` of plain modules of these classes; `None` for any other module.

    Args:
        classes: classes of the parts in order; `None` for a part of any class, which the caller calls or checks itself.
    """
    if type(sequence) is not nn.Sequential or len(sequence) != len(classes):
        return None
    parts = [*sequence]
    known = [part for part, kind in zip(parts, classes) if kind is not None]
    if [type(part) for part in known] != [kind for kind in classes if kind is not None]:
        return None
    return None if is_intercepted((sequence, *known)) else parts
