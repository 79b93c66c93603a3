"""The interface of a backend: storing chunks in the weights of a memory network, and retrieving from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Module

from titans_pytorch.memory.chunks import Chunks, WeightResidual, beside
from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights, StoredBatches, StoredBlock, Weights
from titans_pytorch.memory.reference import LossFn, Transition, one_chunk, surprise
from titans_pytorch.memory.schedule import Schedule
from titans_pytorch.memory_models import PlainMLP
from titans_pytorch.ops.associative_scan import AssocScan
from titans_pytorch.ops.proximal_steps import proximal_deltas, proximal_vector
from titans_pytorch.utils.functional import replaced
from titans_pytorch.utils.precision import at_least_float32, no_autocast
from titans_pytorch.utils.shapes import Float, concatenated


class StoreInputs(NamedTuple):
    """Inputs of `Backend.store`."""

    chunks: Chunks
    residual: WeightResidual | None
    schedule: Schedule
    weights: MemoryWeights
    """Weights before the first chunk."""
    transition: Transition
    with_losses: bool = True
    """False if the losses of the rows will not be read."""
    at_rest: bool = False
    """True if the momentum is known to be zero."""
    origin: Weights | None = None
    """Weights with which the memory begins anew after `Chunks.resets`; `None` if there are none."""


class Gradients(NamedTuple):
    """Negative gradients of a block of chunks; gradients of matrices are kept as two factors."""

    inputs: Weights
    """For each matrix, the rows X that it was applied to, (bh, n, m, d)."""
    deltas: Weights
    """For each matrix, Δ = −∂loss / ∂(X W), (bh, n, m, e): minus the gradient of a chunk is Xᵀ Δ."""
    vectors: Weights
    """For each vector, minus its gradient, (bh, n, d)."""
    losses: Float[Tensor, 'bh n m']
    """Losses of the rows, unweighted."""

    def proximal(self, step_sizes: Float[Tensor, 'bh n m'], num_steps: int) -> Gradients:
        """The same factors and vectors for proximal steps."""
        common = (step_sizes, self.losses, num_steps)
        deltas = {name: proximal_deltas(self.inputs[name], own, *common) for name, own in self.deltas.items()}
        vectors = {name: proximal_vector(own, *common) for name, own in self.vectors.items()}
        return replaced(self, deltas=deltas, vectors=vectors)

    def dense(self, name: str) -> Float[Tensor, 'bh n ...']:
        """Form minus the gradient of a parameter."""
        return self.inputs[name].mT @ self.deltas[name] if name in self.inputs else self.vectors[name]

    def formed(self, like: Weights) -> Weights:
        """Form minus the gradients of the parameters `like`, in their precision.

        Products are in at least float32. If they were rounded, the update of a few rows would have more directions than
        rows, and spectral norm makes all directions equally long.
        """
        inputs, deltas = ({name: at_least_float32(t) for name, t in own.items()} for own in (self.inputs, self.deltas))
        raised = replaced(self, inputs=inputs, deltas=deltas)
        with no_autocast(self.losses):
            return {name: raised.dense(name).to(w.dtype) for name, w in like.items()}


class Stored(NamedTuple):
    """Result of storing one block."""

    over_time: StoredBlock | StoredBatches
    momentum: Weights
    """Momentum after the last chunk, (o, bh, …); empty without momentum."""
    losses: Float[Tensor, 'bh n m'] | None
    """‖M(k) − v‖² of each row before it is stored, unweighted: the surprise of the row. `None` if it will not be read
    and would have cost extra time."""


class PreparedBlock(NamedTuple):
    """One block of a call, with everything that storing it needs except the weights."""

    store: Callable[[MemoryWeights], Stored]
    ends_batch: bool


class Backend:
    """Stores chunks in the weights of `network`, and applies the network with weights over time.

    Args:
        network: the memory network, a template whose own weights are not used.
        mlp: the same network if it is a plain MLP.
        loss_fn: the loss that storing minimises.
        scan: solves linear recurrences over chunks.
        max_grad_norm: soft bound on the norm of a gradient.
        spectral_norm: orthogonalise the momentum.
        num_proximal_steps: number of steps that add up at the same weights, if steps are proximal.
    """

    def __init__(
        self,
        network: Module,
        mlp: PlainMLP | None,
        loss_fn: LossFn,
        scan: AssocScan,
        max_grad_norm: float | None,
        spectral_norm: bool,
        num_proximal_steps: int | None = None,
    ):
        self.network = network
        self.mlp = mlp
        self.loss_fn = loss_fn
        self.scan = scan
        self.max_grad_norm = max_grad_norm
        self.spectral_norm = spectral_norm
        self.num_proximal_steps = num_proximal_steps

    def store(self, inputs: StoreInputs) -> tuple[FastWeights, MemoryWeights, Float[Tensor, 'bh n m'] | None]:
        """Store chunks. Return the weights over time, those to continue from, and the losses of rows if requested."""
        if isinstance(inputs.schedule.num_chunks, torch.SymInt):
            refuse_dynamic_length()
        weights = inputs.weights
        stored, losses = [], [torch.zeros_like(inputs.chunks.step_sizes[:, :0])]
        for prepared in self.prepare(inputs):
            block = prepared.store(weights)
            stored.append(block.over_time)
            if block.losses is not None:
                losses.append(block.losses)
            weights = MemoryWeights(weights.base, block.over_time.final, block.momentum)
            if prepared.ends_batch:
                weights = inputs.transition(weights)
        all_losses = concatenated(losses, dim=1) if inputs.with_losses else None
        return FastWeights.joined(stored, weights.newest), weights, all_losses

    def prepare(self, inputs: StoreInputs) -> Iterable[PreparedBlock]:
        """The blocks of a call in order; each is to be stored in the weights that the previous one leaves."""
        raise NotImplementedError

    def over_chunks(self, gates: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
        """`Recurrence` for all chunks of a block; returns its state after each of them."""
        return self.scan(gates.unsqueeze(-1), inputs, prev=initial)

    def retrieve(self, weights: FastWeights, rows: Float[Tensor, 'bh n c d'], first: int) -> Float[Tensor, 'bh n c d']:
        """Apply the network to `rows`; group k reads the weights of step `first + k`."""
        lengths = weights.lengths(first, rows.shape[1])
        if len(lengths) == 1:
            return self.apply_over_time(weights, rows, first)
        first_steps = accumulate(lengths[:-1], initial=first)
        parts = zip(rows.split(lengths, dim=1), first_steps)
        return torch.cat([self.apply_over_time(weights, part, start) for part, start in parts], dim=1)

    def apply_over_time(
        self, weights: FastWeights, rows: Float[Tensor, 'bh n c d'], first: int
    ) -> Float[Tensor, 'bh n c d']:
        """`retrieve` for steps that lie within one factored block."""
        raise NotImplementedError

    # one chunk at a time, as in decoding

    def apply(self, weights: Weights, rows: Float[Tensor, 'bh m d']) -> Float[Tensor, 'bh m d']:
        """Apply the network, with weights (bh, …), to rows."""
        raise NotImplementedError

    def negative_gradients(self, chunk: Chunks, at: Weights) -> tuple[Weights, Float[Tensor, 'bh m']]:
        """Minus the gradient of the loss of a single chunk at weights (bh, …), and the losses of its rows."""
        raise NotImplementedError

    def store_chunk(
        self, chunk: Chunks, weights: MemoryWeights, residual: WeightResidual | None
    ) -> tuple[MemoryWeights, Float[Tensor, 'bh m']]:
        """The weights after storing a single chunk, and the losses of its rows, without a graph.

        Momentum may be updated in place. Weights may not, because another memory may still have to read them.
        """
        with torch.no_grad():
            gates, at = chunk.at(0).update_gates(), weights.base
            if residual is not None:
                shares, previous = residual.shares[:, 0], residual.dense
                at = {name: torch.addcmul(w, beside(shares, w), previous[name][:, 0]) for name, w in at.items()}
            gradients, losses = self.negative_gradients(chunk, at)
            updates, orders = surprise(
                gradients, gates, weights.momentum, one_chunk, self.max_grad_norm, self.spectral_norm
            )
            # Titans eq. 13: M_t = (1 − α_t) M_{t−1} + S_t, with the strides of M, into whose buffer it will be copied
            newest = {
                name: torch.addcmul(updates[name], beside(gates.retention, w), w, out=torch.empty_like(w))
                for name, w in weights.newest.items()
            }
        momentum = {name: stacked(by_order) for name, by_order in orders.items()}
        return MemoryWeights(weights.base, newest, momentum), losses


def final_momentum(orders: dict[str, list[Tensor]]) -> Weights:
    """The momentum after the last chunk, given the momentum after each chunk, (bh, n, …) for each order."""
    # copies, because a state would otherwise keep the momentum after all chunks alive
    return {name: stacked([order[:, -1].clone() for order in by_order]) for name, by_order in orders.items()}


def stacked(orders: list[Tensor]) -> Float[Tensor, 'o bh ...']:
    """The momentum of each order as one tensor, without a copy if there is only one."""
    return orders[0].unsqueeze(0) if len(orders) == 1 else torch.stack(orders)


def weights_of_states(states: list[Tensor], lookahead: bool) -> Tensor:
    """The weights, given state 0 and the momentum of each order; with `lookahead`, state 0 is their sum."""
    ahead, *momentum = states
    return ahead - sum(momentum[1:], momentum[0]) if lookahead else ahead


def refuse_dynamic_length() -> NoReturn:
    raise ValueError(
        "a length that is dynamic in torch.export needs torch.no_grad(), engine='dual', the default loss and a "
        'MemoryMLP: export this for a fixed length'
    )
