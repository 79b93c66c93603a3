"""The letters of every shape in this package, and the three aliases that carry them in signatures.

    b   batch                          h   heads                    bh  batch and heads, merged
    n   tokens of a call, or chunks    c   tokens inside a chunk    m   rows a chunk stores (c tokens × u)
    d   features                       w   parameter tensors of the memory network
    o   momentum orders                u   keys/values per token    v   views (keys, values)
    i   query positions                j   key positions            p   persistent memory tokens

`Float[Tensor, 'b n d']` reads: a floating-point tensor of shape (batch, tokens, features). The letters are for
readers; nothing checks them at run time (`checks.py` does that, where a user's tensor comes in).
"""

from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Int

__all__ = ['Bool', 'Float', 'Int']
