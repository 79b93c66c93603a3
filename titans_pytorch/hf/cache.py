"""`TitansCache`, the states of a batch between calls, in the form of Hugging Face's caches.

A `ModelState` has one position for all of its rows. The rows of a padded batch have read different numbers of tokens,
so they are grouped by that number, and each group has a state. A batch without padding is one group.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NoReturn
from weakref import finalize

import torch
from torch import Tensor
from transformers import Cache

from titans_pytorch.generation.stepper import CallStepper, Stepper
from titans_pytorch.models.base import Transformer
from titans_pytorch.models.state import ModelState
from titans_pytorch.utils.shapes import Bool, Float, Int

Read = Callable[[Tensor, ModelState | None], tuple[list[Tensor], ModelState | None]]


class Group:
    """Rows of a batch that have read the same number of tokens, and their state, in buffers while they step."""

    _release: finalize

    def __init__(self, rows: Int[Tensor, ' r'], state: ModelState | None = None):
        self.rows = rows
        self._state = state
        self._stepper: Stepper | CallStepper | None = None

    @property
    def state(self) -> ModelState | None:
        """The state after the tokens read so far; `None` before the first."""
        if self._stepper is not None:
            self.state = self._stepper.cache()
        return self._state

    @state.setter
    def state(self, state: ModelState | None) -> None:
        if self._stepper is not None:
            self._release()
        self._state, self._stepper = state, None

    @property
    def is_started(self) -> bool:
        """True once the rows have read a token."""
        return self._state is not None or self._stepper is not None

    def step(self, model: Transformer, tokens: Int[Tensor, ' r']) -> Float[Tensor, 'r l']:
        """Logits after one more token in each row; the next step overwrites them."""
        if self._stepper is None:
            self._stepper, self._state = Stepper.of(model, self._state, cuda_graphs=None), None
            self._release = finalize(self, self._stepper.release)  # the next stepper takes over its CUDA graphs
            self._release.atexit = False
        return self._stepper(tokens)

    def selected(self, entries: Int[Tensor, ' e'], rows: Int[Tensor, ' e']) -> Group:
        """Some of the rows, which may repeat, as `rows` of another batch."""
        state = self.state
        return Group(rows, None if state is None else state.select(entries))

    def split(self, counts: Int[Tensor, ' b']) -> list[Group]:
        """Groups of the rows that have the same of `counts`."""
        own = counts[self.rows]
        distinct = own.unique()
        if len(distinct) == 1:
            return [self]
        parts = [(own == count).nonzero().squeeze(1) for count in distinct]
        return [self.selected(entries, self.rows[entries]) for entries in parts]


class TitansCache(Cache):
    """The states of a batch, of constant size, for `past_key_values` (`cache` in newer versions) of a Titans model.

    A call of the model continues each row where the last call left it, and updates the cache. Tokens cannot be taken
    back, as they have been stored in the weights of the memories. While single tokens are read, the cache holds what
    was computed from the model's parameters: begin a new one after changing these.
    """

    is_compileable = False
    is_croppable = False
    is_linear = [False]  # `generate` then passes only the tokens that the cache has not read

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.groups: list[Group] = []
        self._length = 0

    def read(
        self, x: Int[Tensor, 'b n'] | Float[Tensor, 'b n d'], mask: Bool[Tensor, 'b n'] | None, read: Read
    ) -> list[Tensor]:
        """Results of `read` for all rows, each (b, n, …) with zeros for padding.

        Args:
            mask: false for padding, which is left out; `None` if there is none.
            read: a function from the tokens of some rows, and their state, to results (r, m, …) and the next state.
        """
        if not self.groups:
            self.groups = [Group(torch.arange(len(x), device=x.device))]
        if mask is None and len(self.groups) == 1:
            (group,) = self.groups
            results, group.state = read(x, group.state)
            self._length += x.shape[1]
            return results

        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        self.groups = [part for group in self.groups for part in group.split(mask.sum(dim=1))]
        results = []
        for group in self.groups:
            row, column = mask[group.rows].nonzero(as_tuple=True)
            if len(row):
                tokens = group.rows[row], column
                own, group.state = read(x[tokens].unflatten(0, (len(group.rows), -1)), group.state)
                results = results or [part.new_zeros(*x.shape[:2], *part.shape[2:]) for part in own]
                results = [whole.index_put(tokens, part.flatten(0, 1)) for whole, part in zip(results, own)]
        if not results:
            raise ValueError('attention_mask must leave at least one token, got only padding')
        self._length += x.shape[1]
        return results

    @property
    def can_step(self) -> bool:
        """True once every row has read a token."""
        return bool(self.groups) and all(group.is_started for group in self.groups)

    def step(self, model: Transformer, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        """Logits after one more token in each row, by decoding steps."""
        logits = torch.cat([group.step(model, tokens[group.rows]) for group in self.groups])
        self._length += 1
        return logits[torch.cat([group.rows for group in self.groups]).argsort()]

    # the interface of `transformers.Cache`

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read, padding included."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: there is no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Number of rows; −1 before the first call."""
        return self._num_rows or -1

    @property
    def _num_rows(self) -> int:
        return sum(len(group.rows) for group in self.groups)

    def reorder_cache(self, beam_idx: Int[Tensor, ' b']) -> None:
        """Replace the rows by those with these indices, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(self._num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Int[Tensor, ' e'] | Bool[Tensor, ' b']) -> None:
        """Keep the rows with these indices, in their order."""
        if not self.groups:
            return
        present = torch.arange(self._num_rows, device=self.groups[0].rows.device)
        chosen = present[indices.to(present.device)]
        if torch.equal(chosen, present):  # as often in beam search: the rows go on stepping in their buffers
            return
        groups = []
        for group in self.groups:
            rows, entries = (chosen.unsqueeze(1) == group.rows).nonzero(as_tuple=True)
            if len(rows):
                groups.append(group.selected(entries, rows))
        self.groups = groups

    def reset(self) -> None:
        """Forget all tokens."""
        self.groups, self._length = [], 0

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused, as memories cannot forget single tokens."""
        raise NotImplementedError(
            'TitansCache cannot take tokens back, as they have been stored in the weights of the memories; '
            'copy.deepcopy a cache to return to it later'
        )

    def activate_past_recording(self) -> NoReturn:
        """Refused, as it prepares `crop`."""
        self.crop(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> TitansCache:
        copy = TitansCache()
        copy.groups = [Group(group.rows.clone(), deepcopy(group.state, memo)) for group in self.groups]
        copy._length = self._length
        return copy
