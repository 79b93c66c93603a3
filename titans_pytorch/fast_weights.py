"""Weights that change over time: what storing makes of a memory network, and how rows are sent through it.

The engine here is the dense one. It forms a gradient, a momentum and a weight for every chunk, runs the two
recurrences over them as scans, and so serves any memory network; it is the oracle for everything faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import Module

from titans_pytorch.orthogonalize import newton_schulz
from titans_pytorch.recurrence import AssocScan
from titans_pytorch.shapes import Float

Weights = dict[str, Tensor]
"""Per parameter of the memory network, by name."""

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), both (m, d), to one loss a row, (m,)."""


class Chunks(NamedTuple):
    """What a run of chunks asks the memory to learn, and how."""

    keys: Float[Tensor, 'bh n m d']
    values: Float[Tensor, 'bh n m d']
    step_sizes: Float[Tensor, 'bh n m']
    """θ, the weight of a row's loss; 0 where nothing is to be stored."""
    decay: Float[Tensor, 'bh n']
    """Logits of α, the share of the memory forgotten."""
    momentum: Float[Tensor, 'bh n o'] | None
    """Logits of η, the share of the past surprise carried on, for each order."""
    momentum_mix: Float[Tensor, 'bh n o'] | None
    """How the orders combine; one more than `momentum` has if the plain surprise takes part. `None`: the last."""
    modulation: Float[Tensor, 'bh n w'] | None
    """A factor on the update of each parameter."""

    def span(self, start: int, stop: int) -> Chunks:
        """Chunks `start` to `stop`."""
        return Chunks(*(None if t is None else t[:, start:stop] for t in self))  # type: ignore[arg-type]


class FastWeights:
    """A memory network's weights over time, dense: every parameter (bh, n + 1, …), before a run of n chunks and after
    each of them."""

    def __init__(self, tensors: Weights):
        self.tensors = tensors

    @classmethod
    def constant(cls, weights: Weights) -> FastWeights:
        """Weights that nothing has changed yet: n = 0."""
        return cls({name: w.unsqueeze(1) for name, w in weights.items()})

    @classmethod
    def joined(cls, runs: list[FastWeights], end: Weights) -> FastWeights:
        """Runs one after the other, each beginning where the one before ended, and `end` after the last."""
        pieces = {name: [*(run.tensors[name][:, :-1] for run in runs), w.unsqueeze(1)] for name, w in end.items()}
        return cls({name: torch.cat(parts, dim=1) for name, parts in pieces.items()})

    @property
    def num_steps(self) -> int:
        return next(iter(self.tensors.values())).shape[1]

    @property
    def end(self) -> Weights:
        return {name: w[:, -1] for name, w in self.tensors.items()}

    def from_step(self, first: int, length: int) -> FastWeights:
        """`length` steps from `first` on; the last one stays in force beyond the end."""
        if first + length <= self.num_steps:
            return FastWeights({name: w[:, first : first + length] for name, w in self.tensors.items()})
        last = self.num_steps - 1
        steps = [min(step, last) for step in range(first, first + length)]
        return FastWeights({name: w[:, steps] for name, w in self.tensors.items()})

    def scaled(self, factors: Float[Tensor, 'bh n']) -> FastWeights:
        """Each step's weights times a factor."""
        return FastWeights({name: _per_step(factors, w) for name, w in self.tensors.items()})

    def apply(self, model: Module, rows: Float[Tensor, 'bh n c d']) -> Float[Tensor, 'bh n c d']:
        """Group k of `rows` through the network with the weights of step k."""

        def forward(weights: Weights, group: Tensor) -> Tensor:
            return functional_call(model, weights, (group,))

        return vmap(vmap(forward, randomness='different'), randomness='different')(self.tensors, rows)


class Stored(NamedTuple):
    """What storing a run of chunks gives."""

    weights: FastWeights
    momentum: Weights
    """After the last chunk, (o, bh, …); empty without momentum."""
    losses: Float[Tensor, 'bh n m']
    """‖M(k) − v‖² of each row before it is stored, unweighted: how surprising it was."""


class DenseEngine:
    """Stores chunks by gradient descent, one gradient, momentum and weight per chunk (Titans eq. 10, 12, 13)."""

    def __init__(
        self, model: Module, loss_fn: LossFn, scan: AssocScan, max_grad_norm: float | None, spectral_norm: bool
    ):
        self.model = model
        self.loss_fn = loss_fn
        self.scan = scan
        self.max_grad_norm = max_grad_norm
        self.spectral_norm = spectral_norm

    def store(
        self,
        chunks: Chunks,
        base: Weights,
        last: Weights,
        last_momentum: Weights,
        residual: FastWeights | None = None,
    ) -> Stored:
        """Store `chunks`, all gradients at `base` (plus `residual`, step by step), going on from `last` and
        `last_momentum`."""
        gradients, losses = self._gradients(chunks, base, residual)
        weights, momentum = {}, {}

        for index, (name, gradient) in enumerate(gradients.items()):
            if self.max_grad_norm is not None:
                gradient = soft_clamp_norm(gradient, self.max_grad_norm)
            if chunks.modulation is not None:
                gradient = _per_step(chunks.modulation[..., index], gradient)

            update = -gradient
            if chunks.momentum is not None:
                orders = self._momentum(update, chunks.momentum, last_momentum[name])
                momentum[name] = orders[:, :, -1]
                update = _combined(orders, update, chunks.momentum_mix)
            if self.spectral_norm and gradient.ndim > 3:
                update = newton_schulz(update)

            # Titans eq. 13: M_t = (1 − α_t) M_{t−1} + S_t
            keep = (-chunks.decay).sigmoid().unsqueeze(-1)
            weights[name] = self.scan(keep, update, prev=last[name], remove_prev=False)

        return Stored(FastWeights(weights), momentum, losses)

    def _gradients(self, chunks: Chunks, base: Weights, residual: FastWeights | None) -> tuple[Weights, Tensor]:
        """∇ of each chunk's weighted loss: per parameter (bh, n, …); and the unweighted losses (bh, n, m)."""

        def loss(weights: Weights, keys: Tensor, values: Tensor, step_sizes: Tensor) -> tuple[Tensor, Tensor]:
            # Titans eq. 12, the associative memory loss: ‖M(k) − v‖²
            losses = self.loss_fn(functional_call(self.model, weights, (keys,)), values)
            return (losses * step_sizes).sum(), losses

        at, per_chunk = base, None
        if residual is not None:
            at = {name: w.unsqueeze(1) + residual.tensors[name] for name, w in base.items()}
            per_chunk = 0

        gradient = grad(loss, has_aux=True)
        over_chunks = vmap(gradient, in_dims=(per_chunk, 0, 0, 0), randomness='different')
        return vmap(over_chunks, randomness='different')(at, chunks.keys, chunks.values, chunks.step_sizes)

    def _momentum(self, surprise: Tensor, gates: Tensor, last: Tensor) -> Float[Tensor, 'o bh n ...']:
        """Titans eq. 10, S_t = η_t S_{t−1} + u_t, order upon order: each order's momentum is the next one's input."""
        orders = []
        for gate, before in zip(gates.sigmoid().split(1, dim=-1), last):
            surprise = self.scan(gate, surprise, prev=before)
            orders.append(surprise)
        return torch.stack(orders)


def _combined(orders: Tensor, surprise: Tensor, mix: Tensor | None) -> Tensor:
    """The last order, or the learned mixture of all, in which the plain surprise may have a share."""
    if mix is None:
        return orders[-1]
    if mix.shape[-1] > len(orders):
        orders = torch.cat((surprise.unsqueeze(0), orders))
    return torch.einsum('bno, obn... -> bn...', mix, orders)


def soft_clamp_norm(gradients: Float[Tensor, 'bh n ...'], max_norm: float) -> Float[Tensor, 'bh n ...']:
    """Each gradient with its norm x moved to (tanh(2x / max) + 1) · max / 2; a gradient of zero stays zero."""
    if gradients.numel() == 0:
        return gradients
    flat = gradients.flatten(2)
    # where all is zero there is no direction: the norm of 1 keeps value and gradient finite
    is_zero = (flat == 0).all(dim=-1, keepdim=True)
    norm = torch.where(is_zero, torch.ones_like(flat), flat).norm(dim=-1, keepdim=True)
    half = max_norm / 2
    clamped = ((norm / half).tanh() + 1) * half
    return (flat * (clamped / norm)).view_as(gradients)


def _per_step(factors: Float[Tensor, 'bh n'], tensors: Float[Tensor, 'bh n ...']) -> Float[Tensor, 'bh n ...']:
    return torch.einsum('bn, bn... -> bn...', factors, tensors)
