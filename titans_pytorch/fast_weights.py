"""Weights that change over time, as one object: apply them to rows, take the last ones, materialise them on request.

A step is a set of weights that some tokens read: step 0 before the first chunk of a call, step k after k chunks. A
parameter is held either dense, a tensor for every step, or factored. The factored form needs no matrix per step:
within a run of n chunks, chunk j changed a matrix by X_jᵀ Δ_j (rows that it saw, and errors of what it gave for them),
and step i is

    W_i = Σ_k share[i, k] · start_k + Σ_{j<i} mix[i, j] · X_jᵀ Δ_j

with the weights and the momentum at the start of the run as start_k, so that x W_i is attention without a softmax,

    x W_i = Σ_k share[i, k] · x start_k + ((x Xᵀ) ∘ mix[i]) Δ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from titans_pytorch.shapes import Float

Weights = dict[str, Tensor]
"""Per parameter of the memory network, by name."""


class Factored(NamedTuple):
    """One matrix over r runs of n steps each, all steps but the one after the last chunk."""

    mix: Float[Tensor, 'bh r n n']
    shares: Float[Tensor, 'bh r n k']
    starts: Float[Tensor, 'bh r k d e']
    inputs: Float[Tensor, 'bh r n m d']
    errors: Float[Tensor, 'bh r n m e']

    @property
    def num_steps(self) -> int:
        return self.mix.shape[1] * self.mix.shape[2]

    def linear(self, x: Float[Tensor, 'bh n c d']) -> Float[Tensor, 'bh n c e']:
        """Rows of every step through that step's matrix."""
        batch, runs, n, _ = self.mix.shape
        c, dim_out = x.shape[2], self.errors.shape[-1]
        mix, shares, starts, inputs, errors = (t.flatten(0, 1) for t in self)
        x = x.unflatten(1, (runs, n)).flatten(0, 1)

        # all starts in one product, their shares on the rows
        shared = torch.einsum('bncd, bnk -> bnckd', x, shares.to(x.dtype)).flatten(3).flatten(1, 2)
        out = shared @ starts.flatten(1, 2)
        if n > 1:  # nothing is stored before step 0
            scores = x.flatten(1, 2) @ inputs.flatten(1, 2).mT
            scores = scores.view(-1, n, c, n, inputs.shape[2]) * mix[:, :, None, :, None]
            out = out + scores.flatten(3).flatten(1, 2) @ errors.flatten(1, 2)
        return out.view(batch, runs * n, c, dim_out)

    def materialise(self) -> Float[Tensor, 'bh n d e']:
        changes = self.inputs.mT @ self.errors
        weights = torch.einsum('brij, brjde -> bride', self.mix.to(changes.dtype), changes)
        return (weights + torch.einsum('brik, brkde -> bride', self.shares, self.starts)).flatten(1, 2)


class FastWeights(Mapping[str, Tensor]):
    """A memory network's weights over time.

    As a mapping it gives every parameter for every step, (bh, chunks + 1, …), materialised when it is asked for;
    methods of TensorDict work on it in the same way.
    """

    def __init__(self, dense: Weights, factored: dict[str, list[Factored]], end: Weights):
        self.dense = dense
        self.factored = factored
        self.end = end

    @classmethod
    def of(cls, tensors: Weights) -> FastWeights:
        """All dense: every parameter (bh, chunks + 1, …)."""
        return cls(tensors, {}, {name: w[:, -1] for name, w in tensors.items()})

    @classmethod
    def joined(cls, runs: list[FastWeights], end: Weights) -> FastWeights:
        """Runs one after the other, each beginning where the one before ended, and `end` after the last."""
        factored = {
            name: _batched([f for run in runs for f in run.factored[name]])
            for name in (runs[0].factored if runs else ())
        }
        dense = {
            name: torch.cat([*(run.dense[name][:, :-1] for run in runs), w.unsqueeze(1)], dim=1)
            for name, w in end.items()
            if name not in factored
        }
        return cls(dense, factored, end)

    @property
    def num_steps(self) -> int:
        for name in self.dense:
            return self.dense[name].shape[1]
        for pieces in self.factored.values():
            return sum(piece.num_steps for piece in pieces) + 1
        raise AssertionError('a memory network has parameters')

    def steps(self, name: str, first: int, length: int) -> Float[Tensor, 'bh n ...']:
        """Materialised steps `first` to `first + length`; the last one stays in force beyond the end."""
        weights = self[name]
        if first + length <= weights.shape[1]:
            return weights[:, first : first + length]
        last = weights.shape[1] - 1
        return weights[:, [min(step, last) for step in range(first, first + length)]]

    def linear(self, name: str, x: Float[Tensor, 'bh n c d'], first: int) -> Float[Tensor, 'bh n c e']:
        """Group k of the rows `x` times the matrix of step `first + k`."""
        if name in self.dense:
            return x @ self.steps(name, first, x.shape[1])

        out, start, stop = [], 0, first + x.shape[1]
        for piece in self.factored[name]:
            end = start + piece.num_steps
            low, high = max(first, start), min(stop, end)
            if low < high:
                rows = x[:, low - first : high - first]
                if (low, high) != (start, end):  # a piece is applied as a whole
                    rows = F.pad(rows, (0, 0, 0, 0, low - start, end - high))
                out.append(piece.linear(rows)[:, low - start : high - start])
            start = end
        if stop > start:
            out.append(x[:, max(start - first, 0) :] @ self.end[name].unsqueeze(1))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    # as a mapping

    def __getitem__(self, name: str) -> Float[Tensor, 'bh n ...']:
        if name in self.dense:
            return self.dense[name]
        pieces = [piece.materialise() for piece in self.factored[name]]
        return torch.cat([*pieces, self.end[name].unsqueeze(1)], dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.end)

    def __len__(self) -> int:
        return len(self.end)

    def to_dict(self) -> Weights:
        return {name: self[name] for name in self}

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_') or name in ('dense', 'factored', 'end'):
            raise AttributeError(name)
        return getattr(TensorDict(self.to_dict()), name)


def _batched(pieces: list[Factored]) -> list[Factored]:
    """Neighbours of equal length as one piece, so that they are applied together."""
    groups: list[list[Factored]] = []
    for piece in pieces:
        if groups and groups[-1][0].mix.shape[2:] == piece.mix.shape[2:]:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [g[0] if len(g) == 1 else Factored(*(torch.cat(tensors, dim=1) for tensors in zip(*g))) for g in groups]


# detaching and moving a state reaches the tensors inside
pytree.register_pytree_node(
    FastWeights,
    lambda weights: ([weights.dense, weights.factored, weights.end], None),
    lambda children, _: FastWeights(*children),
)
