"""The dual form of a memory MLP of one or two matrices under the default loss, by fused operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from titans_pytorch.memory.backends.base import Gradients, Stored, stacked, weights_of_states
from titans_pytorch.memory.chunks import Chunks, Coefficients, WeightResidual
from titans_pytorch.memory.fast_weights import FactoredBlocks, FastWeights, MemoryWeights, StoredBatches, Weights
from titans_pytorch.memory_models import PlainMLP
from titans_pytorch.ops.inner_gradient import PreviousWeights, inner_gradient
from titans_pytorch.ops.linear_memory_scan import linear_memory_scan
from titans_pytorch.ops.memory_batch_scan import memory_batch_scan
from titans_pytorch.ops.retrieve_sequence import FactoredMatrix, retrieve_sequence
from titans_pytorch.utils.precision import no_autocast
from titans_pytorch.utils.shapes import Float, concatenated


class FusedMLP(NamedTuple):
    """Names of the parameters of a memory MLP of one or two matrices, alone or in a `ResidualNorm`."""

    first: str | None
    """The first matrix of two."""
    last: str
    gamma: str | None
    """The gain of the norm around the network."""
    eps: float

    @classmethod
    def of(cls, mlp: PlainMLP | None) -> FusedMLP | None:
        """`None` for any other network."""
        if mlp is None or len(mlp.matrices) > 2:
            return None
        *first, last = mlp.matrices
        return cls(first[0] if first else None, last, mlp.gamma, mlp.eps)

    def of_parameters(self, weights: Weights) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """W₁, W₂ and γ; `None` for those that the network lacks."""
        first, gamma = (None if name is None else weights[name] for name in (self.first, self.gamma))
        return first, weights[self.last], gamma

    def gradients(self, chunks: Chunks, base: Weights, residual: WeightResidual | None) -> Gradients:
        """Negative gradients of each chunk at `base`, plus the residual, which is dense."""
        added = None if residual is None else PreviousWeights(residual.shares, *self.of_parameters(residual.dense))
        out = inner_gradient(*chunks[:3], *self.of_parameters(base), self.eps, added)
        keys = chunks.keys.to(out.deltas.dtype)
        vectors = _present({self.gamma: out.negative_gamma_gradient})
        inputs = {self.last: keys} if out.hidden is None else _present({self.first: keys, self.last: out.hidden})
        return Gradients(inputs, _present({self.first: out.hidden_deltas, self.last: out.deltas}), vectors, out.losses)

    def store_batches(
        self,
        chunks: Chunks,
        coefficients: Coefficients,
        of_batches: Coefficients,
        weights: MemoryWeights,
        num_proximal_steps: int | None,
        lookahead: bool,
    ) -> Stored:
        """Whole memory batches in a row, each with its gradients at the weights that the one before leaves.

        Args:
            coefficients: of blocks of one or more memory batches, for which the states are kept.
            of_batches: of each memory batch.
            num_proximal_steps: number of steps that are added up in a memory batch, if they are proximal ones.
            lookahead: whether state 0, at which gradients are taken, is what momentum leads the weights to.
        """
        initial = {name: [w, *weights.momentum.get(name, ())] for name, w in weights.base.items()}
        first, gamma = (None if name is None else initial[name] for name in (self.first, self.gamma))
        out = memory_batch_scan(
            *chunks[:3],
            first,
            initial[self.last],
            gamma,
            of_batches.final,
            of_batches.initial_final,
            self.eps,
            of_batches.steps.shape[1] // coefficients.steps.shape[1],
            num_proximal_steps,
        )

        shape = coefficients.steps.shape[1:3]

        def of_blocks(rows: Float[Tensor, 'bh r t e']) -> Float[Tensor, 'bh _r _t e']:
            return rows.flatten(1, 2).unflatten(1, (shape[0], -1))

        keys = chunks.keys.to(out.deltas.dtype).unflatten(1, shape).flatten(2, 3)
        matrices, dense = {}, {}
        if self.first is not None and out.first_initial is not None and out.hidden_deltas is not None:
            matrices[self.first] = FactoredMatrix(out.first_initial, keys, of_blocks(out.hidden_deltas))
        inputs = keys if out.hidden is None else of_blocks(out.hidden)
        matrices[self.last] = FactoredMatrix(out.last_initial, inputs, of_blocks(out.deltas))
        if self.gamma is not None and out.gamma_initial is not None and out.negative_gamma_gradient is not None:
            with no_autocast(out.gamma_initial):
                every = coefficients.steps @ of_blocks(out.negative_gamma_gradient)
                dense[self.gamma] = (every + coefficients.initial_steps @ out.gamma_initial).flatten(1, 2)

        final = _present({self.first: out.first_final, self.last: out.last_final, self.gamma: out.gamma_final})
        states = {name: [*final[name].unbind(1)] for name in weights.newest}
        momentum = {name: stacked(states[name][1:]) for name in weights.momentum}
        blocks = FactoredBlocks(coefficients.steps, coefficients.initial_steps, matrices)
        stored = StoredBatches(dense, {name: weights_of_states(own, lookahead) for name, own in states.items()}, blocks)
        return Stored(stored, momentum, out.losses.flatten(1, 2))

    def store_linear(
        self,
        chunks: Chunks,
        coefficients: Coefficients,
        of_base: Coefficients,
        chunks_per_batch: int,
        weights: MemoryWeights,
        num_proximal_steps: int | None,
        with_losses: bool,
        lookahead: bool,
    ) -> Stored:
        """Whole memory batches in a row, several in each block of coefficients, in a memory of one matrix.

        Args:
            coefficients: of the weights.
            of_base: of state 0, as in `store_batches`.
        """
        name = self.last
        states = [weights.base[name], *weights.momentum.get(name, ())]
        out = linear_memory_scan(*chunks[:3], states, *of_base, chunks_per_batch, num_proximal_steps, with_losses)
        inputs = chunks.keys.to(out.deltas.dtype).unflatten(1, coefficients.steps.shape[1:3]).flatten(2, 3)
        matrices = {name: FactoredMatrix(out.initial, inputs, out.deltas)}
        final = [*out.final.unbind(1)]
        blocks = FactoredBlocks(coefficients.steps, coefficients.initial_steps, matrices)
        stored = StoredBatches({}, {name: weights_of_states(final, lookahead)}, blocks)
        losses = None if out.losses is None else out.losses.flatten(1, 2)
        return Stored(stored, {name: stacked(final[1:])} if len(final) > 1 else {}, losses)

    def is_factored_in(self, weights: FastWeights) -> bool:
        """True if all matrices of the network are factored."""
        return len(weights.blocks) > 0 and not any(name in weights.dense for name in (self.first, self.last))

    def retrieve(
        self,
        weights: FastWeights,
        rows: Float[Tensor, 'bh n c d'],
        first: int,
        after_blocks: Callable[[FastWeights, Tensor, int], Tensor],
    ) -> Float[Tensor, 'bh n c d']:
        """Group k of `rows` through the network with the weights of step `first + k`.

        `after_blocks` does so for the groups that read the weights after the last of the factored blocks.
        """
        out, lengths = [], [block.num_steps for block in weights.blocks]
        gamma = None if self.gamma is None else weights.dense[self.gamma][:, :-1].split(lengths, dim=1)
        for index, padded, used in weights.by_block(rows, first):
            block = weights.blocks[index]
            shape = block.steps.shape[1:3]
            retrieved = retrieve_sequence(
                padded.unflatten(1, shape),
                block.steps,
                block.initial_steps,
                None if self.first is None else block.matrices[self.first],
                block.matrices[self.last],
                None if gamma is None else gamma[index].unflatten(1, shape),
                self.eps,
            )
            out.append(retrieved.flatten(1, 2)[:, used])
        rest = weights.after_blocks(rows, first)
        if rest is not None:
            out.append(after_blocks(weights, rest, max(first, weights.num_steps - 1)))
        return concatenated(out, dim=1)


def _present(tensors: Mapping[str | None, Tensor | None]) -> Weights:
    """Tensors of the parameters that the network has."""
    return {name: t for name, t in tensors.items() if name is not None and t is not None}
