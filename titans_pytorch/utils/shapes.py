"""Shape annotations: the letters of dimensions, and three aliases for tensors; also functions of lengths.

    b   batch                          h   heads                    bh  batch and heads, merged
    n   tokens of a call, or chunks    c   tokens inside a chunk    m   rows a chunk stores (c tokens × u)
    d   features                       w   parameter tensors of the memory network, or windows of attention
    o   momentum orders                u   keys/values per token    v   views (keys, values)
    i   query positions                j   key positions            p   persistent memory tokens
    r   blocks of chunks, documents    t   rows of a block          e   features of a head, or hidden features
    s   residual streams               k   states of a parameter: its weights, and its momentum of each order
    f   entries of a parameter         g   gates of a head          x   features of a gate's input
    l   vocabulary, or other logits    half  pairs of features that rotate together

Letters side by side are merged dimensions: bs, hd, rn; qkv are queries, keys and values.

`Float[Tensor, 'b n d']` reads: a floating-point tensor of shape (batch, tokens, features). A name that begins with `_`
stands for any size. An absent tensor that an operation has to return has shape (0). `make shapes` runs tests with these
annotations checked; otherwise only `checks.py` checks tensors, when a user passes them.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING or find_spec('jaxtyping') is None:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
else:
    from jaxtyping import Bool, Float, Int

__all__ = ['Bool', 'Float', 'Int', 'concatenated', 'divided', 'is_empty']


def divided(length: int, size: int, offset: int = 0) -> tuple[int, int]:
    """`divmod(offset + length, size)`.

    In an exported program, lengths are symbolic, n · k + c. If n is a multiple of `size`, the remainder is a constant;
    otherwise the program is restricted to lengths with the same remainder.
    """
    if not isinstance(length, torch.SymInt):
        # not `divmod`, which the compiler does not support for dynamic lengths
        return (offset + length) // size, (offset + length) % size
    constant = int(length.node.expr.as_coeff_Add()[0])
    multiple = length - constant
    more, rest = divmod(int(offset) + constant + int(multiple - multiple // size * size), size)
    return multiple // size + more, rest


def is_empty(length: int) -> bool:
    """True for 0. A symbolic length counts as not empty, so that a program is not restricted to a single length."""
    return isinstance(length, int) and length == 0


def concatenated(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, but without a copy if only one tensor is not empty."""
    present = [t for t in tensors if not is_empty(t.shape[dim])]
    same = len({t.dtype for t in tensors}) == 1
    return present[0] if same and len(present) == 1 else torch.cat([*tensors], dim=dim)
