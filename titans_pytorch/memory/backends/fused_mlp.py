"""The dual form of a memory MLP under the default loss, by fused operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from titans_pytorch.memory.backends.base import Gradients, Stored, StoreInputs, stacked, weights_of_states
from titans_pytorch.memory.chunks import Chunks, WeightResidual
from titans_pytorch.memory.coefficients import Coefficients
from titans_pytorch.memory.fast_weights import FactoredBlocks, FastWeights, MemoryWeights, StoredBatches, Weights
from titans_pytorch.memory.schedule import ChunkBlock
from titans_pytorch.memory_models import PlainMLP
from titans_pytorch.ops.deep_memory_scan import deep_memory_scan
from titans_pytorch.ops.inner_gradient import PreviousWeights, inner_gradient
from titans_pytorch.ops.linear_memory_scan import linear_memory_scan
from titans_pytorch.ops.memory_batch_scan import MemoryBatches, memory_batch_scan
from titans_pytorch.ops.retrieve_sequence import FactoredMatrix, retrieve_sequence
from titans_pytorch.ops.spectral_memory_scan import spectral_memory_scan
from titans_pytorch.ops.spectral_update import ChunkGates, has_kernel, spectral_update
from titans_pytorch.utils.functional import replaced
from titans_pytorch.utils.precision import at_least_float32, no_autocast, operand_dtype
from titans_pytorch.utils.shapes import Float, concatenated


class FusedMLP(NamedTuple):
    """A memory MLP, and, if steps are proximal, the number of them that add up over a memory batch."""

    mlp: PlainMLP
    num_proximal_steps: int | None

    def gradients(self, chunks: Chunks, base: Weights, residual: WeightResidual | None) -> Gradients:
        """Negative gradients of each chunk at the weights `base` plus the residual, which must be dense."""
        out = inner_gradient(*chunks.rows, *self.mlp.of_weights(base), self.mlp.eps, self.previous_weights(residual))
        names, gamma = self.mlp.matrices, self.mlp.gamma
        vectors = {}
        if gamma is not None and out.negative_gamma_gradient is not None:
            vectors[gamma] = out.negative_gamma_gradient
        return Gradients(dict(zip(names, out.inputs)), dict(zip(names, out.deltas)), vectors, out.losses)

    def previous_weights(self, residual: WeightResidual | None) -> PreviousWeights | None:
        """A dense residual in the form that operations take."""
        return None if residual is None else PreviousWeights(residual.shares, *self.mlp.of_weights(residual.dense))

    def store_batches(self, inputs: StoreInputs, num_blocks: int) -> Stored:
        """Store consecutive whole memory batches, each with its gradients at the weights that the previous one leaves.

        All blocks hold the same number of memory batches; states are kept once per block.
        """
        chunks, lookahead = inputs.chunks, inputs.transition.lookahead
        num_batches = chunks.keys.shape[1] // _chunks_per_batch(inputs)
        coefficients, of_batches = Coefficients.with_base(chunks, num_blocks, lookahead)
        if num_batches != num_blocks:
            _, of_batches = Coefficients.with_base(chunks, num_batches, lookahead)
        states, (updates, initial) = self._initial_states(inputs.weights), (of_batches.final, of_batches.initial_final)
        out = memory_batch_scan(*chunks.rows, *states, updates, initial, self.mlp.eps, num_batches // num_blocks)
        return self._stored(out, coefficients, inputs)

    def store_deep(self, inputs: StoreInputs, num_blocks: int) -> Stored:
        """`store_batches` for deeper memories and proximal steps."""
        coefficients, of_base = Coefficients.with_base(inputs.chunks, num_blocks, inputs.transition.lookahead)
        out = deep_memory_scan(
            *inputs.chunks.rows,
            *self._initial_states(inputs.weights),
            *of_base,
            self.mlp.eps,
            _chunks_per_batch(inputs),
            self.num_proximal_steps,
        )
        return self._stored(out, coefficients, inputs)

    def store_linear(self, inputs: StoreInputs, num_blocks: int) -> Stored:
        """`store_batches` for a memory that is one matrix without a norm."""
        chunks, residual = inputs.chunks, inputs.residual
        if residual is not None:
            # k (W + W') − v = k W − (v − k W')
            (matrix,) = self.mlp.matrices
            chunks = replaced(chunks, values=chunks.values - residual.linear(matrix, chunks.keys))
        if chunks.modulation is not None:
            chunks = replaced(chunks, step_sizes=chunks.step_sizes * chunks.modulation)
        coefficients, of_base = Coefficients.with_base(chunks, num_blocks, inputs.transition.lookahead)
        (states,), _ = self._initial_states(inputs.weights)
        settings = _chunks_per_batch(inputs), self.num_proximal_steps, inputs.with_losses
        out = linear_memory_scan(*chunks.rows, states, *of_base, *settings)
        keys = chunks.keys.to(out.deltas.dtype).unflatten(1, coefficients.steps.shape[1:3]).flatten(2, 3)
        batches = MemoryBatches([out.initial], None, [out.final], None, [keys], [out.deltas], None, out.losses)
        return self._stored(batches, coefficients, inputs)

    def store_spectral(
        self,
        inputs: StoreInputs,
        log_retention: Float[Tensor, 'bh n'],
        log_gates: Float[Tensor, 'bh n 1'] | None,
        blocks: list[ChunkBlock],
    ) -> tuple[FastWeights, MemoryWeights, Float[Tensor, 'bh n m'] | None]:
        """Store all memory batches under spectral norm; only the last one may still be open at the end.

        Returns what `Backend.store` returns.
        """
        chunks, weights, names = inputs.chunks, inputs.weights, self._names
        scales = None
        if chunks.modulation is not None:
            by_name = dict(zip(weights.newest, at_least_float32(chunks.modulation).unbind(-1)))
            scales = [by_name[name] for name in names]
        out = spectral_memory_scan(
            chunks.rows,
            self.mlp.of_weights(weights.base),
            self.mlp.of_weights(weights.newest),
            self.mlp.of_weights({name: w[0] for name, w in weights.momentum.items()}) if weights.momentum else None,
            log_retention,
            None if log_gates is None else log_gates.squeeze(-1),
            scales,
            self.previous_weights(inputs.residual),
            [block.num_chunks for block in blocks],
            self.mlp.eps,
        )
        # in the order of `weights.newest`, which is how modulation is indexed
        over_time, ends, momentum_ends = (
            {name: own[names.index(name)] for name in weights.newest} if own else {}
            for own in (out.over_time, out.ends, out.momentum_ends)
        )
        # copies, because a state would otherwise keep those of all memory batches alive
        newest = base = {name: own[-1].clone() for name, own in ends.items()}
        if not blocks[-1].ends_batch:
            base = weights.base if len(blocks) == 1 else {name: own[-2].clone() for name, own in ends.items()}
        after = MemoryWeights(base, newest, {name: own[-1:].clone() for name, own in momentum_ends.items()})
        return FastWeights(over_time, [], newest), after, out.losses if inputs.with_losses else None

    def updates_in_one(self, chunk: Chunks, weights: MemoryWeights) -> bool:
        """True if `spectral_update` can serve a chunk."""
        return has_kernel(chunk.keys[:, 0], *self._newest(weights), operand_dtype(chunk.keys))

    def store_spectral_chunk(self, chunk: Chunks, gradients: Gradients, weights: MemoryWeights) -> MemoryWeights:
        """The weights after a chunk under spectral norm, without a graph; momentum is updated in place."""
        names, matrices, gamma = self._names, self.mlp.matrices, self.mlp.gamma
        inputs, deltas = ([own[name][:, 0] for name in matrices] for own in (gradients.inputs, gradients.deltas))
        logits, modulation = chunk.momentum_logits, chunk.modulation
        gates = ChunkGates(
            decay_logits=chunk.decay_logits[:, 0],
            momentum_logits=None if logits is None else logits[:, 0, 0],
            scales=None if modulation is None else modulation[:, 0],
            scale_indices=[[*weights.newest].index(name) for name in names],
        )
        of_gamma = None if gamma is None else gradients.vectors[gamma][:, 0]
        states, operands = self._newest(weights), operand_dtype(chunk.keys)
        after = dict(zip(names, spectral_update(inputs, deltas, of_gamma, *states, gates, operands)))
        # in the order of `weights.newest`, which is how modulation is indexed
        return replaced(weights, newest={name: after[name] for name in weights.newest})

    def _newest(self, weights: MemoryWeights) -> tuple[list[Tensor], list[Tensor]]:
        """Newest weights and the single order of momentum, for the matrices and for γ."""
        momentum = [weights.momentum[name][0] for name in self._names] if weights.momentum else []
        return [weights.newest[name] for name in self._names], momentum

    @property
    def _names(self) -> list[str]:
        """Names of the matrices, then of γ."""
        return [*self.mlp.matrices, *([] if self.mlp.gamma is None else [self.mlp.gamma])]

    def _initial_states(self, weights: MemoryWeights) -> tuple[list[list[Tensor]], list[Tensor] | None]:
        """State 0 and the momentum of each order, for the matrices and for γ."""
        states = {name: [w, *weights.momentum.get(name, ())] for name, w in weights.base.items()}
        gamma = self.mlp.gamma
        return [states[name] for name in self.mlp.matrices], None if gamma is None else states[gamma]

    def _stored(self, out: MemoryBatches, coefficients: Coefficients, inputs: StoreInputs) -> Stored:
        weights, lookahead = inputs.weights, inputs.transition.lookahead
        names, gamma, dense = self.mlp.matrices, self.mlp.gamma, {}
        final = dict(zip(names, out.final))
        if gamma is not None:
            assert out.gamma_initial is not None and out.gamma_final is not None
            assert out.negative_gamma_gradient is not None
            final[gamma] = out.gamma_final
            with no_autocast(out.gamma_initial):
                every = coefficients.steps @ out.negative_gamma_gradient
                dense[gamma] = (every + coefficients.initial_steps @ out.gamma_initial).flatten(1, 2)

        matrices = {name: FactoredMatrix(*own) for name, *own in zip(names, out.initial, out.inputs, out.deltas)}
        initial_steps = coefficients.initial_steps
        if initial_steps.shape[2] == 1 and not lookahead:
            # the only step of a block reads the weights before it and nothing else
            initial_steps = initial_steps[..., :1]
            matrices = {
                name: FactoredMatrix(own.initial_states[:, :, :1], own.inputs.detach(), own.deltas.detach())
                for name, own in matrices.items()
            }
        blocks = FactoredBlocks(coefficients.steps, initial_steps, matrices)
        states = {name: [*final[name].unbind(1)] for name in weights.newest}
        newest = {name: weights_of_states(own, lookahead) for name, own in states.items()}
        momentum = {name: stacked(states[name][1:]) for name in weights.momentum}
        losses = None if out.losses is None else out.losses.flatten(1, 2)
        return Stored(StoredBatches(dense, newest, blocks), momentum, losses)

    def is_factored_in(self, weights: FastWeights) -> bool:
        """True if all matrices of the network are factored."""
        return len(weights.blocks) > 0 and not any(name in weights.dense for name in self.mlp.matrices)

    def retrieve(
        self,
        weights: FastWeights,
        rows: Float[Tensor, 'bh n c d'],
        first: int,
        after_blocks: Callable[[FastWeights, Tensor, int], Tensor],
    ) -> Float[Tensor, 'bh n c d']:
        """Apply the network to `rows`; group k reads the weights of step `first + k`.

        `after_blocks` applies it to the groups that read the weights after the last factored block.
        """
        out, lengths = [], [block.num_steps for block in weights.blocks]
        gamma = None if self.mlp.gamma is None else weights.dense[self.mlp.gamma][:, :-1].split(lengths, dim=1)
        for index, padded, used in weights.by_block(rows, first):
            block = weights.blocks[index]
            shape = block.steps.shape[1:3]
            retrieved = retrieve_sequence(
                padded.unflatten(1, shape),
                block.steps,
                block.initial_steps,
                [block.matrices[name] for name in self.mlp.matrices],
                None if gamma is None else gamma[index].unflatten(1, shape),
                self.mlp.eps,
            )
            out.append(retrieved.flatten(1, 2)[:, used])
        rest = weights.after_blocks(rows, first)
        if rest is not None:
            out.append(after_blocks(weights, rest, max(first, weights.num_steps - 1)))
        return concatenated(out, dim=1)


def _chunks_per_batch(inputs: StoreInputs) -> int:
    assert inputs.schedule.chunks_per_batch is not None  # whole memory batches are stored
    return inputs.schedule.chunks_per_batch
