"""Checks of user input. Each error names the argument, the expectation and the value received.

Functions that return a value return the argument in a normal form: sizes as `int` (also from NumPy integers, which
occur in configuration files), numbers as `float`, token ids as int64, masks as booleans.
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from titans_pytorch.utils.functional import is_traced, outside_inference
from titans_pytorch.utils.precision import autocast_dtype
from titans_pytorch.utils.shapes import Bool, Int


def first_line(cause: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return [*str(cause).splitlines(), type(cause).__name__][0]


def described(value: Any) -> str:
    """A wrong value for an error message: its `repr`, or its shape or type if that is long."""
    if isinstance(value, Tensor):
        return f'a tensor {tuple(value.shape)} of {value.dtype}'
    if isinstance(value, Module) or len(text := repr(value)) > 60:
        return type(value).__name__
    return text


def type_of(value: Any) -> str:
    """The type of a wrong value, with a hint if it is a state passed as the second positional argument."""
    return type(value).__name__ + ('; pass a state by keyword, as state=' if hasattr(value, 'seq_index') else '')


# sizes and numbers


def check_integer(name: str, value: Any, at_least: int | None = None) -> int:
    """`value` as an `int`; booleans and whole floats are not accepted."""
    wanted = {None: 'an integer', 1: 'a positive integer'}.get(at_least, f'an integer of at least {at_least}')
    if type(value) is not int and not isinstance(value, torch.SymInt):
        is_boolean = isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool)
        if is_boolean or not hasattr(value, '__index__'):
            raise TypeError(f'{name} must be {wanted}, got {described(value)}')
        try:
            value = operator.index(value)
        except (TypeError, ValueError, RuntimeError):  # an array or tensor that is not a single integer
            raise TypeError(f'{name} must be {wanted}, got {described(value)}') from None
    if at_least is not None and value < at_least:
        raise ValueError(f'{name} must be {wanted}, got {value}')
    return value


def check_positive(**sizes: Any) -> list[int]:
    """Check that every size is an integer of at least 1."""
    return [check_integer(name, size, 1) for name, size in sizes.items()]


def check_not_negative(**sizes: Any) -> list[int]:
    """Check that every size is an integer of at least 0."""
    return [check_integer(name, size, 0) for name, size in sizes.items()]


def check_integers(name: str, values: Any) -> list[int]:
    """A list of integers, from any iterable or from a tensor or array of one dimension."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        raise TypeError(f'{name} must be integers, in one dimension, got {described(values)}')
    integers = []
    for index, value in enumerate(values):
        try:
            integers.append(check_integer(f'{name}[{index}]', value))
        except TypeError as cause:
            raise TypeError(f'{name} must be integers, in one dimension: {cause}') from None
    return integers


def check_multiple(name: str, size: Any, of_name: str, of: int) -> int:
    size = check_integer(name, size, 1)
    if size % of:
        raise ValueError(f'{name} must be a multiple of {of_name}={of}, got {size}')
    return size


def check_number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """`value` as a finite `float`."""
    bound = f' above {above}' if above is not None else f' of at least {at_least}' if at_least is not None else ''
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f'{name} must be a number{bound}, got {described(value)}')
    number = float(value)
    fits = (above is None or number > above) and (at_least is None or number >= at_least)
    if not (fits and math.isfinite(number)):
        raise ValueError(f'{name} must be a finite number{bound}, got {value}')
    return number


def check_biases(**biases: Any) -> None:
    """Check that every bias is a finite number or `None`."""
    for name, bias in biases.items():
        if bias is not None:
            check_number(name, bias)


def check_hidden_width(name: str, width: int, factor: Any, gated: bool = False) -> int:
    """Hidden width of a feedforward network: `factor` · `width`, or two thirds of that if `gated`."""
    hidden = width * check_number(name, factor, above=0)
    hidden = int(hidden * 2 / 3) if gated else int(hidden)
    if hidden < 1:
        raise ValueError(
            f'{name} must give a hidden layer of at least one feature for a width of {width}, got {factor}'
        )
    return hidden


# flags, functions and modules


def check_flags(**flags: Any) -> None:
    """Check that every flag is a boolean: a truthy value of another type is an argument in the wrong place."""
    for name, flag in flags.items():
        if type(flag) is not bool and not isinstance(flag, np.bool_):
            came = type_of(flag) if hasattr(flag, 'seq_index') else described(flag)
            raise TypeError(f'{name} must be True or False, got {came}')


def check_bound(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check that `function` can be called with `arguments`, which a user passed as `name`."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise TypeError(f'{name} must hold arguments of {function.__name__}: {error}') from None


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Default values of a function's arguments."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def flags_among(arguments: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """The `arguments` of a call that are flags of `function`, that is, have a boolean default."""
    return {name: arguments[name] for name, default in defaults_of(function).items() if isinstance(default, bool)}


def checked_arguments(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
) -> list[int]:
    """The sizes among the `arguments` (`locals()`) of a call of `function`, checked: positive ones, then non-negative
    ones.

    The flags of `function`, that is, parameters with a boolean default, are checked too.
    """
    check_flags(**flags_among(arguments, function))
    sizes = check_positive(**{name: arguments[name] for name in positive})
    return sizes + check_not_negative(**{name: arguments[name] for name in not_negative})


def check_callable(**functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f'{name} must be callable, got {described(function)}')


def check_module(**modules: Any) -> None:
    """Check that every module is a `torch.nn.Module` or `None`."""
    for name, module in modules.items():
        if module is not None and not isinstance(module, Module):
            raise TypeError(f'{name} must be a torch.nn.Module, got {described(module)}')


def check_keywords(**mappings: Any) -> None:
    """Check that every mapping holds keyword arguments for another call."""
    for name, mapping in mappings.items():
        if not isinstance(mapping, Mapping) or not all(isinstance(key, str) for key in mapping.keys()):
            raise TypeError(f'{name} must be a mapping of keyword arguments, got {described(mapping)}')


# tensors


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type_of(value)}')


def check_floating(name: str, value: Any, dtype: torch.dtype | None = None) -> None:
    """Check for a floating-point tensor, of `dtype` if given; under autocast, of any floating-point dtype."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f'{name} must be a floating-point tensor, got {value.dtype}')
    if dtype is not None and value.dtype != dtype and autocast_dtype(value.device) is None:
        raise TypeError(f'{name} must be of {dtype}, as the parameters are, got {value.dtype}')


def check_precision(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Check that `value`, from an earlier call of a module of `dtype`, is in float64 if and only if the module is."""
    if (value.dtype == torch.float64) != (dtype == torch.float64):
        precision = torch.promote_types(dtype, torch.float32)
        raise TypeError(f'{name} must be {precision}, as the parameters are {dtype}, got {value.dtype}')


def check_origin(name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Check that `value`, from an earlier call of a module of `dtype`, is on `device` and passes `check_precision`."""
    check_precision(name, value, dtype)
    if value.device != device:
        raise ValueError(f'{name} must be on {device}, as the input is, got {value.device}')


def checked_carried(name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Check `value`, rows from an earlier call of a module of `dtype`, by `check_origin`; return it, cast if `dtype` is
    half precision."""
    check_origin(name, value, dtype, device)
    return outside_inference(value.to(dtype) if dtype.itemsize == 2 else value)


def is_integral(value: Tensor) -> bool:
    """True for a tensor of integers; booleans do not count."""
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def check_integral(name: str, value: Any) -> None:
    check_tensor(name, value)
    if not is_integral(value):
        raise TypeError(f'{name} must hold integers, got {value.dtype}')


def check_shape(name: str, value: Tensor, **expected: int | None) -> None:
    """`check_shape('seq', seq, batch=None, length=None, dim=16)`: `None` takes any size of at least 1."""
    fits = value.ndim == len(expected) and all(
        size >= 1 if want is None else size == want for size, want in zip(value.shape, expected.values())
    )
    if not fits:
        wanted = ', '.join(axis if want is None else f'{axis}={want}' for axis, want in expected.items())
        empty = ', none of them empty' if 0 in value.shape else ''
        raise ValueError(f'{name} must be ({wanted}){empty}, got {tuple(value.shape)}')


def check_broadcasts(name: str, value: Any, to: Tensor) -> None:
    """Check for a floating-point tensor whose product with `to` has the shape of `to`."""
    check_floating(name, value)
    sizes = [1] * (to.ndim - value.ndim) + [*value.shape]
    if len(sizes) != to.ndim or not all(size == 1 or size == full for size, full in zip(sizes, to.shape)):
        raise ValueError(f'{name} must broadcast to {tuple(to.shape)}, got {tuple(value.shape)}')


def check_not_traced(name: str) -> None:
    """Refuse `torch.jit.trace`, which would bake every length, and every value computed from it, into its graph."""
    if torch.jit.is_tracing():
        raise RuntimeError(f'{name} cannot be traced by torch.jit.trace: use torch.export.export')


def values_are_at_hand(value: Tensor) -> bool:
    """True if the values of a tensor can be read for a check.

    On a GPU, reading synchronises with the device; in a compiled, exported or transformed function there are no values.
    """
    return value.device.type == 'cpu' and not is_traced()


def checked_mask(name: str, mask: Any, batch: int, length: int) -> Bool[Tensor, 'b n']:
    """`mask` (batch, length) as booleans; integers must be 0 or 1, which is checked if `values_are_at_hand`."""
    check_tensor(name, mask)
    if mask.dtype != torch.bool and not is_integral(mask):
        raise TypeError(f'{name} must be a boolean tensor, or hold the integers 0 and 1, got {mask.dtype}')
    check_shape(name, mask, batch=batch, length=length)
    if mask.dtype != torch.bool and values_are_at_hand(mask):
        low, high = _bounds(mask)
        if low < 0 or high > 1:
            raise ValueError(f'{name} must hold the integers 0 and 1 only, got values in [{low}, {high}]')
    return mask.bool()


def check_leaves_tokens(name: str, mask: Bool[Tensor, 'b n']) -> None:
    """Check that a mask is true somewhere; on a GPU this synchronises with the device."""
    if not mask.any():
        raise ValueError(f'{name} must leave at least one token, got only padding')


def checked_token_ids(
    name: str, ids: Any, num_tokens: int | None, batch: int | None = None, length: int | None = None
) -> Int[Tensor, 'b n']:
    """Token ids of any integer dtype, (batch, length), as int64; each in [0, num_tokens) if `num_tokens` is known.

    The range is checked if `values_are_at_hand`; on a GPU the embedding kernel has a device-side assertion.
    """
    check_tensor(name, ids)
    if not is_integral(ids):
        raise TypeError(f'{name} must hold integer token ids, got {ids.dtype}')
    check_shape(name, ids, batch=batch, length=length)
    ids = ids.long()
    if num_tokens is not None and values_are_at_hand(ids):
        low, high = _bounds(ids)
        if low < 0 or high >= num_tokens:
            raise ValueError(f'{name} must hold token ids in [0, num_tokens={num_tokens}), got ids in [{low}, {high}]')
    return ids


def _bounds(values: Tensor) -> tuple[int, int]:
    low, high = values.long().aminmax()
    return int(low), int(high)


def checked_entries(entries: Any, batch: int) -> Int[Tensor, ' e']:
    """Indices of batch entries as a tensor; negative ones count from the end."""
    chosen = check_integers('entries', entries)
    if not all(-batch <= entry < batch for entry in chosen):
        raise ValueError(f'entries must be integers from {-batch} to {batch - 1}, got {chosen}')
    return torch.tensor(chosen, dtype=torch.long, device='cpu') % batch


def checked_state(name: str, state: Any, kind: Any) -> Any:
    """`state` as a named tuple of class `kind`; any tuple of its length is accepted, such as the reference's."""
    if not isinstance(state, tuple) or len(state) != len(kind._fields):
        raise TypeError(f'{name} must be a {kind.__name__}, got {type(state).__name__}')
    return kind(*state)


def checked_key_values(name: str, value: Any, batch: int | None, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """A pair of keys and values, (batch, heads, length, dim) each."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f'{name} must be a pair of keys and values, got {described(value)}')
    for part in value:
        check_floating(name, part)
        fits = part.ndim == 4 and part.shape[1] == heads and part.shape[3] == dim
        if not fits or (batch is not None and part.shape[0] != batch) or part.shape != value[0].shape:
            axes = f'({"batch" if batch is None else f"batch={batch}"}, heads={heads}, length, dim_head={dim})'
            raise ValueError(f'{name} must be keys and values {axes}, got {tuple(part.shape)}')
    keys, values = value
    return keys, values
