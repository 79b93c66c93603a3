"""The dual backend: rows and output gradients in place of a gradient matrix for every chunk.

The gradient of a matrix W over a chunk is Xᵀ Δ, where X are the rows that W was applied to and Δ the gradients of their
products. Keeping these two factors makes it possible to store chunks and retrieve from them without a matrix per chunk
(see `titans_pytorch.memory.fast_weights`). The backend serves networks that send every product of a row with a matrix
through `linear`, as those of `titans_pytorch.memory_models` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from titans_pytorch.memory.backends.base import (
    Backend,
    Gradients,
    PreparedBlock,
    Stored,
    StoreInputs,
    refuse_dynamic_length,
    stacked,
)
from titans_pytorch.memory.backends.export_scan import scan_chunks
from titans_pytorch.memory.backends.fused_mlp import FusedMLP
from titans_pytorch.memory.backends.whole_batches import WholeBatches
from titans_pytorch.memory.chunks import Chunks, WeightResidual, scaled, split_inputs
from titans_pytorch.memory.coefficients import Coefficients
from titans_pytorch.memory.fast_weights import Factors, FastWeights, MemoryWeights, StoredBlock, Weights
from titans_pytorch.memory.reference import LossFn, default_loss_fn
from titans_pytorch.memory.schedule import ChunkBlock
from titans_pytorch.memory.soft_clamp import soft_clamp_factor, soft_clamp_norm
from titans_pytorch.ops.associative_scan import coefficient_product
from titans_pytorch.ops.final_state import final_state
from titans_pytorch.utils.functional import (
    call_outside_inference,
    call_with_weights,
    is_traced,
    outside_inference,
    replaced,
    transformed,
)
from titans_pytorch.utils.precision import at_least_float32, no_autocast
from titans_pytorch.utils.shapes import Float


class DualBackend(Backend):
    """Matrices are factored, unless they have no more entries than their factors over a chunk; vectors are dense."""

    @property
    def fused(self) -> FusedMLP | None:
        """The network as a memory MLP under the default loss, which fused operations serve; otherwise `None`."""
        if self.mlp is None or self.loss_fn is not default_loss_fn:
            return None
        return FusedMLP(self.mlp, self.num_proximal_steps)

    def store(self, inputs: StoreInputs) -> tuple[FastWeights, MemoryWeights, Float[Tensor, 'bh n m'] | None]:
        if isinstance(inputs.schedule.num_chunks, torch.SymInt):
            # gradients of other networks, and of the scan itself, need transforms that the scan does not support
            if torch.is_grad_enabled() or self.fused is None:
                refuse_dynamic_length()
            return scan_chunks(self, inputs)
        return super().store(inputs)

    def prepare(self, inputs: StoreInputs) -> Iterator[PreparedBlock]:
        chunks, weights = inputs.chunks, inputs.weights
        rows, matrices = chunks.keys.shape[2], ((name, w) for name, w in weights.newest.items() if w.ndim > 2)
        formed = {name for name, w in matrices if _forms_matrix(rows, *w.shape[1:])}
        in_one = WholeBatches.of(self.fused, inputs, self.max_grad_norm is not None, bool(formed))
        if in_one is not None:
            formed = set()  # as in whole batches, a matrix is held in the same way throughout a call
        blocks = inputs.schedule.blocks(self.preferred_chunks(chunks))
        # the first block's gradients may be taken elsewhere than at the newest weights, where whole batches take theirs
        at_newest = all(weights.base[name] is w for name, w in weights.newest.items())
        first_differs = not at_newest or (inputs.transition.lookahead and not inputs.at_rest)
        groups = _neighbours(blocks, first_alone=first_differs)
        lengths = [sum(block.num_chunks for block in group) for group in groups]
        for index, (group, own) in enumerate(zip(groups, split_inputs(chunks, inputs.residual, lengths))):
            are_whole = all(block.is_batch for block in group) and not (first_differs and index == 0)
            if in_one is not None and are_whole:
                prepared = in_one.prepare(group, *own)
            else:
                prepared = self._separately(group, *own, formed)
            yield from prepared if inputs.origin is None else _beginning_anew(prepared, inputs.origin)

    def preferred_chunks(self, chunks: Chunks) -> int:
        """Number of chunks in a block, where the schedule leaves the choice."""
        # work inside a block grows with the square of its rows, launches with the number of blocks; on a GPU, launches
        # cost more. If matrices are formed, work grows with the square of the number of chunks
        return max((128 if chunks.keys.device.type == 'cpu' else 512) // chunks.keys.shape[2], 8)

    def _separately(
        self, blocks: list[ChunkBlock], chunks: Chunks, residual: WeightResidual | None, formed: set[str]
    ) -> Iterator[PreparedBlock]:
        # solve the recurrences of neighbouring blocks of one length together
        coefficients = Coefficients.of_blocks(chunks, len(blocks))
        lengths = [block.num_chunks for block in blocks]
        parts = zip(blocks, split_inputs(chunks, residual, lengths), coefficients.unbind())
        for block, inputs, block_coefficients in parts:
            store = partial(self._store_block, *inputs, block_coefficients, formed)
            yield PreparedBlock(store, block.ends_batch)

    def _store_block(
        self,
        chunks: Chunks,
        residual: WeightResidual | None,
        coefficients: Coefficients,
        formed: set[str],
        weights: MemoryWeights,
    ) -> Stored:
        gradients = self.gradients(chunks, weights.base, residual)
        coefficients = coefficients.to(next(iter(weights.newest.values())).dtype)
        dense, factors, final, momentum = {}, {}, {}, {}
        for index, (name, newest) in enumerate(weights.newest.items()):
            modulation = None if chunks.modulation is None else chunks.modulation[..., index]
            initial = [newest, *weights.momentum.get(name, ())]
            if name in gradients.inputs and name not in formed:
                inputs, deltas = gradients.inputs[name], gradients.deltas[name]
                factor = self._update_factor(inputs, deltas, modulation)
                deltas = deltas if factor is None else scaled(factor, deltas)
                factors[name] = Factors(initial, inputs.flatten(1, 2), deltas.flatten(1, 2))
                states = final_state(coefficients.final, coefficients.initial_final, initial, inputs, deltas)
            else:
                update = self._dense_update(gradients.dense(name).to(newest.dtype), modulation)
                dense[name], states = _dense_states(coefficients, initial, update)
            final[name] = states[0]
            if len(states) > 1:
                momentum[name] = stacked(states[1:])
        steps, initial_steps = coefficients.steps, coefficients.initial_steps
        return Stored(StoredBlock(dense, final, factors, steps, initial_steps), momentum, gradients.losses)

    # gradients

    def gradients(self, chunks: Chunks, base: Weights, residual: WeightResidual | None) -> Gradients:
        """Negative gradients of each chunk at the weights `base` plus the residual."""
        # a frozen memory builds no graph, although the gradients that it stores come from one
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._needs_graph(chunks, base, residual)):
            if self.fused is not None and (residual is None or residual.dense.keys() == base.keys()):
                found = self.fused.gradients(chunks, base, residual)
            else:
                found = call_outside_inference(self.traced_gradients, chunks, base, residual)
            num_steps = self.num_proximal_steps
            return found if num_steps is None else found.proximal(chunks.step_sizes, num_steps)

    def _needs_graph(self, chunks: Chunks, base: Weights, residual: WeightResidual | None) -> bool:
        """True if any input of the gradients can itself have a gradient."""
        if is_traced():
            return True
        tensors = [*chunks, *base.values(), *tree_leaves(residual)]
        if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            return True
        if self.loss_fn is default_loss_fn:
            return False
        row = chunks.keys[0, 0, :1].detach()
        return self.loss_fn(row, row).requires_grad

    def traced_gradients(self, chunks: Chunks, base: Weights, residual: WeightResidual | None) -> Gradients:
        """`gradients` for any network, by autograd."""
        names = _parameter_names(self.network)
        bh, n, m, _ = chunks.keys.shape
        vectors = {name: base[name].unsqueeze(1).expand(-1, n, -1) for name in _vectors(self.network)}
        if residual is not None:
            vectors = {name: v + residual.steps(name) for name, v in vectors.items()}
        inputs: Weights = {}

        def negative_loss(probe: Callable[[str, Tensor], Tensor], vectors: Weights) -> tuple[Tensor, Tensor]:
            def linear(x: Tensor, weight: Tensor) -> Tensor:
                name = names.get(id(weight))
                if name is None:  # a constant of the network
                    return x @ weight
                inputs[name] = x
                out = (x.flatten(1, 2) @ base[name]).unflatten(1, (n, m))
                if residual is not None:
                    out = out + residual.linear(name, x)
                return probe(name, out)

            prediction = call_with_weights(self.network, vectors, chunks.keys, linear=linear)
            losses = _batched(self.loss_fn, 2)(prediction, chunks.values)
            return -(losses * chunks.step_sizes).sum(), losses

        if torch.is_grad_enabled() and not is_traced():
            deltas, of_vectors, losses = _gradients_of_products(negative_loss, vectors)
        else:
            widths = {name: w.shape[-1] for name, w in base.items() if name not in vectors}
            zeros = {name: chunks.keys.new_zeros(bh, n, m, width) for name, width in widths.items()}
            deltas, of_vectors, losses = _gradients_of_added_zeros(negative_loss, vectors, zeros)
        return Gradients({name: x.to(deltas[name].dtype) for name, x in inputs.items()}, deltas, of_vectors, losses)

    def _update_factor(self, inputs: Tensor, deltas: Tensor, modulation: Tensor | None) -> Float[Tensor, 'bh n'] | None:
        """The factor by which clamping and modulation scale each chunk's update, whose two factors are given."""
        if self.max_grad_norm is None:
            return modulation
        # ‖XᵀΔ‖² = Σ (X Xᵀ) ∘ (Δ Δᵀ), without the matrix
        with no_autocast(inputs):
            rows, own = at_least_float32(inputs), at_least_float32(deltas)
            squared = ((rows @ rows.mT) * (own @ own.mT)).sum(dim=(-2, -1))
        clamp = soft_clamp_factor(squared, self.max_grad_norm)
        return clamp if modulation is None else clamp * modulation

    def _dense_update(self, gradient: Tensor, modulation: Tensor | None) -> Tensor:
        if self.max_grad_norm is not None:
            gradient = soft_clamp_norm(gradient, self.max_grad_norm, 2)
        return gradient if modulation is None else scaled(modulation, gradient)

    # applying the network

    def retrieve(self, weights: FastWeights, rows: Float[Tensor, 'bh n c d'], first: int) -> Float[Tensor, 'bh n c d']:
        if self.fused is not None and self.fused.is_factored_in(weights):
            return self.fused.retrieve(weights, rows, first, self.apply_over_time)
        return super().retrieve(weights, rows, first)

    def apply_over_time(
        self, weights: FastWeights, rows: Float[Tensor, 'bh n c d'], first: int
    ) -> Float[Tensor, 'bh n c d']:
        vectors = {name: weights.steps(name, first, rows.shape[1]) for name in _vectors(self.network)}
        if self.mlp is not None:
            gamma = None if self.mlp.gamma is None else vectors[self.mlp.gamma]
            return self.mlp.through(rows, lambda x, name: weights.linear(name, x, first), gamma)
        names = _parameter_names(self.network)

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            name = names.get(id(weight))
            return x @ weight if name is None else weights.linear(name, x, first)  # no name: a constant of the network

        return call_with_weights(self.network, vectors, rows, linear=linear)

    def apply(self, weights: Weights, rows: Float[Tensor, 'bh m d']) -> Float[Tensor, 'bh m d']:
        # for so few rows, calling the modules would take longer than the products themselves
        return call_with_weights(self.network, weights, rows) if self.mlp is None else self.mlp(weights, rows)

    def negative_gradients(self, chunk: Chunks, at: Weights) -> tuple[Weights, Float[Tensor, 'bh m']]:
        if self.fused is not None or self.num_proximal_steps is not None:
            gradients = self.gradients(chunk, at, None)
            return {name: own[:, 0] for name, own in gradients.formed(at).items()}, gradients.losses[:, 0]
        with torch.inference_mode(False):
            keys, values, step_sizes = (outside_inference(t.squeeze(1)) for t in chunk.rows)

            def negative_loss(at: Weights) -> tuple[Tensor, Tensor]:
                # Titans eq. 12: ‖M(k) − v‖²
                losses = _batched(self.loss_fn, 1)(self.apply(at, keys), values)
                return -(losses * step_sizes.to(losses.dtype)).sum(), losses

            gradient = transformed(grad, negative_loss, has_aux=True)
            return gradient({name: outside_inference(w) for name, w in at.items()})


def _neighbours(blocks: list[ChunkBlock], first_alone: bool) -> list[list[ChunkBlock]]:
    """Group consecutive blocks of one length, which are prepared together."""
    first, others = (blocks[:1], blocks[1:]) if first_alone else ([], blocks)
    groups = [[*same] for _, same in groupby(others, key=lambda block: block.num_chunks)]
    return [first, *groups] if first else groups


def _forms_matrix(rows: int, dim_in: int, dim_out: int) -> bool:
    """True if a matrix has no more entries than the two factors of its gradient over a chunk of `rows` rows."""
    return rows * (dim_in + dim_out) >= dim_in * dim_out


def _beginning_anew(blocks: Iterable[PreparedBlock], origin: Weights) -> Iterator[PreparedBlock]:
    """The same blocks with `origin` as their last state, which goes through them as if it were momentum."""
    last = {name: w.unsqueeze(0) for name, w in origin.items()}

    def stored(store: Callable[[MemoryWeights], Stored], weights: MemoryWeights) -> Stored:
        momentum = (
            {name: torch.cat((weights.momentum[name], w)) for name, w in last.items()} if weights.momentum else last
        )
        block = store(replaced(weights, momentum=momentum))
        own = {name: states[:-1] for name, states in block.momentum.items()} if weights.momentum else {}
        return replaced(block, momentum=own)

    for block in blocks:
        yield PreparedBlock(partial(stored, block.store), block.ends_batch)


def _dense_states(
    coefficients: Coefficients, initial: list[Tensor], update: Float[Tensor, 'bh n ...']
) -> tuple[Float[Tensor, 'bh n ...'], list[Tensor]]:
    """The weights before each chunk, and each state after the last chunk."""
    with no_autocast(update):
        flat, flat_initial = update.flatten(2), torch.stack(initial, dim=1).flatten(2)
        final = coefficients.final @ flat + coefficients.initial_final @ flat_initial
        weights = coefficient_product(coefficients.steps, flat) + coefficients.initial_steps @ flat_initial
    return weights.view_as(update), [*final.unflatten(2, update.shape[2:]).unbind(1)]


ProbedLoss = Callable[[Callable[[str, Tensor], Tensor], Weights], tuple[Tensor, Tensor]]
"""Maps a probe and vectors to minus the loss, and the losses of rows. `probe(name, product)` returns the product to
continue with; gradients are taken with respect to it."""


def _gradients_of_products(fn: ProbedLoss, vectors: Weights) -> tuple[Weights, Weights, Tensor]:
    """Gradients of `fn` by its products and by `vectors`, which can be differentiated again; and losses."""
    products: Weights = {}

    def probe(name: str, product: Tensor) -> Tensor:
        products[name] = product if product.requires_grad else product.requires_grad_()
        return product

    vectors = {name: v if v.requires_grad else v.detach().requires_grad_() for name, v in vectors.items()}
    total, losses = fn(probe, vectors)
    gradients = iter(torch.autograd.grad(total, [*products.values(), *vectors.values()], create_graph=True))
    return dict(zip(products, gradients)), dict(zip(vectors, gradients)), losses


def _gradients_of_added_zeros(fn: ProbedLoss, vectors: Weights, zeros: Weights) -> tuple[Weights, Weights, Tensor]:
    """The same as a pure function, which the compiler can trace and which needs no surrounding graph: a zero is added
    to every product, and the gradient with respect to the zero is that with respect to the product."""

    def of_zeros(zeros: Weights, vectors: Weights) -> tuple[Tensor, Tensor]:
        return fn(lambda name, product: product + zeros[name], vectors)

    (deltas, of_vectors), losses = transformed(grad, of_zeros, argnums=(0, 1), has_aux=True)(zeros, vectors)
    return deltas, of_vectors, losses


def _batched(loss_fn: LossFn, axes: int) -> LossFn:
    """`loss_fn` for tensors with this many axes in front; the default loss takes any number."""
    if loss_fn is default_loss_fn:
        return loss_fn
    for _ in range(axes):
        loss_fn = transformed(vmap, loss_fn, randomness='different')
    return loss_fn


def _parameter_names(network: Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in network.named_parameters()}


def _vectors(network: Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.ndim == 1]
