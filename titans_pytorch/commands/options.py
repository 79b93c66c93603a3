"""Types of numbers on a command line. argparse puts the name of the option in front of their errors."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from typing import TypeVar

N = TypeVar('N', int, float)


def integer(at_least: int = 0, bits: int = 63) -> Callable[[str], int]:
    """Integers from `at_least` up to, but not including, 2**`bits`, which PyTorch can represent."""
    return _checked(int, lambda value: at_least <= value < 2**bits, f'an integer below 2**{bits}, at least {at_least}')


def length() -> Callable[[str], int]:
    """Numbers of tokens by which to continue a text; added to its length, they are still in PyTorch's range."""
    return integer(bits=62)


def number(at_least: float = 0.0, at_most: float = math.inf) -> Callable[[str], float]:
    """Finite numbers from `at_least` to `at_most`."""
    limits = f'at least {at_least:g}' if at_most == math.inf else f'from {at_least:g} to {at_most:g}'
    return _checked(
        float, lambda value: at_least <= value <= at_most and math.isfinite(value), f'a finite number, {limits}'
    )


def _checked(kind: type[N], fits: Callable[[N], bool], wanted: str) -> Callable[[str], N]:
    def option(text: str) -> N:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f'must be {wanted}, got {text!r}')

    return option
