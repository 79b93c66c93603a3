"""Batches with rows that are padded or hold several documents.

Causal models need no mask for this. Each document moves to a row of its own, with padding on its right, where no token
sees it, so any model reads a document exactly as if it were alone. Models that can begin anew within a row keep the
documents in their rows and read all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.memory.packing import PackedDocuments
from titans_pytorch.utils.checks import (
    check_integer,
    check_integers,
    check_integral,
    check_leaves_tokens,
    check_shape,
    check_tensor,
    checked_mask,
    is_integral,
)
from titans_pytorch.utils.shapes import Bool, Float, Int

IGNORED = -100
"""Label of positions that cross-entropy ignores."""

_TOKENS_OF_CALL = {'cpu': 512, 'cuda': 65_536}
"""Number of tokens that take about as long as the launches of one more forward and backward pass of a model."""


class Documents(NamedTuple):
    """The locations of the documents in a batch."""

    shape: tuple[int, int]
    """(batch, length) of the batch."""
    indices: Int[Tensor, ' t']
    """Indices of all tokens in the flattened batch, without padding."""
    first: Int[Tensor, ' r']
    """For each document, the index of its first token among these."""
    lengths: list[int]

    @classmethod
    def of(
        cls,
        mask: Bool[Tensor, 'b n'] | None,
        document_ids: Int[Tensor, 'b n'] | None,
        shape: tuple[int, int],
        device: torch.device,
    ) -> Documents:
        """Locate the documents: each ends where `document_ids` change, where `mask` is false, or with its row. Reading
        the lengths synchronises with the device."""
        real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
        ids = torch.zeros(shape, dtype=torch.long, device=device) if document_ids is None else document_ids

        indices = real.flatten().nonzero().squeeze(1)
        row, document = indices // shape[1], ids.flatten()[indices]
        begins = torch.ones_like(indices, dtype=torch.bool)
        follows = (indices[1:] == indices[:-1] + 1) & (row[1:] == row[:-1]) & (document[1:] == document[:-1])
        begins[1:] = ~follows
        first = begins.nonzero().squeeze(1)
        lengths = torch.diff(first, append=first.new_tensor([len(indices)])).tolist()
        return cls(shape, indices, first, lengths)

    def groups(self) -> list[DocumentGroup]:
        """All documents, grouped by length so that reading all groups takes little time and padding at most doubles the
        number of tokens."""
        tokens_of_call = _TOKENS_OF_CALL.get(self.indices.device.type, _TOKENS_OF_CALL['cpu'])
        return [self._group(own) for own in group_by_length(self.lengths, tokens_of_call)]

    def _group(self, own: list[int]) -> DocumentGroup:
        lengths, device = [self.lengths[number] for number in own], self.indices.device
        offsets = torch.arange(max(lengths), device=device)
        real = offsets < torch.tensor(lengths, device=device).unsqueeze(1)
        indices = self.indices[(self.first[own].unsqueeze(1) + offsets).clamp(max=len(self.indices) - 1)]
        return DocumentGroup(self.shape, torch.where(real, indices, 0), real)

    def packed(self, chunk_size: int, alignment: int, gap: int) -> PackedRows | None:
        """All documents in the rows they came in; `None` if padding would more than double the number of tokens.

        Args:
            chunk_size: chunk size of the memories.
            alignment: each document starts after a multiple of this many tokens.
            gap: minimum number of tokens of padding after each document.
        """
        rows = (self.indices[self.first] // self.shape[1]).tolist()
        taken = [-(-(length + gap) // alignment) * alignment for length in self.lengths]
        ends, starts = [0] * self.shape[0], []
        for row, length in zip(rows, taken):
            starts.append(ends[row])
            ends[row] += length
        batch, length = self.shape[0], max(ends)
        if batch * length > 2 * len(self.indices):
            return None

        # places are indices in the flattened rows
        first_places = self.indices.new_tensor(starts) + self.indices.new_tensor(rows) * length
        device = first_places.device
        document = torch.arange(len(rows), device=device).repeat_interleave(
            self.indices.new_tensor(self.lengths), output_size=len(self.indices)
        )
        position = torch.arange(len(self.indices), device=device) - self.first[document]
        places = first_places[document] + position
        last_chunks = (first_places + first_places.new_tensor(taken)) // chunk_size - 1
        zeros = first_places.new_zeros(batch * length)
        documents = PackedDocuments(
            real=zeros.index_fill(0, places, 1).view(batch, length) > 0,
            ids=zeros.index_fill(0, first_places, 1).view(batch, length).cumsum(dim=1),
            positions=zeros.index_copy(0, places, position).view(batch, length),
            resets=zeros[: batch * length // chunk_size].index_fill(0, last_chunks, 1).view(batch, -1) > 0,
        )
        return PackedRows(self.shape, self.indices, places, documents)


class PackedRows(NamedTuple):
    """All documents of a batch, packed into rows that hold several."""

    shape: tuple[int, int]
    """(batch, length) of the batch."""
    indices: Int[Tensor, ' t']
    """Indices of all tokens in the flattened batch."""
    places: Int[Tensor, ' t']
    """Indices of the same tokens in the flattened rows."""
    documents: PackedDocuments

    def rows(self, x: Float[Tensor, 'b n ...'] | Int[Tensor, 'b n']) -> Float[Tensor, 'b m ...'] | Int[Tensor, 'b m']:
        """The rows, with zeros for padding."""
        return _moved(x, self.indices, self.places, self.documents.real.shape)

    def batch(self, rows: Float[Tensor, 'b m ...']) -> Float[Tensor, 'b n ...']:
        """Inverse of `rows`."""
        return _moved(rows, self.places, self.indices, self.shape)


def _moved(x: Tensor, of: Int[Tensor, ' t'], to: Int[Tensor, ' t'], shape: Sequence[int]) -> Tensor:
    """Move rows of a flattened batch to other places in a batch of this shape, with zeros elsewhere."""
    out = x.new_zeros(math.prod(shape), *x.shape[2:])
    return out.index_copy(0, to, x.flatten(0, 1).index_select(0, of)).unflatten(0, tuple(shape))


class DocumentGroup(NamedTuple):
    """Documents in a group, each in a row of its own."""

    shape: tuple[int, int]
    """(batch, length) of the batch."""
    indices: Int[Tensor, 'r m']
    """Indices of each document's tokens in the flattened batch; 0 beyond its end."""
    real: Bool[Tensor, 'r m']
    """True for tokens, false for padding."""

    def rows(self, x: Float[Tensor, 'b n ...'] | Int[Tensor, 'b n']) -> Float[Tensor, 'r m ...'] | Int[Tensor, 'r m']:
        """One row per document, padded with zeros on the right."""
        rows = x.flatten(0, 1)[self.indices]
        real = self.real.reshape(*self.real.shape, *(1,) * (rows.ndim - 2))
        return torch.where(real, rows, torch.zeros_like(rows))

    @staticmethod
    def batch(groups: list[DocumentGroup], rows: list[Float[Tensor, 'r m ...']]) -> Float[Tensor, 'b n ...']:
        """Inverse of the `rows` of all groups, with zeros for padding."""
        shape = groups[0].shape
        flat = rows[0].new_zeros(shape[0] * shape[1], *rows[0].shape[2:])
        indices = torch.cat([group.indices[group.real] for group in groups])
        real = torch.cat([own[group.real] for group, own in zip(groups, rows)])
        return flat.index_put((indices,), real).unflatten(0, shape)


def group_by_length(lengths: list[int], tokens_of_call: int) -> list[list[int]]:
    """Indices of the documents of each group. A group costs its padded tokens plus `tokens_of_call`."""
    by_size: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        # lengths in steps of √2 are few enough to try all ways of joining neighbours
        by_size.setdefault(math.ceil(2 * math.log2(length)), []).append(number)
    sizes = [own for _, own in sorted(by_size.items())]
    longest = [max(lengths[number] for number in own) for own in sizes]
    rows = [0, *accumulate(len(own) for own in sizes)]

    # for the first `end` sizes in so many groups: the fewest padded tokens, and where the last group then starts
    best = {(0, 0): (0, 0)}
    for count in range(1, len(sizes) + 1):
        for end in range(count, len(sizes) + 1):
            best[count, end] = min(
                (best[count - 1, start][0] + (rows[end] - rows[start]) * longest[end - 1], start)
                for start in range(count - 1, end)
                if (count - 1, start) in best
            )
    padded = {count: tokens for (count, end), (tokens, _) in best.items() if end == len(sizes)}
    fitting = [count for count, tokens in padded.items() if tokens <= 2 * sum(lengths)]
    chosen = min(fitting, key=lambda count: padded[count] + count * tokens_of_call)
    groups, end = [], len(sizes)
    for count in range(chosen, 0, -1):
        start = best[count, end][1]
        groups.append(sum(sizes[start:end], []))
        end = start
    return groups


def checked_documents(
    mask: Any, document_ids: Any, batch: int, length: int
) -> tuple[Bool[Tensor, 'b n'] | None, Int[Tensor, 'b n'] | None]:
    """`mask` as booleans, and `document_ids`, both checked against a batch of this size."""
    if mask is not None:
        mask = checked_mask('mask', mask, batch, length)
        check_leaves_tokens('mask', mask)
    if document_ids is not None:
        check_integral('document_ids', document_ids)
        check_shape('document_ids', document_ids, batch=batch, length=length)
    return mask, document_ids


def continues(mask: Bool[Tensor, 'b n'] | None, document_ids: Int[Tensor, 'b n'] | None) -> Bool[Tensor, 'b n-1']:
    """True for each token, from the second on, that belongs to the same document as the token before it."""
    same = None if document_ids is None else document_ids[:, 1:] == document_ids[:, :-1]
    if mask is None:
        assert same is not None
        return same
    both = mask[:, 1:] & mask[:, :-1]
    return both if same is None else both & same


def pad_to_bucket(
    x: Int[Tensor, 'b n'] | Float[Tensor, 'b n d'],
    buckets: int | Sequence[int],
    labels: Int[Tensor, 'b n'] | None = None,
) -> tuple[Int[Tensor, 'b m'] | Float[Tensor, 'b m d'], Int[Tensor, 'b m']]:
    """Pad a batch on the right to one of a few lengths, so that `torch.compile` compiles a step once per length.

    On the result, `model(x, labels=labels)` has the same loss and gradients as on the batch before padding: models are
    causal, so no token sees the padding, and the labels of padding are ignored. Do not request a state from that call,
    because it would include the padding. Call this function outside the compiled region.

    Args:
        x: token ids (batch, length), or embeddings (batch, length, dim), which need `labels`.
        buckets: lengths, from which the shortest that fits is chosen; or an integer, to choose its next multiple.
        labels: the token at each position, as in a model's call; −100 ignores a position. Default: `x`.

    Returns:
        `x`, padded with zeros, and its labels, padded with −100.
    """
    check_tensor('x', x)
    if labels is None:
        if not is_integral(x):
            raise ValueError(f'labels must be given where x holds no token ids, got x of {x.dtype}')
        labels = x
    check_shape('x', x[..., 0] if x.is_floating_point() and x.ndim == 3 else x, batch=None, length=None)
    check_tensor('labels', labels)
    check_shape('labels', labels, batch=x.shape[0], length=x.shape[1])
    length = x.shape[1]
    if not isinstance(buckets, Integral):
        lengths = check_integers('buckets', buckets)
        fitting = [size for size in lengths if size >= length]
        if not fitting:
            raise ValueError(f'buckets must hold a length of at least that of x, {length}, got {lengths}')
        missing = min(fitting) - length
    else:
        missing = -length % check_integer('buckets', buckets, 1)
    sides = (0, 0, 0, missing) if x.ndim == 3 else (0, missing)
    return F.pad(x, sides), F.pad(labels.long(), (0, missing), value=IGNORED)
