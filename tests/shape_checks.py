"""Run-time checks of the shape annotations in the package, for `pytest --shapes`.

jaxtyping gives the letters of an annotation their sizes, one size per letter and call; beartype compares tensors with
them. Three kinds of code are left out:

- Triton kernels, which are not Python functions, and mask functions, which FlexAttention compiles;
- arguments of a call that raises: refusing wrong input is the job of the package, and its error is what a test expects;
- the rest of a test once it compiles or exports something, because the compiler cannot trace the checks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
import torch
from beartype import beartype

UNCHECKED = ('masks', 'triton', 'triton_token', '_triton')


def has_shape(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(has_shape, get_args(hint)))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its shapes checked, and no other type.

    jaxtyping passes each function twice: to check the arguments before the call, with a return type of `Any`, and to
    check arguments and result together after it. Only the second check is made.
    """
    hints = function.__annotations__
    if hints.get('return') is Any or not any(map(has_shape, hints.values())):
        return lambda *args, **kwargs: None
    function.__annotations__ = {name: hint if has_shape(hint) else Any for name, hint in hints.items()}
    return beartype(function)


def enable(yes: bool) -> None:
    jaxtyping.config.update('jaxtyping_disable', not yes)


def unchecked_from_here(trace: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(trace)
    def traced(*args: Any, **kwargs: Any) -> Any:
        enable(False)
        return trace(*args, **kwargs)

    return traced


def install() -> None:
    """Check the modules of the package that are imported from now on."""
    finder = jaxtyping.install_import_hook('titans_pytorch', f'{__name__}.checked').hook
    finder.should_instrument = lambda name: (
        name.split('.')[0] == 'titans_pytorch' and name.split('.')[-1] not in UNCHECKED
    )
    torch.compile = unchecked_from_here(torch.compile)
    torch.export.export = unchecked_from_here(torch.export.export)
