"""Bits per byte of a text by context length."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.training.data import BadData, even_starts, windows
from titans_pytorch.training.runs import Run
from titans_pytorch.utils.checks import check_positive
from titans_pytorch.utils.shapes import Int

PIECE = 1024
"""Tokens of each row that one call of the model reads."""


class Evaluation(NamedTuple):
    """The result for one length of context."""

    context: int
    """Tokens that the model reads in each window, starting from an empty memory; it predicts the token after each."""
    bits_per_byte: float
    tokens: int
    """Number of tokens predicted: `context` for each window."""
    bytes: int
    """Length in bytes of the text that these tokens stand for."""
    seconds: float


@torch.no_grad()
def evaluate(
    run: Run,
    text: Int[Tensor, ' n'],
    context: int,
    limit: int | None = None,
    batch_tokens: int = 16_384,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Evaluation:
    """Compute bits per byte over windows of `context` tokens, each read on its own.

    As many windows as fit into the text are spaced evenly over it. They are read in pieces, carrying the state along,
    several windows at a time, so the memory needed grows neither with the length of the text nor with the context.

    Args:
        text: token ids, of any integer dtype.
        limit: approximate number of tokens to predict; at least one window is read, and windows are then further apart.
            Default: all.
        batch_tokens: approximate number of tokens read by one call of the model.
        progress: called with the number of tokens predicted, after each call of the model.

    Raises:
        BadData: if the text is shorter than a window.
        ValueError: for a context or a limit below 1.
    """
    count = num_windows(text, context, limit)
    started, piece = time.perf_counter(), min(context, PIECE)
    nats = torch.zeros((), dtype=torch.float64, device=run.machine.device)
    num_bytes = 0
    for starts in even_starts(text, count, context).split(max(1, batch_tokens // piece)):
        rows = windows(text, starts, context + 1)
        num_bytes += sum(len(run.vocabulary.decode(row)) for row in rows[:, 1:])
        rows, state = rows.to(run.machine.device), None
        for start in range(0, context, piece):
            part = rows[:, start : start + piece + 1]
            with run.machine.autocast():
                loss, state = run.model(part, return_loss=True, state=state, return_state=True, disable_flex_attn=True)
            predicted = len(part) * (part.shape[1] - 1)
            nats += loss.double() * predicted
            progress(predicted)
    bits = nats.item() / math.log(2)
    return Evaluation(context, bits / num_bytes, count * context, num_bytes, time.perf_counter() - started)


def num_windows(text: Int[Tensor, ' n'], context: int, limit: int | None) -> int:
    """Number of windows that `evaluate` reads; raises the same errors."""
    context, *_ = check_positive(context=context, **({} if limit is None else {'limit': limit}))
    fit = (len(text) - 1) // context
    if fit < 1:
        raise BadData(f'the text has {len(text)} tokens, too few for a context of {context}')
    return fit if limit is None else min(fit, max(1, limit // context))
