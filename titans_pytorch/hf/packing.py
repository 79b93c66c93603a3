"""Rows that hold several documents, as Hugging Face's data collators describe them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.hf.row_groups import padding_last, rank_of_last_token, rearranged
from titans_pytorch.utils.checks import check_integral, check_shape
from titans_pytorch.utils.shapes import Bool, Int


def packed_documents(
    mask: Bool[Tensor, 'b n'] | None,
    shape: tuple[int, int],
    position_ids: Int[Tensor, 'b n'] | None,
    bounds: Mapping[str, Int[Tensor, ' k'] | None],
    document_ids: Mapping[str, Int[Tensor, 'b n'] | None],
) -> Int[Tensor, 'b n'] | None:
    """The number of each token's document in its row, or `None` if every row is one document.

    Args:
        mask: false for padding, which belongs to the document before it and is not counted; `None` if there is none.
        shape: (batch, length) of the input.
        position_ids: positions of the tokens in their documents.
        bounds: by the name of the argument, where each document of the only row begins, and where the last one ends.
        document_ids: by the name of the argument, integers that change where a document begins.

    Raises:
        ValueError, TypeError: if these are of other kinds or shapes, and if `position_ids` do not count the tokens of
            each document from 0.
    """
    ids = [_ids_of_bounds(name, given, *shape) for name, given in bounds.items() if given is not None]
    for name, given in document_ids.items():
        if given is not None:
            check_integral(name, given)
            check_shape(name, given, batch=shape[0], length=shape[1])
            ids.append(given)
    if position_ids is not None:
        check_integral('position_ids', position_ids)
        batch = 1 if position_ids.shape[:1] == (1,) else shape[0]
        check_shape('position_ids', position_ids, batch=batch, length=shape[1])
        position_ids = position_ids.expand(shape)
    elif not ids:
        return None
    device = ids[0].device if position_ids is None else position_ids.device
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    order, columns = padding_last(mask), torch.arange(shape[1], device=device)
    real, begins = rearranged(mask, order), (columns == 0).expand(shape)
    for given in ids:
        given = rearranged(given, order)
        begins = begins | F.pad(given[:, 1:] != given[:, :-1], (1, 0))
    if position_ids is not None:
        positions = rearranged(position_ids, order)
        begins = begins if ids else positions == 0
        expected = columns - torch.where(begins, columns, 0).cummax(dim=1).values
        if wrong := ((positions != expected) & real).any(dim=1).nonzero().tolist():
            raise ValueError(
                'position_ids must count the tokens of each document from 0, without padding, as the model itself '
                f'does, got others in row {wrong[0][0]}'
            )
    begins = begins & real
    return rearranged(begins.cumsum(dim=1), rank_of_last_token(mask)) if begins[:, 1:].any() else None


def _ids_of_bounds(name: str, bounds: Any, batch: int, length: int) -> Int[Tensor, '1 n']:
    check_integral(name, bounds)
    check_shape(name, bounds, bounds=None)
    bounds = bounds.long()
    lengths = bounds.diff()
    if batch != 1 or bounds[0] != 0 or bounds[-1] != length or (lengths < 0).any():
        raise ValueError(
            f'{name} must increase from 0 to the {length} tokens of a batch of one row, got {bounds.tolist()} '
            f'and {batch} rows'
        )
    return torch.arange(len(lengths), device=bounds.device).repeat_interleave(lengths).unsqueeze(0)
