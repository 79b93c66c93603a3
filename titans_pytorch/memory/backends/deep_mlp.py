"""The dual form of a memory MLP of any depth under the default loss, many memory batches by one operation."""

from __future__ import annotations

from typing import NamedTuple

from titans_pytorch.memory.backends.base import Stored, StoreInputs, stacked, weights_of_states
from titans_pytorch.memory.chunks import Chunks, Coefficients
from titans_pytorch.memory.fast_weights import FactoredBlocks, MemoryWeights, StoredBatches
from titans_pytorch.memory_models import PlainMLP
from titans_pytorch.ops.deep_memory_scan import deep_memory_scan, has_kernel
from titans_pytorch.ops.retrieve_sequence import FactoredMatrix
from titans_pytorch.utils.precision import no_autocast


class DeepMLP(NamedTuple):
    """A memory MLP, and the number of steps that are added up in a memory batch if they are proximal ones."""

    mlp: PlainMLP
    num_proximal_steps: int | None

    def has_kernel(self, inputs: StoreInputs) -> bool:
        """Whether one kernel stores all memory batches of a call."""
        chunks, per_batch = inputs.chunks, inputs.schedule.chunks_per_batch
        if per_batch is None:
            return False
        matrices = [inputs.weights.newest[name] for name in self.mlp.matrices]
        num_states = 1 if chunks.momentum is None else 1 + chunks.momentum.shape[-1]
        return has_kernel(matrices, num_states, per_batch * chunks.keys.shape[2], self.num_proximal_steps)

    def store_batches(
        self,
        chunks: Chunks,
        coefficients: Coefficients,
        of_base: Coefficients,
        chunks_per_batch: int,
        weights: MemoryWeights,
        lookahead: bool,
    ) -> Stored:
        """Whole memory batches in a row, several in each block of coefficients.

        Args:
            coefficients: of the weights.
            of_base: of state 0, at which gradients are taken.
            lookahead: whether that is what momentum leads the weights to.
        """
        initial = {name: [w, *weights.momentum.get(name, ())] for name, w in weights.base.items()}
        names, gamma = self.mlp.matrices, self.mlp.gamma
        out = deep_memory_scan(
            *chunks[:3],
            [initial[name] for name in names],
            None if gamma is None else initial[gamma],
            *of_base,
            self.mlp.eps,
            chunks_per_batch,
            self.num_proximal_steps,
        )
        # the kernels that retrieve from two matrices take states in float32
        states = [own.to(coefficients.steps.dtype) for own in out.initial] if len(names) == 2 else out.initial
        matrices = {name: FactoredMatrix(*own) for name, own in zip(names, zip(states, out.inputs, out.deltas))}
        final, dense = dict(zip(names, out.final)), {}
        if gamma is not None and out.gamma_initial is not None and out.gamma_final is not None:
            assert out.negative_gamma_gradient is not None
            final[gamma] = out.gamma_final
            with no_autocast(out.gamma_initial):
                every = coefficients.steps @ out.negative_gamma_gradient
                dense[gamma] = (every + coefficients.initial_steps @ out.gamma_initial).flatten(1, 2)

        by_state = {name: [*final[name].unbind(1)] for name in weights.newest}
        momentum = {name: stacked(by_state[name][1:]) for name in weights.momentum}
        blocks = FactoredBlocks(coefficients.steps, coefficients.initial_steps, matrices)
        newest = {name: weights_of_states(own, lookahead) for name, own in by_state.items()}
        return Stored(StoredBatches(dense, newest, blocks), momentum, out.losses.flatten(1, 2))
