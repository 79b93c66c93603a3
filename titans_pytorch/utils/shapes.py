"""The letters of every shape in this package, and the three aliases that carry them in signatures; lengths divided.

    b   batch                          h   heads                    bh  batch and heads, merged
    n   tokens of a call, or chunks    c   tokens inside a chunk    m   rows a chunk stores (c tokens × u)
    d   features                       w   parameter tensors of the memory network
    o   momentum orders                u   keys/values per token    v   views (keys, values)
    i   query positions                j   key positions            p   persistent memory tokens

`Float[Tensor, 'b n d']` reads: a floating-point tensor of shape (batch, tokens, features). The letters are for
readers; nothing checks them at run time (`checks.py` does that, where a user's tensor comes in).
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING or find_spec('jaxtyping') is None:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
else:
    from jaxtyping import Bool, Float, Int

__all__ = ['Bool', 'Float', 'Int', 'divided']


def divided(length: int, size: int, offset: int = 0) -> tuple[int, int]:
    """`divmod(offset + length, size)`.

    The length of an exported program is a symbol, n · k + c. Where n is a multiple of `size`, the remainder is known;
    elsewhere asking for it restricts the program to lengths that leave the same one.
    """
    if not isinstance(length, torch.SymInt):
        # not `divmod`, which the compiler does not know of lengths that vary
        return (offset + length) // size, (offset + length) % size
    constant = int(length.node.expr.as_coeff_Add()[0])
    multiple = length - constant
    more, rest = divmod(int(offset) + constant + int(multiple - multiple // size * size), size)
    return multiple // size + more, rest
