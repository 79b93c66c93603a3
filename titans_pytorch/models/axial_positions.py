"""Axial position embeddings: one MLP for the memory chunk, and one for the offset within it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from axial_positional_embedding import ContinuousAxialPositionalEmbedding
from torch import Tensor

from titans_pytorch.utils.checks import check_floating, check_shape, described
from titans_pytorch.utils.functional import call_with_weights, constant
from titans_pytorch.utils.parameters import first_weight
from titans_pytorch.utils.precision import no_autocast
from titans_pytorch.utils.shapes import Float, Int, divided


class AxialTables(NamedTuple):
    """Position embeddings for decoding steps."""

    inner: Float[Tensor, 'n d']
    """For each offset in a chunk, the part that all chunks share."""
    of_chunk: Float[Tensor, 'n d']
    """The positions of the open chunk."""


class AxialPositions(ContinuousAxialPositionalEmbedding):
    """A position embedding of two MLPs, without the buffer from which its base class reads its device."""

    def __init__(self, dim: int, num_chunks: int | None = None):
        super().__init__(dim=dim, num_axial_dims=2)
        self.dim, self.num_chunks = dim, num_chunks
        del self.dummy

    # the base class reads these from `parameters()`, which is empty in a replica of `torch.nn.parallel.replicate`

    @property
    def device(self) -> torch.device:
        weight = first_weight(self.mlps[0][0])
        return torch.device('cpu') if weight is None else weight.device

    @property
    def dtype(self) -> torch.dtype:
        weight = first_weight(self.mlps[0][0])
        return torch.float32 if weight is None else weight.dtype  # float32 is what a quantised linear layer takes

    def forward(
        self, axial_dims: Sequence[int], return_factorized: bool = False, flatten: bool = False
    ) -> Float[Tensor, '... d'] | list[Float[Tensor, '_n d']]:
        """Embeddings of a number of chunks and a number of offsets in a chunk: their sums (chunks, offsets, d), or,
        with `flatten`, (chunks · offsets, d). With `return_factorized`, those of each axis, to be passed to a model."""
        embeddings = [self.axis(axis, torch.arange(n, device=self.device)) for axis, n in enumerate(axial_dims)]
        return embeddings if return_factorized else self.combine_factorized(embeddings, flatten=flatten)

    def axis(self, axis: int, indices: Int[Tensor, ' n']) -> Float[Tensor, 'n d']:
        """Embeddings of indices along one axis: 0 for chunks, 1 for offsets in a chunk. Chunks beyond `num_chunks`
        share the embedding of the last one."""
        if axis == 0 and self.num_chunks is not None:
            indices = indices.clamp(max=self.num_chunks - 1)
        # in half precision, integers above 256 would not be exact
        with no_autocast(indices):
            if self.dtype.itemsize > 2:
                return self.mlps[axis](indices.to(self.dtype).unsqueeze(1))
            weights = {name: p.float() for name, p in self.mlps[axis].named_parameters()}
            return call_with_weights(self.mlps[axis], weights, indices.float().unsqueeze(1)).to(self.dtype)

    def span(self, start: int, length: int, chunk: int, factorized: Any, device: torch.device) -> Float[Tensor, 'n d']:
        """Embeddings of `length` positions, beginning at `start`, in chunks of `chunk` positions.

        `factorized`: the embeddings of both axes if they are already computed, otherwise `None`.
        """
        first, offset = start // chunk, constant(start % chunk)
        full, in_last = divided(length, chunk, offset)
        number = full + int(in_last > 0)
        if factorized is None:
            outer = self.axis(0, torch.arange(number, device=device) + first)
            inner = self.axis(1, torch.arange(chunk, device=device))
        else:
            self._check_factorized(factorized, start + length, chunk)
            outer, inner = factorized[0][first : first + number], factorized[1]
        return (outer.unsqueeze(1) + inner).flatten(0, 1)[offset : offset + length]

    def _check_factorized(self, factorized: Any, stop: int, chunk: int) -> None:
        if not isinstance(factorized, (tuple, list)) or len(factorized) != 2:
            raise TypeError(f'factorized_pos_emb must be a pair of tensors, got {described(factorized)}')
        for axis, embeddings in enumerate(factorized):
            check_floating(f'factorized_pos_emb[{axis}]', embeddings)
            check_shape(f'factorized_pos_emb[{axis}]', embeddings, positions=None, dim=self.dim)
        outer, inner = (len(embeddings) for embeddings in factorized)
        if inner != chunk or outer * inner < stop:
            raise ValueError(
                f'factorized_pos_emb must hold {-(-stop // chunk)} or more memory chunks of {chunk} positions, '
                f'got {outer} of {inner}'
            )
