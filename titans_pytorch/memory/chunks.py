"""Chunks as a memory stores them: keys, values and gates, and a share of another memory's weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor

from titans_pytorch.memory.fast_weights import FastWeights, Weights
from titans_pytorch.ops.grouped_linear import grouped_linear
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Bool, Float


class Chunks(NamedTuple):
    """Keys, values and gates of consecutive chunks."""

    keys: Float[Tensor, 'bh n m d']
    values: Float[Tensor, 'bh n m d']
    step_sizes: Float[Tensor, 'bh n m']
    """θ, the weight of each row's loss; 0 for rows that are not stored."""
    decay_logits: Float[Tensor, 'bh n']
    """Logits of α, the share of the memory that is forgotten."""
    momentum_logits: Float[Tensor, 'bh n o'] | None
    """Logits of η, the share of the past surprise that is carried over, for each order of momentum."""
    momentum_mix: Float[Tensor, 'bh n o'] | Float[Tensor, 'bh n o+1'] | None
    """Weights that combine the orders. If there is one more weight than there are orders, the surprise itself takes
    part. `None`: only the last order counts."""
    modulation: Float[Tensor, 'bh n w'] | None
    """Factors on the update of each parameter."""
    momentum_shares: Float[Tensor, 'bh n o'] | None = None
    """1 − η, the share that each order hands on of what it holds; `None`: momentum is not normalised."""
    resets: Bool[Tensor, 'bh n'] | None = None
    """True for chunks after which the memory begins anew, with its initial weights and without momentum."""

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and step sizes."""
        return self.keys, self.values, self.step_sizes

    def split(self, lengths: list[int]) -> list[Chunks]:
        """The chunks in blocks of these lengths."""
        return [Chunks(*block) for block in zip(*_split(self, lengths))]

    def at(self, index: int) -> Chunks:
        """A single chunk, without the axis of chunks."""
        fields: Any = (None if t is None else t[:, index] for t in self)
        return Chunks(*fields)

    def update_gates(self) -> UpdateGates:
        """The gates of each chunk's update, as factors."""
        retention = (-at_least_float32(self.decay_logits)).sigmoid()
        momentum: Sequence[Tensor] = ()
        if self.momentum_logits is not None:
            momentum = at_least_float32(self.momentum_logits).sigmoid().unbind(-1)
        optional = (self.momentum_mix, self.modulation, self.momentum_shares)
        return UpdateGates(retention, momentum, *(None if gates is None else gates.unbind(-1) for gates in optional))


class UpdateGates(NamedTuple):
    """Gates of the update, (bh,) each for one chunk, or (bh, n) for consecutive chunks."""

    retention: Tensor
    """1 − α"""
    momentum: Sequence[Tensor]
    """η of each order; empty without momentum."""
    momentum_mix: Sequence[Tensor] | None
    modulation: Sequence[Tensor] | None
    momentum_shares: Sequence[Tensor] | None = None


def _split(tensors: Iterable[Tensor | None], lengths: list[int]) -> list[Sequence[Any]]:
    if len(lengths) == 1:
        return [[t] for t in tensors]
    # not by slices: each slice's gradient would be as long as the whole tensor
    return [[None] * len(lengths) if t is None else t.split(lengths, dim=1) for t in tensors]


class WeightResidual(NamedTuple):
    """Another memory's weights; a learned share of them is added to the base weights before gradients are taken."""

    weights: FastWeights
    dense: Weights
    """The weights that are held densely, before each chunk, (bh, n, …)."""
    shares: Float[Tensor, 'bh n']
    first_step: int
    """Step of `weights` that corresponds to the first chunk."""

    @classmethod
    def of(cls, weights: FastWeights, shares: Float[Tensor, 'bh n'], first_step: int) -> WeightResidual:
        """Weight residual of consecutive chunks."""
        dense = {name: weights.steps(name, first_step, shares.shape[1]) for name in weights.dense}
        return cls(weights, dense, shares, first_step)

    def split(self, lengths: list[int]) -> list[WeightResidual]:
        """The weight residual in blocks of these lengths."""
        dense = {name: w.split(lengths, dim=1) for name, w in self.dense.items()}
        first_steps = accumulate(lengths[:-1], initial=self.first_step)
        return [
            WeightResidual(self.weights, {name: parts[index] for name, parts in dense.items()}, shares, first_step)
            for index, (shares, first_step) in enumerate(zip(self.shares.split(lengths, dim=1), first_steps))
        ]

    def steps(self, name: str) -> Float[Tensor, 'bh n ...']:
        """The share of a parameter that is added before each chunk."""
        w = self.dense.get(name)
        return scaled(self.shares, self.weights.steps(name, self.first_step, self.shares.shape[1]) if w is None else w)

    def linear(self, name: str, x: Float[Tensor, 'bh n m d']) -> Float[Tensor, 'bh n m e']:
        """Multiply the rows of each chunk by the share of a matrix that is added before that chunk."""
        in_dense = name in self.dense
        out = grouped_linear(x, self.dense[name]) if in_dense else self.weights.linear(name, x, self.first_step)
        return scaled(self.shares, out)


def split_inputs(
    chunks: Chunks, residual: WeightResidual | None, lengths: list[int]
) -> list[tuple[Chunks, WeightResidual | None]]:
    """Chunks and their weight residual, in blocks of these lengths."""
    residuals = [None] * len(lengths) if residual is None else residual.split(lengths)
    return [*zip(chunks.split(lengths), residuals)]


def beside(factors: Tensor, tensors: Tensor) -> Tensor:
    """`factors` with axes of length 1 appended, to broadcast against `tensors`, which begin with the same axes."""
    return factors.reshape(*factors.shape, *(1,) * (tensors.ndim - factors.ndim))


def scaled(factors: Tensor, tensors: Tensor) -> Tensor:
    """Multiply tensors by factors that have only their first axes."""
    # a plain product, because einsum would lower its precision under autocast
    return tensors * beside(factors, tensors)
