"""Whether modules are plain: of a class whose computation is known, and with nothing that intercepts their calls.

Faster paths take the parameters of plain modules and compute themselves what a call would. Other modules are called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn import Module, Parameter
from torch.nn.modules import module as module_hooks


def is_intercepted(modules: Iterable[Module]) -> bool:
    """True if one of `modules` has hooks or a `forward` set on the instance, so that only a call of that module, and no
    shortcut for its class, has the right effect."""
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

    A subclass may compute otherwise; a parametrization makes a module one of a subclass.
    """
    return type(module) in classes and not is_intercepted((module,))


def is_plain_linear(linear: Any, norm: Any = None) -> bool:
    """True for a plain linear layer, perhaps after a plain RMS norm with a gain, whose weights are ordinary parameters:
    neither parametrized nor quantised nor distributed.

    Subclasses of `nn.Linear` with its `forward` count, as they differ in their initial values.
    """
    is_own = type(linear).forward is nn.Linear.forward and type(linear.weight) is Parameter
    has_gain = norm is None or (is_plain(norm, nn.RMSNorm) and type(norm.weight) is Parameter)
    return is_own and has_gain and not is_intercepted((linear,))


def plain_parts(sequence: Any, *classes: type[Module] | None) -> list[Any] | None:
    """The parts of a plain `nn.Sequential` of plain modules of these classes; `None` for any other module.

    Args:
        classes: of the parts in order; `None` for a part of any class, which the caller calls or checks.
    """
    if type(sequence) is not nn.Sequential or len(sequence) != len(classes):
        return None
    parts = [*sequence]
    known = [part for part, kind in zip(parts, classes) if kind is not None]
    if [type(part) for part in known] != [kind for kind in classes if kind is not None]:
        return None
    return None if is_intercepted((sequence, *known)) else parts
