"""The choice of an operation that stores several whole memory batches, instead of storing them one after another.

| memory MLP | operation | rows of a block |
| --- | --- | --- |
| one matrix without a norm, short memory batches | `FusedMLP.store_linear` | so few that solving them together pays |
| at most two matrices, no proximal steps | `FusedMLP.store_batches` | those of a memory batch, or more, on chip |
| others that `deep_memory_scan` has a kernel for | `FusedMLP.store_deep` | as many as the kernel takes |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from titans_pytorch.memory.backends.base import PreparedBlock, Stored, StoreInputs
from titans_pytorch.memory.backends.fused_mlp import FusedMLP
from titans_pytorch.memory.chunks import Chunks, WeightResidual, split_inputs
from titans_pytorch.memory.fast_weights import MemoryWeights
from titans_pytorch.memory.schedule import ChunkBlock
from titans_pytorch.ops.deep_memory_scan import MOST_ROWS as MOST_ROWS_OF_DEEP
from titans_pytorch.ops.deep_memory_scan import has_kernel as has_deep_kernel
from titans_pytorch.ops.linear_memory_scan import MOST_ROWS as MOST_ROWS_OF_LINEAR
from titans_pytorch.ops.memory_batch_scan import fits_on_chip
from titans_pytorch.utils.functional import replaced

ROWS_ON_CHIP = 64
"""Most rows in a block of memory batches, if states stay on chip between memory batches (measured)."""
ROWS_OF_FORMED = 128
"""Most rows in a memory batch for which, on a GPU, one operation for all memory batches outweighs having factors that
are larger than the matrix (measured)."""


class WholeBatches(NamedTuple):
    """An operation for a call's whole memory batches, each with its gradients at the weights before it."""

    store: Callable[[StoreInputs, int], Stored]
    """Store the memory batches of its inputs in this number of blocks."""
    most_rows: int
    """Most rows in a block. States are kept once per block; within it, weights are factored."""
    inputs: StoreInputs

    @classmethod
    def of(
        cls, fused: FusedMLP | None, inputs: StoreInputs, is_clamped: bool, forms_matrices: bool
    ) -> WholeBatches | None:
        """Choose the operation for these inputs; `None` if memory batches are to be stored one after another.

        Args:
            is_clamped: whether the norms of gradients are bounded.
            forms_matrices: whether a matrix would be formed for every chunk if they were stored one after another.
        """
        chunks, per_batch = inputs.chunks, inputs.schedule.chunks_per_batch
        if fused is None or per_batch is None or is_clamped or inputs.transition.share is not None:
            return None
        matrices, gamma = fused.mlp.of_weights(inputs.weights.newest)
        rows, is_proximal = per_batch * chunks.keys.shape[2], fused.num_proximal_steps is not None

        if len(matrices) == 1 and gamma is None:
            most_in_batch, most_in_block = _rows_solved_together(chunks)
            # modulation scales a proximal step but not its curvature
            if rows <= most_in_batch and not (is_proximal and chunks.modulation is not None):
                return cls(fused.store_linear, most_in_block, inputs)
        if inputs.residual is not None or chunks.modulation is not None:
            return None
        if forms_matrices and not (chunks.keys.is_cuda and rows <= ROWS_OF_FORMED):
            return None
        num_states = _num_states(inputs)
        # this one is faster where both could serve
        if len(matrices) <= 2 and not is_proximal:
            # if states stay on chip, writing them out costs more than applying longer factors
            on_chip = chunks.keys.is_cuda and fits_on_chip(matrices, num_states, rows)
            return cls(fused.store_batches, ROWS_ON_CHIP if on_chip else rows, inputs)
        if has_deep_kernel(matrices, num_states, rows):
            return cls(fused.store_deep, MOST_ROWS_OF_DEEP, inputs)
        return None

    def prepare(
        self, batches: list[ChunkBlock], chunks: Chunks, residual: WeightResidual | None
    ) -> Iterator[PreparedBlock]:
        """Memory batches of one length, in blocks of as many as `most_rows` allows, but at least one."""
        per_batch = batches[0].num_chunks
        together = max(1, self.most_rows // (per_batch * chunks.keys.shape[2]))
        whole, rest = len(batches) // together, len(batches) % together  # the compiler has no symbolic `divmod`
        counts = [(blocks, length) for blocks, length in ((whole, together), (1, rest)) if blocks * length]
        lengths = [blocks * length * per_batch for blocks, length in counts]
        for (blocks, _), own in zip(counts, split_inputs(chunks, residual, lengths)):
            yield PreparedBlock(partial(self._store, *own, blocks), ends_batch=True)

    def _store(self, chunks: Chunks, residual: WeightResidual | None, blocks: int, weights: MemoryWeights) -> Stored:
        return self.store(replaced(self.inputs, chunks=chunks, residual=residual, weights=weights), blocks)


def _rows_solved_together(chunks: Chunks) -> tuple[int, int]:
    """Most rows of a memory batch, and of a block, for a linear memory that is solved."""
    # measured on a CPU: longer blocks need fewer launches, but their work grows with the square of the rows
    return (16, 32) if chunks.keys.device.type == 'cpu' else (MOST_ROWS_OF_LINEAR, MOST_ROWS_OF_LINEAR)


def _num_states(inputs: StoreInputs) -> int:
    """Number of states of each parameter: weights, momentum of each order, and the weights to begin anew with."""
    logits = inputs.chunks.momentum_logits
    return 1 + (0 if logits is None else logits.shape[-1]) + (inputs.origin is not None)
