"""Several documents in each row of a batch, as memories and attention read them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from titans_pytorch.utils.checks import check_shape, described
from titans_pytorch.utils.shapes import Bool, Int


class PackedDocuments(NamedTuple):
    """Documents in the rows of a batch, one after another, each followed by padding.

    Each begins where a memory batch of the model could begin. The padding hides it from the convolutions and queries of
    the next document.
    """

    real: Bool[Tensor, 'b n']
    """True for tokens, false for padding."""
    ids: Int[Tensor, 'b n']
    """Index of the document in its row; padding has the index of the document before it."""
    positions: Int[Tensor, 'b n']
    """Index of the token in its document."""
    resets: Bool[Tensor, 'b c']
    """True for chunks after which another document begins."""


def check_documents(documents: Any, batch: int, length: int, chunk_size: int | None = None) -> None:
    """Check documents against a batch of this shape and, with `chunk_size`, their chunks too."""
    if not isinstance(documents, PackedDocuments):
        raise TypeError(f'documents must be PackedDocuments, got {described(documents)}')
    for name in ('real', 'ids', 'positions'):
        check_shape(f'documents.{name}', getattr(documents, name), batch=batch, length=length)
    if chunk_size is not None:
        check_shape('documents.resets', documents.resets, batch=batch, chunks=length // chunk_size)
