"""`TitansCache`, the states of a batch between calls, in the form of Hugging Face's caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NoReturn
from weakref import finalize

import torch
from torch import Tensor
from transformers import Cache

from titans_pytorch.generation.stepper import CallStepper, Stepper
from titans_pytorch.hf.row_groups import GroupedRows, RowGroup, rank_of_last_token, rearranged, split_by_count
from titans_pytorch.models.base import Transformer
from titans_pytorch.models.state import ModelState
from titans_pytorch.utils.checks import check_leaves_tokens
from titans_pytorch.utils.shapes import Bool, Float, Int

Read = Callable[[Tensor, ModelState | None], tuple[list[Tensor], ModelState | None]]


class Group(RowGroup[ModelState]):
    """Rows of a batch and their state, which is kept in buffers while they read single tokens."""

    _release: finalize

    def __init__(self, rows: Sequence[int], state: ModelState | None = None, num_tokens: int = 0):
        super().__init__(rows, state, num_tokens)
        self._stepper: Stepper | CallStepper | None = None
        self.last: Tensor | None = None
        """Hidden states of the last token (r, 1, d), as `TitansCache.read` returns them; `None` after a step."""
        self.last_logits: Tensor | None = None
        """Logits of the last token (r, 1, l) after a step; else `None`."""

    @property
    def state(self) -> ModelState | None:
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

    def read(self, x: Int[Tensor, 'r m'] | Float[Tensor, 'r m d'], read: Read) -> list[Tensor]:
        """Results of `read` for the next tokens of the rows."""
        results, self.state = read(x, self.state)
        self.last, self.last_logits = results[-1][:, -1:].clone(), None
        self.num_tokens += x.shape[1]
        return results

    def step(self, model: Transformer, tokens: Int[Tensor, ' r']) -> Float[Tensor, 'r l']:
        """Read one more token in each row and return logits."""
        if self._stepper is None:
            self._stepper, self._state = Stepper.of(model, self._state, cuda_graphs=None), None
            self._release = finalize(self, self._stepper.release)  # the next stepper takes over its CUDA graphs
            self._release.atexit = False
        logits = self._stepper(tokens).clone()  # the next step overwrites them
        self.last, self.last_logits = None, logits.unsqueeze(1)
        self.num_tokens += 1
        return logits

    def select(self, entries: list[int], rows: Sequence[int]) -> Group:
        group = super().select(entries, rows)
        group.last = None if self.last is None else self.last[entries]
        group.last_logits = None if self.last_logits is None else self.last_logits[entries]
        return group


class TitansCache(GroupedRows[Group], Cache):
    """The states of a batch, of constant size, as `past_key_values` (`cache` in newer versions) of a Titans model.

    A call of the model continues each row where the last call left it, and updates the cache. Tokens cannot be taken
    back, because they have been stored in the weights of the memories. While single tokens are read, the cache holds
    values computed from the model's parameters, so begin a new one after changing these.
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
        """Results of `read` for all rows, each (b, n, …).

        In the last column, padding has the results of the last token before it, because `generate` takes the next token
        from that column.

        Args:
            mask: false for padding, which is skipped; `None` if there is none.
            read: a function that maps the tokens of some rows, and their state, to results (r, m, …) and the next
                state.
        """
        if not self.groups:
            self.groups = [Group(range(len(x)))]
        if mask is None and len(self.groups) == 1:
            results = self.groups[0].read(x, read)
        else:
            results = self._read_apart(x, mask, read)
        self._length += x.shape[1]
        return results

    def _read_apart(self, x: Tensor, mask: Bool[Tensor, 'b n'] | None, read: Read) -> list[Tensor]:
        """`read` for rows that have read, or will now read, different numbers of tokens."""
        if mask is not None:
            check_leaves_tokens('attention_mask', mask)
        counts = [x.shape[1]] * len(x) if mask is None else mask.sum(dim=1).tolist()
        self.groups = split_by_count(self.groups, counts)
        results: list[Tensor] = []
        for group in self.groups:
            if count := counts[group.rows[0]]:
                rows, columns = group.positions(count, mask, x.device)
                own = group.read(x[rows, columns], read)
                rows = rows.squeeze(1)
                if mask is not None:
                    own = [rearranged(part, rank_of_last_token(mask[rows])) for part in own]
                results = results or [part.new_zeros(*x.shape[:2], *part.shape[2:]) for part in own]
                results = [whole.index_put((rows,), part) for whole, part in zip(results, own)]
        for group in self.groups:
            if not counts[group.rows[0]] and group.last is not None:
                rows, _ = group.positions(1, None, x.device)
                results[-1] = results[-1].index_put((rows.squeeze(1),), group.last)
        return results

    def with_logits_of_steps(
        self, logits: Float[Tensor, 'b k l'], columns: Int[Tensor, ' k'], length: int
    ) -> Float[Tensor, 'b k l']:
        """Logits of these columns of a call of `read`. In the last column, rows that had no token to read after a step
        get the logits of that step, because their hidden states are unknown."""
        last = (columns == length - 1).nonzero().squeeze(1)
        for group in self.groups:
            if group.last_logits is not None:
                rows, _ = group.positions(1, None, logits.device)
                logits = logits.index_put((rows, last), group.last_logits.to(logits.dtype))
        return logits

    @property
    def can_step(self) -> bool:
        """True once every row has read a token."""
        return bool(self.groups) and all(group.is_started for group in self.groups)

    def step(self, model: Transformer, tokens: Int[Tensor, ' b']) -> Float[Tensor, 'b l']:
        """Read one more token in each row by decoding steps, and return logits."""
        self._length += 1
        if len(self.groups) == 1:
            return self.groups[0].step(model, tokens).clone()  # a copy, because callers may change it
        every = []
        for group in self.groups:
            rows, _ = group.positions(1, None, tokens.device)
            every.append((rows.squeeze(1), group.step(model, tokens[rows.squeeze(1)])))
        rows, logits = (torch.cat(parts) for parts in zip(*every))
        return logits[rows.argsort()]

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
        return self.num_rows or -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.groups, self._length = [], 0

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused, because memories cannot forget single tokens."""
        raise NotImplementedError(
            'TitansCache cannot take tokens back, as they have been stored in the weights of the memories; '
            'copy.deepcopy a cache to return to it later'
        )

    def activate_past_recording(self) -> NoReturn:
        """Refused, because it prepares for `crop`."""
        self.crop(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> TitansCache:
        copy = TitansCache()
        for group in self.groups:
            copy.groups.append(Group(group.rows, deepcopy(group.state, memo), group.num_tokens))
            # nothing writes to these
            copy.groups[-1].last, copy.groups[-1].last_logits = group.last, group.last_logits
        copy._length = self._length
        return copy
