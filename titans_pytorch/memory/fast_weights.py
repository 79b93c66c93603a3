"""A memory network's weights over time: applied to rows, read step by step, or formed on request.

A step is a set of weights that some tokens read: step 0 is before the first chunk of a call, step c after c chunks. A
parameter is held either densely, as a tensor for every step, or factored, without a matrix per step. Within a block of
n chunks, chunk j changes a matrix by X_jᵀ Δ_j, where X_j are the rows that the matrix was applied to and Δ_j the
negative gradients of their products. Step i is then

    W_i = Σ_k initial_steps[i, k] · initial_k + Σ_{j<i} steps[i, j] · X_jᵀ Δ_j

where initial_k are the weights before the block (with look-ahead gradients, the weights plus momentum) and the momentum
before the block. Applying step i to rows x is attention without a softmax:

    x W_i = Σ_k initial_steps[i, k] · x initial_k + ((x Xᵀ) ∘ steps[i]) Δ
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

from titans_pytorch.ops.grouped_linear import grouped_linear
from titans_pytorch.ops.retrieve_sequence import FactoredMatrix, blocks_at_once, factored_linear
from titans_pytorch.utils.precision import no_autocast
from titans_pytorch.utils.shapes import Float, concatenated

Weights = dict[str, Tensor]
"""Tensors by the name of the memory network's parameter."""


class MemoryWeights(NamedTuple):
    """The weights of a memory between two chunks."""

    base: Weights
    """Weights at which gradients are taken, (bh, …), set at the start of the memory batch."""
    newest: Weights
    """Weights after the last chunk, (bh, …)."""
    momentum: Weights
    """Momentum of each order, (o, bh, …); empty without momentum."""


class Factors(NamedTuple):
    """A factored matrix over one block in which t rows were stored."""

    initial: list[Float[Tensor, 'bh d e']]
    inputs: Float[Tensor, 'bh t d']
    deltas: Float[Tensor, 'bh t e']


class StoredBlock(NamedTuple):
    """Weights over a block of n chunks; each parameter is either dense or factored."""

    dense: Weights
    """Weights before each chunk, (bh, n, …)."""
    final: Weights
    """Weights after the last chunk, (bh, …), for every parameter."""
    factors: Mapping[str, Factors] = {}
    steps: Float[Tensor, 'bh n n'] | None = None
    initial_steps: Float[Tensor, 'bh n k'] | None = None


class StoredBatches(NamedTuple):
    """Weights over several memory batches, stored by a single operation."""

    dense: Weights
    """Weights before each chunk of all memory batches."""
    final: Weights
    """Weights after the last chunk, (bh, …), for every parameter."""
    blocks: FactoredBlocks


class FactoredBlocks(NamedTuple):
    """Factored matrices over r blocks of n steps each, without the step after the last chunk."""

    steps: Float[Tensor, 'bh r n n']
    initial_steps: Float[Tensor, 'bh r n k']
    matrices: dict[str, FactoredMatrix]

    @classmethod
    def of(cls, blocks: list[StoredBlock]) -> FactoredBlocks:
        """Join consecutive blocks of one length."""
        matrices = {}
        for name in blocks[0].factors:
            initial, inputs, deltas = zip(*(block.factors[name] for block in blocks))
            stacked = torch.stack([state for own in initial for state in own], dim=1)
            matrices[name] = FactoredMatrix(
                stacked.unflatten(1, (len(blocks), -1)),
                torch.stack(inputs, dim=1),
                torch.stack(deltas, dim=1),
            )
        coefficients = zip(*((block.steps, block.initial_steps) for block in blocks))
        steps, initial_steps = (torch.stack(parts, dim=1) for parts in coefficients)
        return cls(steps, initial_steps, matrices)

    @property
    def num_steps(self) -> int:
        return self.steps.shape[1] * self.steps.shape[2]

    def linear(self, name: str, x: Float[Tensor, 'bh n c d']) -> Float[Tensor, 'bh n c e']:
        """Multiply the rows of every step by that step's matrix."""
        batch, blocks, n, _ = self.steps.shape
        steps, initial_steps, initial, inputs, deltas = (t.flatten(0, 1) for t in (*self[:2], *self.matrices[name]))
        out = factored_linear(x.unflatten(1, (blocks, n)).flatten(0, 1), steps, initial_steps, initial, inputs, deltas)
        return out.view(batch, blocks * n, *out.shape[2:])

    def dense(self, name: str) -> Float[Tensor, 'bh n d e']:
        """Form a matrix before each chunk."""
        initial, inputs, deltas = self.matrices[name]
        chunks, shares = (self.steps.shape[2], -1), self.initial_steps
        with no_autocast(shares):  # autocast would lower the precision of the weights
            updates = (inputs.unflatten(2, chunks).mT @ deltas.unflatten(2, chunks)).to(shares.dtype)
            weights = torch.einsum('brij, brjde -> bride', self.steps, updates)
            return (weights + torch.einsum('brik, brkde -> bride', shares, initial.to(shares.dtype))).flatten(1, 2)


def _factored_blocks(stored: Sequence[StoredBlock | StoredBatches]) -> Iterator[FactoredBlocks]:
    """Join consecutive blocks of one length, so that they are applied together."""

    def length(block: StoredBlock | StoredBatches) -> int:
        return 0 if isinstance(block, StoredBatches) else _rows(block).shape[1]

    for _, same_length in groupby(stored, key=length):
        group: list[StoredBlock] = []
        for block in same_length:
            if isinstance(block, StoredBatches):
                yield block.blocks
            else:
                group.append(block)
        if not group:
            continue
        rows = _rows(group[0])
        together = blocks_at_once(len(group), len(rows) * rows.shape[1], rows.device)
        for start in range(0, len(group), together):
            yield FactoredBlocks.of(group[start : start + together])


def _rows(block: StoredBlock) -> Float[Tensor, 'bh t d']:
    return next(iter(block.factors.values())).inputs


def _joined(parts: list[Float[Tensor, 'bh _n ...']], final: Float[Tensor, 'bh ...']) -> Float[Tensor, 'bh n ...']:
    final = final.unsqueeze(1)
    return torch.cat([*parts, final.to(parts[0].dtype)], dim=1) if parts else final


_IN_PLACE = {'set', 'set_at', 'update', 'update_at', 'pop', 'popitem', 'setdefault', 'clear', 'rename_key'}
"""Methods of TensorDict that change it, in addition to those that end in `_`."""


class FastWeights(Mapping[str, Tensor]):
    """A memory network's weights over time.

    As a mapping, it gives every parameter for every step, (bh, chunks + 1, …), and forms it when asked. Methods of
    TensorDict work on it in the same way, except those that would change it.
    """

    def __init__(self, dense: Weights, blocks: list[FactoredBlocks], final: Weights):
        self.dense = dense
        self.blocks = blocks
        self.final = final

    @classmethod
    def of(cls, tensors: Weights) -> FastWeights:
        """Dense weights over time, (bh, chunks + 1, …) for every parameter."""
        return cls(tensors, [], {name: w[:, -1] for name, w in tensors.items()})

    @classmethod
    def joined(cls, stored: Sequence[StoredBlock | StoredBatches], final: Weights) -> FastWeights:
        """Consecutive blocks, followed by the weights `final`."""
        in_dense = stored[0].dense.keys() if stored else final.keys()
        blocks = [*_factored_blocks(stored)] if in_dense != final.keys() else []
        dense = {name: _joined([block.dense[name] for block in stored], final[name]) for name in in_dense}
        return cls(dense, blocks, final)

    @property
    def num_steps(self) -> int:
        for name in self.dense:
            return self.dense[name].shape[1]
        return sum(block.num_steps for block in self.blocks) + 1

    def steps(self, name: str, first: int, length: int) -> Float[Tensor, 'bh n ...']:
        """A parameter at `length` steps, beginning at step `first`; beyond the end, the last step stays in force."""
        weights = self[name]
        if isinstance(length, torch.SymInt):  # in an exported program, a single graph serves all lengths
            steps = torch.arange(first, first + length, device=weights.device)
            return weights.index_select(1, steps.clamp(max=weights.shape[1] - 1))
        if first + length <= weights.shape[1]:
            return weights[:, first : first + length]
        last = weights.shape[1] - 1
        return weights[:, [min(step, last) for step in range(first, first + length)]]

    def linear(self, name: str, x: Float[Tensor, 'bh n c d'], first: int) -> Float[Tensor, 'bh n c e']:
        """Multiply group k of the rows `x` by the matrix of step `first + k`."""
        if name in self.dense:
            return grouped_linear(x, self.steps(name, first, x.shape[1]))
        out = [self.blocks[index].linear(name, rows)[:, used] for index, rows, used in self.by_block(x, first)]
        after = self.after_blocks(x, first)
        if after is not None:
            out.append(grouped_linear(after, self.final[name].unsqueeze(1)))
        return concatenated(out, dim=1)

    def by_block(
        self, x: Float[Tensor, 'bh n c d'], first: int
    ) -> Iterator[tuple[int, Float[Tensor, 'bh _n c d'], slice]]:
        """The index of each block that groups of rows read, and those groups; the first group reads step `first`.

        A block is applied as a whole: its groups are padded to all of its steps, and a slice tells which are from `x`.
        """
        start, stop = 0, first + x.shape[1]
        for index, block in enumerate(self.blocks):
            end = start + block.num_steps
            low, high = max(first, start), min(stop, end)
            if low < high:
                rows = x[:, low - first : high - first]
                if (low, high) != (start, end):
                    rows = F.pad(rows, (0, 0, 0, 0, low - start, end - high))
                yield index, rows, slice(low - start, high - start)
            start = end

    def after_blocks(self, x: Float[Tensor, 'bh n c d'], first: int) -> Float[Tensor, 'bh _n c d'] | None:
        """The groups of rows, from step `first` on, that read the weights after all blocks; `None` if none do."""
        start = self.num_steps - 1
        return x[:, max(start - first, 0) :] if first + x.shape[1] > start else None

    def lengths(self, first: int, length: int) -> list[int]:
        """Split `length` steps, beginning at step `first`, where one factored block ends and the next begins."""
        lengths: list[int] = []
        start = 0
        for block in self.blocks[:-1]:
            start += block.num_steps
            if first < start < first + length:
                lengths.append(start - first - sum(lengths))
        return [*lengths, length - sum(lengths)]

    # as a mapping

    def __getitem__(self, name: str) -> Float[Tensor, 'bh n ...']:
        if name in self.dense:
            return self.dense[name]
        parts = [block.dense(name) for block in self.blocks]
        return torch.cat([*parts, self.final[name].unsqueeze(1)], dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.final)

    def __len__(self) -> int:
        return len(self.final)

    def to_dict(self) -> Weights:
        return {name: self[name] for name in self}

    def __getattr__(self, name: str) -> Any:
        # do not form the weights for any other attribute
        if name.startswith('_') or name in ('dense', 'blocks', 'final') or not hasattr(TensorDict, name):
            raise AttributeError(f'{type(self).__name__!r} object has no attribute {name!r}')
        if name.endswith('_') or name in _IN_PLACE:
            raise AttributeError(f'{name} would change weights that are formed anew each time: take those of to_dict()')
        return getattr(TensorDict(self.to_dict()), name)


def _operator(name: str) -> Any:
    """An operator of TensorDict, defined here because Python looks operators up on the class."""

    def operator(weights: FastWeights, *others: Any) -> TensorDict:
        formed = (TensorDict(t.to_dict()) if isinstance(t, FastWeights) else t for t in (weights, *others))
        return getattr(TensorDict, name)(*formed)

    return operator


for _name in ('add', 'radd', 'sub', 'rsub', 'mul', 'rmul', 'truediv', 'neg', 'pow', 'abs'):
    if hasattr(TensorDict, f'__{_name}__'):
        setattr(FastWeights, f'__{_name}__', _operator(f'__{_name}__'))


# lets detaching and moving a state include these tensors
pytree.register_pytree_node(
    FastWeights,
    lambda weights: ([weights.dense, weights.blocks, weights.final], None),
    lambda children, _: FastWeights(*children),
    serialized_type_name='titans_pytorch.FastWeights',
    flatten_with_keys_fn=lambda weights: (
        [(pytree.GetAttrKey(name), getattr(weights, name)) for name in ('dense', 'blocks', 'final')],
        None,
    ),
)
