"""Kernel of the choice of a token, in one launch: filter, noise and maximum.

Each program owns a row. It reads the logits twice, block by block: once for the largest, and once for the choice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import contiguous_inside, let_next_begin, overlapping, wait_for_inputs

# most tokens at a time
BLOCK = 4096
TOKENS_PER_WARP = 256


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    logits, uniform, tokens, best,
    stride_b, count, temperature, min_p,
    HAS_NOISE: tl.constexpr, HAS_FILTER: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    let_next_begin(START)
    wait_for_inputs(START)
    entry = tl.program_id(0).to(tl.int64)
    logits += entry * stride_b
    uniform += entry * count
    offset = tl.arange(0, BLOCK)

    largest = tl.full((BLOCK,), -float('inf'), tl.float32)
    for start in range(0, count, BLOCK):
        own = tl.load(logits + start + offset, mask=start + offset < count, other=-float('inf')).to(tl.float32)
        # comparisons, unlike maxima, let NaN through
        largest = tl.where((own > largest) | (own != own), own, largest)
    invalid = tl.max((largest != largest).to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(largest != largest, -float('inf'), largest), axis=0)

    # of equal scores the first one wins, at each offset and then among offsets
    highest = tl.full((BLOCK,), -float('inf'), tl.float32)
    number = offset
    for start in range(0, count, BLOCK):
        token = start + offset
        own = tl.load(logits + token, mask=token < count, other=-float('inf')).to(tl.float32)
        score = own
        if HAS_NOISE:
            u = tl.load(uniform + token, mask=token < count, other=0.5)
            noise = -tl.log(tl.maximum(-tl.log(tl.maximum(u, TINY)), TINY))
            score = (own - top) / temperature + noise
            invalid |= tl.max((score != score).to(tl.int32), axis=0) > 0
        if HAS_FILTER:
            score = tl.where(tl.exp(own - top) < min_p, -float('inf'), score)
        better = score > highest
        highest = tl.where(better, score, highest)
        number = tl.where(better, token, number)
    score = tl.max(highest, axis=0)
    chosen = tl.min(tl.where(highest == score, number, count - 1), axis=0)
    tl.store(tokens + entry, chosen.to(tl.int64))
    tl.store(best + entry, tl.where(invalid, float('nan'), score))


def token_choice(
    logits: Tensor,  # … l
    uniform: Tensor | None,  # … l
    temperature: float,
    min_p: float | None,
    tiny: float,
) -> tuple[Tensor, Tensor]:  # …, …
    """Choose a token for each row; the scores returned are in float32."""
    shape, count = logits.shape[:-1], logits.shape[-1]
    rows = contiguous_inside(logits.reshape(-1, count), 1)
    tokens = logits.new_empty(shape, dtype=torch.int64)
    best = logits.new_empty(shape, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(count))
    if len(rows):
        with torch.cuda.device_of(logits):
            _kernel[(len(rows),)](
                logits=rows, uniform=rows if uniform is None else uniform.contiguous(), tokens=tokens, best=best,
                stride_b=rows.stride(0), count=count, temperature=float(temperature),
                min_p=0.0 if min_p is None else float(min_p),
                HAS_NOISE=uniform is not None, HAS_FILTER=min_p is not None, TINY=tiny, BLOCK=block,
                num_warps=max(1, block // TOKENS_PER_WARP), **overlapping(rows),
            )  # fmt: skip
    return tokens, best
