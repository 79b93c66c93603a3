"""Which tokens to sample: checked prompts, limits and stop tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from titans_pytorch.generation.decodable import Decodable
from titans_pytorch.utils.checks import check_integer, check_integers, checked_token_ids, values_are_at_hand
from titans_pytorch.utils.shapes import Int


class Request(NamedTuple):
    """The arguments of `sample` that say which tokens to sample, checked."""

    prompt: Int[Tensor, 'b n']
    lengths: list[int]
    """Length of each row's prompt; the rest of the row is padding."""
    limits: list[int]
    """Length of each row, prompt included, unless a stop token ends it earlier."""
    stops: Int[Tensor, ' s']
    pad_token: int
    pad_input: int
    """What the model reads in place of `pad_token`: that token if the vocabulary has it, otherwise token 0."""

    @classmethod
    def of(
        cls,
        model: Decodable,
        prompt: Any,
        prompt_lengths: Any,
        seq_len: Any,
        max_new_tokens: Any,
        stop_tokens: Any,
        pad_token: Any,
    ) -> Request:
        num_tokens = model.num_tokens
        if num_tokens is None:
            raise ValueError('a model without num_tokens has no logits to sample from')
        prompt = checked_token_ids('prompt', prompt, None)
        lengths = _checked_lengths(prompt_lengths, *prompt.shape)
        if values_are_at_hand(prompt):  # padding may be outside the vocabulary
            unpadded = torch.cat([row[:length] for row, length in zip(prompt, lengths)])
            checked_token_ids('prompt', unpadded.unsqueeze(0), model.num_input_tokens)
        if (seq_len is None) == (max_new_tokens is None):
            raise ValueError('pass either seq_len, the total length, or max_new_tokens')
        if seq_len is not None:
            limits = [check_integer('seq_len', seq_len, 1)] * len(lengths)
        else:
            limits = [length + check_integer('max_new_tokens', max_new_tokens, 0) for length in lengths]
        if max(limits) >= 2**63:  # positions are int64
            name, given = ('max_new_tokens', max_new_tokens) if seq_len is None else ('seq_len', seq_len)
            raise ValueError(f'{name} must give rows of fewer than 2**63 tokens, prompt included, got {given}')
        pad_token = check_integer('pad_token', pad_token)
        return cls(
            prompt=prompt.clone(),  # a copy, because a stream reads it after this check
            lengths=lengths,
            limits=limits,
            stops=torch.tensor(_checked_stops(stop_tokens, num_tokens), dtype=torch.long, device=prompt.device),
            pad_token=pad_token,
            pad_input=pad_token if 0 <= pad_token < num_tokens else 0,
        )

    @property
    def seq_len(self) -> int:
        """Length of the longest row."""
        return max(self.limits)

    @property
    def has_one_limit(self) -> bool:
        """True if all rows end together, unless a stop token ends them earlier."""
        return min(self.limits) == self.seq_len

    @property
    def rows_end_early(self) -> bool:
        """True if a row may end before the longest one."""
        return len(self.stops) > 0 or not self.has_one_limit

    def by_row(self, positions: list[Any], filler: float) -> Tensor:
        """Results of all positions by row, padded on the right. A row omits its own prompt beyond the shortest."""
        if not positions:
            return torch.full((len(self.prompt), 0), filler, device=self.prompt.device)
        rows = torch.stack(positions, dim=1)
        if min(self.lengths) == max(self.lengths):
            return rows
        moved = []
        for row, length in zip(rows, self.lengths):
            own = row[length - min(self.lengths) :]
            moved.append(torch.cat((own, own.new_full((len(row) - len(own),), filler))))
        longest = max(limit - length for limit, length in zip(self.limits, self.lengths))
        return torch.stack(moved)[:, : max(0, longest)]


def _checked_lengths(lengths: Any, batch: int, longest: int) -> list[int]:
    """Length of each prompt; `longest` for all of them if `lengths` is `None`."""
    if lengths is None:
        return [longest] * batch
    wanted = f'prompt_lengths must be {batch} integers from 1 to {longest}'
    try:
        checked = check_integers('prompt_lengths', lengths)
    except TypeError as cause:
        raise ValueError(f'{wanted}: {cause}') from cause
    if len(checked) != batch or not all(1 <= length <= longest for length in checked):
        raise ValueError(f'{wanted}, got {checked}')
    return checked


def _checked_stops(stop_tokens: Any, num_tokens: int) -> list[int]:
    is_single = isinstance(stop_tokens, (Tensor, np.ndarray)) and stop_tokens.ndim == 0
    if is_single or isinstance(stop_tokens, (int, np.integer)):
        stops = [check_integer('stop_tokens', stop_tokens)]
    else:
        stops = check_integers('stop_tokens', stop_tokens)
    if not all(0 <= stop < num_tokens for stop in stops):
        raise ValueError(f'stop_tokens must be in [0, num_tokens={num_tokens}), got {stops}')
    return stops
