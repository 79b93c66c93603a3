"""The dense backend: a gradient, a momentum and a weight tensor for every chunk. It serves any memory network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from titans_pytorch.memory.backends.base import Backend, PreparedBlock, Stored, StoreInputs, final_momentum
from titans_pytorch.memory.chunks import Chunks, WeightResidual, split_inputs
from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights, StoredBlock, Weights
from titans_pytorch.memory.reference import apply_network, gradient_of_chunk, surprise
from titans_pytorch.utils.functional import (
    call_outside_inference,
    call_with_weights,
    is_exporting,
    outside_inference,
    transformed,
)
from titans_pytorch.utils.shapes import Float


class DenseBackend(Backend):
    """Gradients by `torch.func`, for all chunks of a block at once; momentum and decay by scans over chunks."""

    def prepare(self, inputs: StoreInputs) -> Iterator[PreparedBlock]:
        if is_exporting():
            # the exporter's tracer takes no gradients under `vmap`
            raise ValueError("torch.export needs engine='dual', and this memory is dense")
        blocks = inputs.schedule.blocks(preferred=None)
        lengths = [block.num_chunks for block in blocks]
        for block, of_block in zip(blocks, split_inputs(inputs.chunks, inputs.residual, lengths)):
            yield PreparedBlock(partial(self._store_block, *of_block), block.ends_batch)

    def _store_block(self, chunks: Chunks, residual: WeightResidual | None, weights: MemoryWeights) -> Stored:
        gradients, losses = call_outside_inference(self.gradients_of_chunks, chunks, weights.base, residual)
        gates = chunks.update_gates()
        updates, orders = surprise(
            gradients, gates, weights.momentum, self.over_chunks, self.max_grad_norm, self.spectral_norm
        )
        dense, final = {}, {}
        for name, update in updates.items():
            # Titans eq. 13: M_t = (1 − α_t) M_{t−1} + S_t; the result begins with M before the first chunk
            every = self.scan(gates.retention.unsqueeze(-1), update, prev=weights.newest[name], remove_prev=False)
            # a copy, because a state would otherwise keep the weights of all chunks alive
            dense[name], final[name] = every[:, :-1], every[:, -1].clone()
        return Stored(StoredBlock(dense, final), final_momentum(orders), losses)

    def gradients_of_chunks(
        self, chunks: Chunks, base: Weights, residual: WeightResidual | None
    ) -> tuple[Weights, Float[Tensor, 'bh n m']]:
        """Minus the gradient of each chunk's weighted loss, (bh, n, …), and the losses of its rows, unweighted."""
        at, per_chunk = base, None
        if residual is not None:
            per_chunk = 0
            at = {name: w.unsqueeze(1) + residual.steps(name) for name, w in base.items()}

        gradient = gradient_of_chunk(self.network, self.loss_fn, self.num_proximal_steps)
        over_chunks = vmap(gradient, in_dims=(per_chunk, 0, 0, 0), randomness='different')
        over_heads = transformed(vmap, over_chunks, randomness='different')
        return over_heads(at, chunks.keys, chunks.values, chunks.step_sizes)

    def apply_over_time(
        self, weights: FastWeights, rows: Float[Tensor, 'bh n c d'], first: int
    ) -> Float[Tensor, 'bh n c d']:
        def forward(weights: Weights, group: Tensor) -> Tensor:
            return call_with_weights(self.network, weights, group)

        steps = {name: weights.steps(name, first, rows.shape[1]) for name in weights}
        over_steps = vmap(forward, randomness='different')
        return transformed(vmap, over_steps, randomness='different')(steps, rows)

    def apply(self, weights: Weights, rows: Float[Tensor, 'bh m d']) -> Float[Tensor, 'bh m d']:
        return apply_network(self.network, weights, rows)

    def negative_gradients(self, chunk: Chunks, at: Weights) -> tuple[Weights, Float[Tensor, 'bh m']]:
        with torch.inference_mode(False):
            keys, values, step_sizes = (outside_inference(t.squeeze(1)) for t in chunk.rows)
            at = {name: outside_inference(w) for name, w in at.items()}
            of_chunk = gradient_of_chunk(self.network, self.loss_fn, self.num_proximal_steps)
            gradient = transformed(vmap, of_chunk, randomness='different')
            return gradient(at, keys, values, step_sizes)
