"""Rows of a batch in groups that have read the same number of tokens.

A state has one position for all its rows, but the rows of a padded batch have read different numbers of tokens. A batch
without padding is a single group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.models.state import ModelState
from titans_pytorch.utils.shapes import Bool, Int

State = TypeVar('State', ModelState, NeuralMemState)
G = TypeVar('G', bound='RowGroup[Any]')


class RowGroup(Generic[State]):
    """Rows that have read the same number of tokens, and the state that they share."""

    def __init__(self, rows: Sequence[int], state: State | None = None, num_tokens: int = 0):
        self.rows = [*rows]
        self._state: State | None = state
        self.num_tokens = num_tokens

    @property
    def state(self) -> State | None:
        """The state after the tokens read so far, of the rows in their order; `None` before the first."""
        return self._state

    def select(self: G, entries: list[int], rows: Sequence[int]) -> G:
        """Some of the rows, possibly repeated, as the `rows` of another batch."""
        state = self.state
        return type(self)(rows, None if state is None else state.select(entries), self.num_tokens)

    def positions(
        self, count: int, mask: Bool[Tensor, 'b n'] | None, device: torch.device
    ) -> tuple[Int[Tensor, 'r 1'], Int[Tensor, 'r m']]:
        """Row and column of the tokens of a call, where `mask` is true; there are `count` of them in every row."""
        rows = torch.tensor(self.rows, device=device).unsqueeze(1)
        if mask is None:
            return rows, torch.arange(count, device=device).expand(len(rows), -1)
        return rows, mask[rows.squeeze(1)].nonzero()[:, 1].unflatten(0, (-1, count))


class GroupedRows(Generic[G]):
    """All rows of a batch in their groups, with the methods of a cache by which transformers selects rows."""

    groups: list[G]

    @property
    def num_rows(self) -> int:
        return sum(len(group.rows) for group in self.groups)

    def reorder_cache(self, beam_idx: Int[Tensor, ' b']) -> None:
        """Replace the rows by those at these indices, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(self.num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Int[Tensor, ' e'] | Bool[Tensor, ' b']) -> None:
        """Keep the rows with these indices, in this order and with repetitions."""
        rows = torch.arange(self.num_rows)[indices.cpu()].tolist()
        if rows == [*range(self.num_rows)]:  # as often in beam search
            return
        chosen = []
        for group in self.groups:
            entry = {row: index for index, row in enumerate(group.rows)}
            kept = [new for new, old in enumerate(rows) if old in entry]
            if kept:
                chosen.append(group.select([entry[rows[new]] for new in kept], kept))
        self.groups = chosen


def padding_last(mask: Bool[Tensor, 'b n']) -> Int[Tensor, 'b n']:
    """An order of each row's columns that puts all padding, where `mask` is false, at the end; `argsort` inverts it."""
    return (~mask).byte().argsort(dim=1, stable=True)


def rank_of_last_token(mask: Bool[Tensor, 'b n']) -> Int[Tensor, 'b n']:
    """For each column, how many tokens of its row precede the last token up to there; 0 before the first token."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def rearranged(x: Tensor, order: Int[Tensor, 'b n']) -> Tensor:
    """The columns of each row of (b, n, …), rearranged in this order."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), order]


def check_past(groups: Sequence[RowGroup[Any]], past: Tensor) -> None:
    """Check the part of a mask, (b, m), that covers earlier calls: tokens that were read cannot become padding.

    Raises:
        ValueError: if a row has read more tokens than the mask allows.
    """
    left = past.bool().sum(dim=1).tolist()
    for group in groups:
        for row in group.rows:
            if left[row] < group.num_tokens:
                raise ValueError(
                    f'attention_mask must be 1 for all tokens that the cache has read, which are {group.num_tokens} in '
                    f'row {row}, got {left[row]}. Without an attention_mask `generate` takes every padding token for '
                    f'padding, generated ones too: pass one. After the end of a row it has the model read padding: go '
                    f'on from such a batch without its cache'
                )


def split_by_count(groups: Sequence[G], counts: Sequence[int]) -> list[G]:
    """Split groups so that all rows of a group have the same count. `counts` has an entry for each row of the batch."""
    parts = []
    for group in groups:
        own = [counts[row] for row in group.rows]
        distinct = dict.fromkeys(own)
        if len(distinct) == 1:  # the same group keeps its buffers
            parts.append(group)
            continue
        for count in distinct:
            entries = [entry for entry, other in enumerate(own) if other == count]
            parts.append(group.select(entries, [group.rows[entry] for entry in entries]))
    return parts
