"""Reference implementation of a neural memory: one loop over chunks, to be read beside the paper (arXiv 2501.00663).

Everything faster is tested against it. `surprise` computes S, the update of the weights; the dense backend, spectral
norm with momentum of several orders, and decoding steps call it too. The paper takes the gradient of a chunk at the
newest weights. Here it is taken at the base weights, which are the newest ones if a memory batch is a single chunk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import Module

from titans_pytorch.memory.chunks import Chunks, UpdateGates, WeightResidual, beside, scaled
from titans_pytorch.memory.fast_weights import MemoryWeights, Weights
from titans_pytorch.memory.soft_clamp import soft_clamp_norm
from titans_pytorch.ops.newton_schulz import newton_schulz
from titans_pytorch.ops.proximal_steps import proximal_deltas, proximal_vector
from titans_pytorch.utils.functional import call_with_weights, transformed
from titans_pytorch.utils.shapes import Float

LossFn = Callable[[Tensor, Tensor], Tensor]
"""Maps predictions and targets, both (m, d), to a loss for each row, (m,)."""

Recurrence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps gates g, inputs x and an initial state to g · initial + x; for several chunks to h_c = g_c · h_{c−1} + x_c."""


class Transition(NamedTuple):
    """The end of a memory batch: maps the weights after it to the weights before the next one."""

    share: Tensor | None = None
    """Share of the way from the base weights to the newest ones, at which both are then set. `None`: all the way."""
    lookahead: bool = False
    """Take gradients at W + Σ P, where normalised momentum P, summed over orders, leads the newest weights W, as in
    Nesterov's momentum. Gradients at W ask in every memory batch for what momentum already holds."""

    def __call__(self, weights: MemoryWeights) -> MemoryWeights:
        base, newest, momentum = weights
        if self.lookahead:
            ahead = {name: sum(momentum[name].unbind(), w) for name, w in newest.items()}
            return MemoryWeights(ahead, newest, momentum)
        if self.share is None:
            return MemoryWeights(newest, newest, momentum)
        moved = {name: w.lerp(newest[name], self.share.to(w.dtype)) for name, w in base.items()}
        return MemoryWeights(moved, moved, momentum)


def default_loss_fn(pred: Float[Tensor, '... d'], target: Float[Tensor, '... d']) -> Float[Tensor, ...]:
    """‖M(k) − v‖², averaged over features (Titans eq. 12)."""
    return (pred - target).pow(2).mean(dim=-1)


def store_and_retrieve(
    network: Module,
    loss_fn: LossFn,
    queries: Float[Tensor, 'bh t d'],
    chunks: Chunks,
    weights: MemoryWeights,
    *,
    chunk_size: int,
    batch_size: int | None,
    transition: Transition,
    max_grad_norm: float | None = None,
    spectral_norm: bool = False,
    residual: WeightResidual | None = None,
    leading: int = 0,
    num_proximal_steps: int | None = None,
) -> tuple[Float[Tensor, 'bh t d'], MemoryWeights, Float[Tensor, 'bh n m']]:
    """Store the chunks of a sequence, from its first token on, and retrieve values for its queries.

    Args:
        network: the memory network M, called with weights in place of its own.
        queries: one for each token.
        chunks: the complete chunks of these tokens.
        weights: the weights before the first token.
        transition: what happens at the end of a memory batch.
        residual: weights of another memory; a share of them is added before gradients are taken.
        leading: padding rows in front of the first query that count towards the first group: 1 if the network mixes
            rows, because the first group otherwise has one row fewer than a chunk.
        num_proximal_steps: number of steps that add up at the same weights, if steps are proximal.

    Returns:
        the retrieved values, the weights after the last token, and the losses of the rows stored, unweighted.
    """
    gradient = transformed(vmap, gradient_of_chunk(network, loss_fn, num_proximal_steps), randomness='different')
    base, newest, momentum = weights
    retrieved, losses = [], []
    for step, rows in groupby(range(queries.shape[1]), key=lambda row: (row - leading + 1) // chunk_size):
        if step > 0:
            # chunk step − 1 is complete
            chunk = chunks.at(step - 1)
            at = base if residual is None else {name: w + residual.steps(name)[:, step - 1] for name, w in base.items()}
            gradients, loss = gradient(at, chunk.keys, chunk.values, chunk.step_sizes)
            losses.append(loss)

            # Titans eq. 10, then eq. 13: M_t = (1 − α_t) M_{t−1} + S_t
            gates = chunk.update_gates()
            surprises, orders = surprise(gradients, gates, momentum, one_chunk, max_grad_norm, spectral_norm)
            newest = {name: one_chunk(gates.retention, surprises[name], w) for name, w in newest.items()}
            momentum = {name: torch.stack(by_order) for name, by_order in orders.items()}
            if batch_size is not None and step * chunk_size % batch_size == 0:
                base, newest, _ = transition(MemoryWeights(base, newest, momentum))
        retrieved.append(apply_network(network, newest, queries[:, [*rows]]))
    return (
        torch.cat(retrieved, dim=1),
        MemoryWeights(base, newest, momentum),
        torch.stack(losses, dim=1) if losses else chunks.step_sizes,
    )


def apply_network(network: Module, weights: Weights, rows: Float[Tensor, 'bh m d']) -> Float[Tensor, 'bh m d']:
    """Apply a memory network to rows; each batch entry and head has its own weights, (bh, …)."""

    def forward(weights: Weights, rows: Tensor) -> Tensor:
        return call_with_weights(network, weights, rows)

    return transformed(vmap, forward, randomness='different')(weights, rows)


def gradient_of_chunk(
    network: Module, loss_fn: LossFn, num_proximal_steps: int | None = None
) -> Callable[..., tuple[Weights, Float[Tensor, ' m']]]:
    """A function of the weights, keys, values and step sizes of one chunk. It returns minus the gradient of the chunk's
    loss, taken at the weights or where a proximal step leads, and the unweighted loss of each row."""
    if num_proximal_steps is not None:
        return partial(_proximal_gradient, network, loss_fn, num_proximal_steps)

    def negative_loss(weights: Weights, keys: Tensor, values: Tensor, step_sizes: Tensor) -> tuple[Tensor, Tensor]:
        # Titans eq. 12, the associative memory loss: ‖M(k) − v‖², weighted by θ
        losses = loss_fn(call_with_weights(network, weights, keys), values)
        return -(losses * step_sizes).sum(), losses

    return grad(negative_loss, has_aux=True)


def _proximal_gradient(
    network: Module,
    loss_fn: LossFn,
    num_steps: int,
    weights: Weights,
    keys: Float[Tensor, 'm d'],
    values: Float[Tensor, 'm d'],
    step_sizes: Float[Tensor, ' m'],
) -> tuple[Weights, Float[Tensor, ' m']]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}

    def negative_loss(added: Weights, vectors: Weights) -> tuple[Tensor, tuple[Tensor, Weights]]:
        inputs: Weights = {}

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            name = names.get(id(weight))
            if name is None:  # a constant of the network
                return x @ weight
            inputs[name] = x
            return x @ weights[name] + added[name]

        losses = loss_fn(call_with_weights(network, vectors, keys, linear=linear), values)
        return -(losses * step_sizes).sum(), (losses, inputs)

    # the gradient with respect to a product equals the gradient with respect to zeros added to it
    zeros = {name: keys.new_zeros(len(keys), w.shape[-1]) for name, w in weights.items() if w.ndim > 1}
    vectors = {name: w for name, w in weights.items() if w.ndim == 1}
    (deltas, of_vectors), (losses, inputs) = grad(negative_loss, argnums=(0, 1), has_aux=True)(zeros, vectors)
    common = (step_sizes, losses, num_steps)
    gradients = {name: proximal_vector(own, *common) for name, own in of_vectors.items()}
    gradients |= {name: x.mT @ proximal_deltas(x, deltas[name], *common) for name, x in inputs.items()}
    return {name: gradients[name] for name in weights}, losses


def one_chunk(gates: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
    """`Recurrence` for a single chunk."""
    return torch.addcmul(inputs, beside(gates, initial), initial)


def surprise(
    gradients: Weights,
    gates: UpdateGates,
    momentum: Weights,
    recurrence: Recurrence,
    max_grad_norm: float | None = None,
    spectral_norm: bool = False,
) -> tuple[Weights, dict[str, list[Tensor]]]:
    """The update S of the weights, from negative gradients and the momentum before them, (o, bh, …).

    Titans eq. 10, S_t = η_t S_{t−1} + u_t with u_t = −θ_t ∇ℓ_t; the gradients already include θ. Each order of momentum
    is the input of the next. Normalised momentum is S_t = (1 − η_t) (P_{t−1} + u_t) with P_t = η_t (P_{t−1} + u_t);
    over time, each u then counts once in total, whatever the gates.

    Returns:
        S for each parameter, and the momentum of each order; without momentum, no orders.
    """
    batch_axes = gates.retention.ndim
    updates: Weights = {}
    new_momentum: dict[str, list[Tensor]] = {}
    for index, (name, gradient) in enumerate(gradients.items()):
        if max_grad_norm is not None:
            gradient = soft_clamp_norm(gradient, max_grad_norm, batch_axes)
        surprises = [gradient if gates.modulation is None else scaled(gates.modulation[index], gradient)]
        orders: list[Tensor] = []
        for order, (gate, initial) in enumerate(zip(gates.momentum, momentum.get(name, ()))):
            if gates.momentum_shares is None:
                orders.append(recurrence(gate, surprises[-1], initial))
                surprises.append(orders[-1])
            else:
                # an order hands on a share of all that it holds, its input included, and carries over only the rest
                orders.append(recurrence(gate, scaled(gate, surprises[-1]), initial))
                held = surprises[-1] + _before(orders[-1], initial)
                surprises.append(scaled(gates.momentum_shares[order], held))
        if gates.momentum:
            new_momentum[name] = orders
        updates[name] = surprises[-1] if gates.momentum_mix is None else _mixed(surprises, gates.momentum_mix)
    if spectral_norm:
        updates |= _orthogonalised({name: update for name, update in updates.items() if update.ndim > batch_axes + 1})
    return updates, new_momentum


def _before(states: Tensor, initial: Tensor) -> Tensor:
    """The state before each chunk, from the states after; for one chunk, without an axis of chunks, it is `initial`."""
    if states.ndim == initial.ndim:
        return initial
    return torch.cat((initial.unsqueeze(1), states[:, :-1]), dim=1)


def _mixed(surprises: list[Tensor], mix: Sequence[Tensor]) -> Tensor:
    # with one weight more than there are orders, the surprise itself takes part
    terms = [scaled(share.to(order.dtype), order) for share, order in zip(mix, surprises[-len(mix) :])]
    return sum(terms[1:], terms[0])


def _orthogonalised(matrices: Weights) -> Weights:
    """Orthogonalise matrices by Newton–Schulz; those of equal shape, possibly after transposition, share one call."""
    by_shape: defaultdict[torch.Size, list[str]] = defaultdict(list)
    wide = {name: m if m.shape[-2] <= m.shape[-1] else m.mT for name, m in matrices.items()}
    for name, m in wide.items():
        by_shape[m.shape].append(name)
    orthogonal: Weights = {}
    for names in by_shape.values():
        stacked = torch.stack([wide[name] for name in names])
        orthogonal |= zip(names, newton_schulz(stacked).to(stacked.dtype).unbind(0))
    return {name: orthogonal[name] if wide[name] is m else orthogonal[name].mT for name, m in matrices.items()}
