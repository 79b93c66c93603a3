"""Run-time checks of the shape annotations in the package, for `pytest --shapes`.

Every function with a `Float`, `Int` or `Bool` in its signature is decorated as its module is imported. jaxtyping gives
each letter of an annotation one size per call, and beartype compares the tensors with it. Three things go unchecked:

- arguments of a call that raises: refusing wrong input is the job of the package, and its error is what a test expects;
- types other than shapes, which mypy checks;
- calls inside a program that is compiled or exported, because the compiler cannot trace the checks.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import jaxtyping
import torch
from beartype import beartype
from beartype.door import is_bearable
from beartype.vale import Is

ALIASES = {'Bool', 'Float', 'Int'}
DECORATOR = f'__import__({__name__!r}).shape_checked'


def has_shape(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(has_shape, get_args(hint)))


def without_other_types(hint: Any) -> Any:
    """`hint` with `Any` in place of types without a shape, except in a union, which would then accept everything."""
    if hint is Ellipsis:
        return hint
    origin, inner = get_origin(hint), get_args(hint)
    if not has_shape(hint) or origin is Callable:
        return Any
    if not inner:
        return hint
    if origin in (Union, UnionType):
        options = (without_other_types(option) if has_shape(option) else option for option in inner)
        return functools.reduce(operator.or_, options)
    if origin is list:
        (item,) = map(without_other_types, inner)
        # beartype compares a single item
        return Annotated[list, Is[lambda items: all(is_bearable(each, item) for each in items)]]
    return origin[tuple(map(without_other_types, inner))]


def shapes_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """A check of the shapes in the signature of `function`.

    jaxtyping asks for two: one of the arguments before the call, whose return type is `Any`, and one of arguments and
    result after it. Only the second is made.
    """
    hints = function.__annotations__
    if hints.get('return', Any) is Any:
        return lambda *args, **kwargs: None
    function.__annotations__ = {name: without_other_types(hint) for name, hint in hints.items()}
    return beartype(function)


def shape_checked(function: Callable[..., Any]) -> Callable[..., Any]:
    checked = jaxtyping.jaxtyped(typechecker=shapes_alone)(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if torch.compiler.is_compiling() else checked)(*args, **kwargs)

    return call


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_data(self.path))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and _has_shape(node):
                # innermost, so that the others, such as `property`, get the checked function
                node.decorator_list.append(ast.parse(DECORATOR, mode='eval').body)
        return compile(ast.fix_missing_locations(tree), self.path, 'exec', dont_inherit=True)


def _has_shape(node: ast.FunctionDef) -> bool:
    arguments = node.args
    declared = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = [node.returns, *(argument.annotation for argument in declared)]
    names = {inner.id for hint in annotations if hint for inner in ast.walk(hint) if isinstance(inner, ast.Name)}
    return bool(names & ALIASES)


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.split('.')[0] != 'titans_pytorch':
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Check the modules of the package, which must not have been imported yet."""
    sys.meta_path.insert(0, Finder)
