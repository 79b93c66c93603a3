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

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from titans_pytorch.utils.shapes import Float

ROWS_IN_CACHE = 2048

Weights = dict[str, Tensor]
"""Per parameter of the memory network, by name."""


class Factors(NamedTuple):
    """What one matrix keeps of a run in which t rows were stored."""

    starts: list[Float[Tensor, 'bh d e']]
    inputs: Float[Tensor, 'bh t d']
    errors: Float[Tensor, 'bh t e']


class Piece(NamedTuple):
    """The weights over one run of n chunks, each parameter either dense or factored."""

    dense: Weights
    """Before each chunk, (bh, n, …)."""
    mix: Float[Tensor, 'bh n n'] | None
    """Of each chunk's X Δ, in the matrices before each chunk."""
    shares: Float[Tensor, 'bh n k'] | None
    """Of each start."""
    factors: dict[str, Factors]
    end: Weights
    """Every parameter after the last chunk, (bh, …)."""


class Stretch(NamedTuple):
    """The weights over several runs, stored at once."""

    dense: Weights
    """Before each chunk of all runs."""
    runs: Runs
    end: Weights
    """Every parameter after the last run."""


class Runs(NamedTuple):
    """The factored matrices over r runs of n steps each, all steps but the one after the last chunk."""

    mix: Float[Tensor, 'bh r n n']
    shares: Float[Tensor, 'bh r n k']
    matrices: dict[str, tuple[Float[Tensor, 'bh r k d e'], Float[Tensor, 'bh r t d'], Float[Tensor, 'bh r t e']]]
    """Starts, inputs and errors."""

    @classmethod
    def of(cls, pieces: list[Piece]) -> Runs:
        """Pieces of one length, in a row."""
        matrices = {}
        for name in pieces[0].factors:
            starts, inputs, errors = zip(*(piece.factors[name] for piece in pieces))
            together = torch.stack([start for own in starts for start in own], dim=1)
            matrices[name] = (
                together.unflatten(1, (len(pieces), -1)),
                torch.stack(inputs, dim=1),
                torch.stack(errors, dim=1),
            )
        mix, shares = (torch.stack(parts, dim=1) for parts in zip(*((p.mix, p.shares) for p in pieces)))
        return cls(mix, shares, matrices)

    @property
    def num_steps(self) -> int:
        return self.mix.shape[1] * self.mix.shape[2]

    def linear(self, name: str, x: Float[Tensor, 'bh n c d']) -> Float[Tensor, 'bh n c e']:
        """Rows of every step through that step's matrix."""
        batch, runs, n, _ = self.mix.shape
        mix, shares, starts, inputs, errors = (t.flatten(0, 1) for t in (*self[:2], *self.matrices[name]))
        x = x.unflatten(1, (runs, n)).flatten(0, 1)

        out = _shared_linear(x, shares, starts)
        if n > 1:  # nothing is stored before step 0
            # the same for all rows of a chunk; written out, as products over so short an axis are slow on a CPU
            of_rows = mix.unsqueeze(-1).expand(-1, -1, -1, inputs.shape[1] // n).flatten(2)
            scores = (x.flatten(1, 2) @ inputs.mT).unflatten(1, x.shape[1:3]) * of_rows.unsqueeze(2)
            out = torch.baddbmm(out, scores.flatten(1, 2), errors)
        return out.view(batch, runs * n, -1, errors.shape[-1])

    def materialise(self, name: str) -> Float[Tensor, 'bh n d e']:
        starts, inputs, errors = self.matrices[name]
        chunks = (self.mix.shape[2], -1)
        changes = inputs.unflatten(2, chunks).mT @ errors.unflatten(2, chunks)
        weights = torch.einsum('brij, brjde -> bride', self.mix.to(changes.dtype), changes)
        return (weights + torch.einsum('brik, brkde -> bride', self.shares, starts)).flatten(1, 2)


def _shared_linear(
    x: Float[Tensor, 'b n c d'], shares: Float[Tensor, 'b n k'], starts: Float[Tensor, 'b k d e']
) -> Float[Tensor, 'b nc e']:
    """Rows times Σ_k share_k · start_k, never formed: the shares go to `x` or to the products, whichever is shorter."""
    shares = shares.to(x.dtype)
    if starts.shape[2] <= starts.shape[3]:
        shared = x.unsqueeze(3) * shares[:, :, None, :, None]
        return shared.flatten(3).flatten(1, 2) @ starts.flatten(1, 2)

    rows = x.flatten(1, 2)
    products = ((rows @ start).view(*x.shape[:3], -1) for start in starts.unbind(1))
    parts = [product * share[:, :, None, None] for product, share in zip(products, shares.unbind(2))]
    return sum(parts[1:], parts[0]).flatten(1, 2)


def _runs(pieces: Sequence[Piece | Stretch]) -> Iterator[Runs]:
    """Neighbours of one length, which are applied together; on a CPU so many that they stay in its cache."""

    def length(piece: Piece | Stretch) -> int:
        return 0 if isinstance(piece, Stretch) else _rows(piece).shape[1]

    for _, same in groupby(pieces, key=length):
        group: list[Piece] = []
        for piece in same:
            if isinstance(piece, Stretch):
                yield piece.runs
            else:
                group.append(piece)
        if not group:
            continue
        rows = _rows(group[0])
        at_once = len(group) if rows.is_cuda else max(1, ROWS_IN_CACHE // max(1, len(rows) * rows.shape[1]))
        for start in range(0, len(group), at_once):
            yield Runs.of(group[start : start + at_once])


def _rows(piece: Piece) -> Float[Tensor, 'bh t d']:
    return next(iter(piece.factors.values())).inputs


def times(x: Float[Tensor, 'bh n c d'], weights: Float[Tensor, 'bh n d e']) -> Float[Tensor, 'bh n c e']:
    # autocast makes them alike; without it they may be weights over time that were stored under autocast
    return x @ (weights if torch.is_autocast_enabled(x.device.type) else weights.to(x.dtype))


def _in_a_row(pieces: list[Float[Tensor, 'bh _n ...']], end: Float[Tensor, 'bh ...']) -> Float[Tensor, 'bh n ...']:
    end = end.unsqueeze(1)
    return torch.cat([*pieces, end.to(pieces[0].dtype)], dim=1) if pieces else end


class FastWeights(Mapping[str, Tensor]):
    """A memory network's weights over time.

    As a mapping it gives every parameter for every step, (bh, chunks + 1, …), materialised when it is asked for;
    methods of TensorDict work on it in the same way.
    """

    def __init__(self, dense: Weights, runs: list[Runs], end: Weights):
        self.dense = dense
        self.runs = runs
        self.end = end

    @classmethod
    def of(cls, tensors: Weights) -> FastWeights:
        """All dense: every parameter (bh, chunks + 1, …)."""
        return cls(tensors, [], {name: w[:, -1] for name, w in tensors.items()})

    @classmethod
    def joined(cls, pieces: Sequence[Piece | Stretch], end: Weights) -> FastWeights:
        """Pieces one after the other, each beginning where the one before ended, and `end` after the last."""
        held_dense = pieces[0].dense.keys() if pieces else end.keys()
        runs = [*_runs(pieces)] if held_dense != end.keys() else []
        dense = {name: _in_a_row([piece.dense[name] for piece in pieces], end[name]) for name in held_dense}
        return cls(dense, runs, end)

    @property
    def num_steps(self) -> int:
        for name in self.dense:
            return self.dense[name].shape[1]
        return sum(run.num_steps for run in self.runs) + 1

    def steps(self, name: str, first: int, length: int) -> Float[Tensor, 'bh n ...']:
        """Materialised steps `first` to `first + length`; the last one stays in force beyond the end."""
        weights = self[name]
        if isinstance(length, torch.SymInt):  # of an exported program, whose one graph serves all lengths
            steps = torch.arange(first, first + length, device=weights.device)
            return weights.index_select(1, steps.clamp(max=weights.shape[1] - 1))
        if first + length <= weights.shape[1]:
            return weights[:, first : first + length]
        last = weights.shape[1] - 1
        return weights[:, [min(step, last) for step in range(first, first + length)]]

    def linear(self, name: str, x: Float[Tensor, 'bh n c d'], first: int) -> Float[Tensor, 'bh n c e']:
        """Group k of the rows `x` times the matrix of step `first + k`."""
        if name in self.dense:
            return times(x, self.steps(name, first, x.shape[1]))

        out, start, stop = [], 0, first + x.shape[1]
        for run in self.runs:
            end = start + run.num_steps
            low, high = max(first, start), min(stop, end)
            if low < high:
                rows = x[:, low - first : high - first]
                if (low, high) != (start, end):  # runs are applied as a whole
                    rows = F.pad(rows, (0, 0, 0, 0, low - start, end - high))
                out.append(run.linear(name, rows)[:, low - start : high - start])
            start = end
        if stop > start:
            out.append(x[:, max(start - first, 0) :] @ self.end[name].unsqueeze(1))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def lengths(self, first: int, length: int) -> list[int]:
        """`length` steps from `first` on, as the lengths of what is best read at once: each group of runs."""
        lengths: list[int] = []
        start = 0
        for run in self.runs[:-1]:
            start += run.num_steps
            if first < start < first + length:
                lengths.append(start - first - sum(lengths))
        return [*lengths, length - sum(lengths)]

    # as a mapping

    def __getitem__(self, name: str) -> Float[Tensor, 'bh n ...']:
        if name in self.dense:
            return self.dense[name]
        parts = [run.materialise(name) for run in self.runs]
        return torch.cat([*parts, self.end[name].unsqueeze(1)], dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.end)

    def __len__(self) -> int:
        return len(self.end)

    def to_dict(self) -> Weights:
        return {name: self[name] for name in self}

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_') or name in ('dense', 'runs', 'end'):
            raise AttributeError(name)
        return getattr(TensorDict(self.to_dict()), name)


# detaching and moving a state reaches the tensors inside
pytree.register_pytree_node(
    FastWeights,
    lambda weights: ([weights.dense, weights.runs, weights.end], None),
    lambda children, _: FastWeights(*children),
    serialized_type_name='titans_pytorch.FastWeights',
    flatten_with_keys_fn=lambda weights: (
        [(pytree.GetAttrKey(name), getattr(weights, name)) for name in ('dense', 'runs', 'end')],
        None,
    ),
)
