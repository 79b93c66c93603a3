"""The dual backend with spectral norm: momentum is orthogonalised before it is added to the weights.

Newton–Schulz of a sum of products Xᵀ Δ is not itself such a sum, so every chunk's matrix is formed (Titans eq. 10, 13):

    S_c = η_c S_{c−1} + s_c · X_cᵀ Δ_c    O_c = newton_schulz(S_c)    M_c = (1 − α_c) M_{c−1} + O_c
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.memory.backends.base import Gradients, PreparedBlock, Stored, StoreInputs, final_momentum
from titans_pytorch.memory.backends.dual import DualBackend
from titans_pytorch.memory.chunks import Chunks, WeightResidual, split_inputs
from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights, StoredBlock
from titans_pytorch.memory.reference import surprise
from titans_pytorch.memory.schedule import ChunkBlock
from titans_pytorch.ops.momentum_scan import momentum_scan, vector_scan, weight_scan
from titans_pytorch.ops.newton_schulz import newton_schulz
from titans_pytorch.ops.spectral_memory_scan import has_kernel
from titans_pytorch.utils.functional import replaced
from titans_pytorch.utils.precision import at_least_float32, operand_dtype
from titans_pytorch.utils.shapes import Float


class SpectralBackend(DualBackend):
    """Gradients as in the dual backend, then momentum and weights of every chunk by scans."""

    def store(self, inputs: StoreInputs) -> tuple[FastWeights, MemoryWeights, Float[Tensor, 'bh n m'] | None]:
        if self._has_kernel(inputs):
            blocks = self._blocks(inputs)
            if all(block.ends_batch for block in blocks[:-1]):
                assert self.fused is not None
                return self.fused.store_spectral(inputs, *_log_gates(inputs.chunks), blocks)
        return super().store(inputs)

    def store_chunk(
        self, chunk: Chunks, weights: MemoryWeights, residual: WeightResidual | None
    ) -> tuple[MemoryWeights, Float[Tensor, 'bh m']]:
        with torch.no_grad():
            if not self._updates_in_one(chunk, weights):
                return super().store_chunk(chunk, weights, residual)
            assert self.fused is not None
            gradients = self.gradients(chunk, weights.base, residual)
            return self.fused.store_spectral_chunk(chunk, gradients, weights), gradients.losses[:, 0]

    def _updates_in_one(self, chunk: Chunks, weights: MemoryWeights) -> bool:
        """True if one operation can add a chunk's gradients."""
        return self._has_one_order(chunk) and self.fused is not None and self.fused.updates_in_one(chunk, weights)

    def _has_one_order(self, chunks: Chunks) -> bool:
        """True for at most one order of momentum, and gradients that are not clamped."""
        logits, combined = chunks.momentum_logits, (chunks.momentum_mix, chunks.momentum_shares)
        if self.max_grad_norm is not None or any(gates is not None for gates in combined):
            return False
        return logits is None or logits.shape[-1] == 1

    def _blocks(self, inputs: StoreInputs) -> list[ChunkBlock]:
        return inputs.schedule.blocks(self.preferred_chunks(inputs.chunks))

    def _has_kernel(self, inputs: StoreInputs) -> bool:
        """True if one operation can store all memory batches."""
        chunks, transition = inputs.chunks, inputs.transition
        if self.fused is None or not self._has_one_order(chunks) or chunks.keys.numel() == 0:
            return False
        if chunks.resets is not None or transition.share is not None or transition.lookahead:
            return False
        residual = inputs.residual
        if residual is not None and residual.dense.keys() != inputs.weights.base.keys():
            return False
        matrices, _ = self.fused.mlp.of_weights(inputs.weights.base)
        states = (*inputs.weights.newest.values(), *inputs.weights.momentum.values())
        return has_kernel(chunks.rows, matrices, states, self.fused.previous_weights(residual))

    def prepare(self, inputs: StoreInputs) -> Iterator[PreparedBlock]:
        chunks = inputs.chunks
        blocks = self._blocks(inputs)
        lengths = [block.num_chunks for block in blocks]
        # compute the gates of all blocks at once, in fewer launches than block by block
        log_retention, all_gates = _log_gates(chunks)
        log_gates = [None] * len(blocks) if all_gates is None else all_gates.split(lengths, dim=1)
        parts = zip(blocks, split_inputs(chunks, inputs.residual, lengths), log_retention.split(lengths, 1), log_gates)
        for block, of_block, retention, gates in parts:
            yield PreparedBlock(partial(self._store_spectral, *of_block, retention, gates), block.ends_batch)

    def _store_spectral(
        self,
        chunks: Chunks,
        residual: WeightResidual | None,
        log_retention: Float[Tensor, 'bh n'],
        log_gates: Float[Tensor, 'bh n o'] | None,
        weights: MemoryWeights,
    ) -> Stored:
        gradients = self.gradients(chunks, weights.base, residual)
        if log_gates is not None and log_gates.shape[-1] > 1:
            return self._store_several_orders(chunks, gradients, log_retention, log_gates, weights)
        operands = operand_dtype(next(iter(weights.newest.values())))
        log_gate = None if log_gates is None else log_gates.squeeze(-1)
        dense, final, momentum = {}, {}, {}
        last: Tensor | None
        for index, (name, newest) in enumerate(weights.newest.items()):
            modulation = None if chunks.modulation is None else at_least_float32(chunks.modulation[..., index])
            initial = None if log_gate is None else weights.momentum[name][0]
            if name in gradients.inputs:
                inputs, deltas = gradients.inputs[name], gradients.deltas[name]
                factor = self._update_factor(inputs, deltas, modulation)
                every, last = momentum_scan(inputs, deltas, factor, log_gate, initial, operands)
                dense[name], final[name] = weight_scan(newton_schulz(every), log_retention, newest, operands)
            else:
                update = self._dense_update(gradients.vectors[name].to(newest.dtype), None)
                dense[name], final[name], last = vector_scan(
                    update, modulation, log_gate, log_retention, initial, newest
                )
            if log_gate is not None and last is not None:
                momentum[name] = last.unsqueeze(0)
        return Stored(StoredBlock(dense, final), momentum, gradients.losses)

    def _store_several_orders(
        self,
        chunks: Chunks,
        gradients: Gradients,
        log_retention: Float[Tensor, 'bh n'],
        log_gates: Float[Tensor, 'bh n o'],
        weights: MemoryWeights,
    ) -> Stored:
        formed = gradients.formed(weights.newest)
        gates = replaced(chunks.update_gates(), momentum=log_gates.unbind(-1))
        updates, orders = surprise(
            formed, gates, weights.momentum, _momentum_after, self.max_grad_norm, self.spectral_norm
        )
        dense, final = {}, {}
        for name, newest in weights.newest.items():
            dense[name], final[name] = weight_scan(updates[name], log_retention, newest, newest.dtype)
        return Stored(StoredBlock(dense, final), final_momentum(orders), gradients.losses)


def _log_gates(chunks: Chunks) -> tuple[Float[Tensor, 'bh n'], Float[Tensor, 'bh n o'] | None]:
    """Logarithms of retention and of momentum gates."""
    momentum = chunks.momentum_logits
    log_gates = None if momentum is None else F.logsigmoid(at_least_float32(momentum))
    return F.logsigmoid(-at_least_float32(chunks.decay_logits)), log_gates


def _momentum_after(log_gates: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
    """`Recurrence` for all chunks of a block, with gates given as logarithms."""
    before, last = weight_scan(inputs, log_gates, initial, inputs.dtype)
    return torch.cat((before[:, 1:], last.unsqueeze(1)), dim=1)
