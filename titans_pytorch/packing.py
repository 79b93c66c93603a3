"""Batches in which not every row is one sequence: padded rows, and rows that hold several documents.

Causal models need no mask for this. Each document is put into a row of its own, padding on its right where no token
before it can see it; so a document is read exactly as if it were alone, whatever the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.checks import check_shape, check_tensor
from titans_pytorch.shapes import Bool, Float, Int


class Documents(NamedTuple):
    """Where the tokens of each document stand in a batch."""

    shape: tuple[int, int]
    """(batch, length) of the batch."""
    places: Int[Tensor, 'r m']
    """For each document its tokens' places in the batch, flattened; 0 beyond its end."""
    real: Bool[Tensor, 'r m']
    """Which are no padding."""

    @classmethod
    def of(cls, mask: Bool[Tensor, 'b n'] | None, document_ids: Int[Tensor, 'b n'] | None) -> Documents:
        """`mask` is true for tokens and false for padding, wherever it is; a new document starts where the id changes.

        The lengths are read from the device, which waits for it.
        """
        given = mask if mask is not None else document_ids
        assert given is not None
        mask = torch.ones_like(given, dtype=torch.bool) if mask is None else mask
        ids = torch.zeros_like(mask, dtype=torch.long) if document_ids is None else document_ids

        places = mask.flatten().nonzero().squeeze(1)
        row, document = places // mask.shape[1], ids.flatten()[places]
        begins = torch.ones_like(places, dtype=torch.bool)
        begins[1:] = (row[1:] != row[:-1]) | (document[1:] != document[:-1])
        number = begins.cumsum(0) - 1
        starts = begins.nonzero().squeeze(1)
        offset = torch.arange(len(places), device=places.device) - starts[number]

        longest = int(offset.max()) + 1 if len(places) else 0
        index = places.new_zeros(len(starts), longest)
        index[number, offset] = places
        real = torch.zeros_like(index, dtype=torch.bool)
        real[number, offset] = True
        return cls((mask.shape[0], mask.shape[1]), index, real)

    def rows(self, x: Float[Tensor, 'b n ...'] | Int[Tensor, 'b n']) -> Float[Tensor, 'r m ...'] | Int[Tensor, 'r m']:
        """A row for each document, padded with zeros on the right."""
        rows = x.flatten(0, 1)[self.places]
        return torch.where(_beside(self.real, rows), rows, torch.zeros_like(rows))

    def batch(self, rows: Float[Tensor, 'r m ...']) -> Float[Tensor, 'b n ...']:
        """The opposite; zeros where there is padding."""
        flat = rows.new_zeros(self.shape[0] * self.shape[1], *rows.shape[2:])
        return flat.index_put((self.places[self.real],), rows[self.real]).unflatten(0, self.shape)


def check_documents(
    mask: Bool[Tensor, 'b n'] | None, document_ids: Int[Tensor, 'b n'] | None, batch: int, length: int
) -> None:
    if mask is not None:
        check_tensor('mask', mask)
        if mask.dtype != torch.bool:
            raise TypeError(f'mask must be a boolean tensor, got {mask.dtype}')
        check_shape('mask', mask, batch=batch, length=length)
        if not mask.any():
            raise ValueError('mask must leave at least one token, and it is all padding')
    if document_ids is not None:
        check_tensor('document_ids', document_ids)
        if document_ids.is_floating_point() or document_ids.dtype == torch.bool:
            raise TypeError(f'document_ids must hold integers, got {document_ids.dtype}')
        check_shape('document_ids', document_ids, batch=batch, length=length)


def continues(mask: Bool[Tensor, 'b n'] | None, document_ids: Int[Tensor, 'b n'] | None) -> Bool[Tensor, 'b n-1']:
    """Whether each token but the first goes on with the document of the token before it."""
    assert mask is not None or document_ids is not None
    same = None if document_ids is None else document_ids[:, 1:] == document_ids[:, :-1]
    both = None if mask is None else mask[:, 1:] & mask[:, :-1]
    parts = [part for part in (same, both) if part is not None]
    return parts[0] if len(parts) == 1 else parts[0] & parts[1]


def _beside(real: Bool[Tensor, 'r m'], like: Tensor) -> Tensor:
    return real.reshape(*real.shape, *(1,) * (like.ndim - 2))
