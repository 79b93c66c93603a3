"""Kernel of mixtures for one token, in one launch: norm, product, softmax and sum.

Each program owns a mixture of a batch entry, and holds all choices and a block of features at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import begin, contiguous_inside, norm_eps, overlapping, wait_for_inputs

# most features at a time
BLOCK = 512
# entries per warp, over all choices in these features
ENTRIES_PER_WARP = 2048


@triton.jit
def _rows(of_choices, choice, feature, CHOICES: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """These features (1, d) of rows (j, 1)."""
    present = (choice < CHOICES) & (feature < DIM)
    return tl.load(of_choices + choice * DIM + feature, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x, choices, gain, weight, bias, out,
    batch, stride_b, eps,
    CHOICES: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    begin(START)
    entry, mixture = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += entry * stride_b
    choices += entry * CHOICES * DIM
    weight += mixture * CHOICES * DIM
    choice, feature = tl.arange(0, PADDED)[:, None], tl.arange(0, BLOCK)[None, :]

    first_weight = _rows(weight, choice, feature, CHOICES, DIM)
    first_gain = tl.load(gain + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    of_bias = tl.load(bias + mixture * CHOICES + choice, mask=choice < CHOICES, other=0.0).to(tl.float32)
    wait_for_inputs(START)

    first_rows = _rows(choices, choice, feature, CHOICES, DIM)
    own = tl.load(x + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    squares = own * own
    terms = own * first_gain * first_weight
    for start in tl.static_range(BLOCK, DIM, BLOCK):
        own = tl.load(x + start + feature, mask=start + feature < DIM, other=0.0).to(tl.float32)
        squares += own * own
        own *= tl.load(gain + start + feature, mask=start + feature < DIM, other=0.0).to(tl.float32)
        terms += own * _rows(weight, choice, start + feature, CHOICES, DIM)
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=1, keep_dims=True) / DIM + eps)
    logits = tl.sum(terms, axis=1, keep_dims=True) * inverse + of_bias
    logits = tl.where(choice < CHOICES, logits, -float('inf'))
    shares = tl.exp(logits - tl.max(logits, axis=0, keep_dims=True))
    shares /= tl.sum(shares, axis=0, keep_dims=True)

    out += (mixture * batch + entry) * DIM
    tl.store(out + feature, tl.sum(shares * first_rows, axis=0, keep_dims=True), mask=feature < DIM)
    for start in tl.static_range(BLOCK, DIM, BLOCK):
        rows = _rows(choices, choice, start + feature, CHOICES, DIM)
        mixed = tl.sum(shares * rows, axis=0, keep_dims=True)
        tl.store(out + start + feature, mixed, mask=start + feature < DIM)


def token_mixture(
    x: Tensor,  # b 1 d
    choices: Tensor,  # b 1 c d
    norm: tuple[Tensor, float | None],  # d
    weight: Tensor,  # vc d
    bias: Tensor,  # vc
) -> Tensor:  # v b 1 d
    batch, _, count, dim = choices.shape
    mixtures, (gain, eps) = len(weight) // count, norm
    x, choices = contiguous_inside(x, 1), choices.contiguous()
    out = x.new_empty(mixtures, batch, 1, dim)
    if not batch:
        return out

    padded, block = triton.next_power_of_2(count), min(BLOCK, triton.next_power_of_2(dim))
    with torch.cuda.device_of(x):
        _kernel[(batch, mixtures)](
            x=x, choices=choices, gain=gain.contiguous(), weight=weight.contiguous(), bias=bias.contiguous(), out=out,
            batch=batch, stride_b=x.stride(0), eps=norm_eps(eps),
            CHOICES=count, DIM=dim, PADDED=padded, BLOCK=block, **overlapping(x, gain, weight, bias),
            num_warps=max(1, padded * block // ENTRIES_PER_WARP),
        )  # fmt: skip
    return out
