"""Storing one chunk after another with a single operation of the graph, for `torch.export` with a dynamic length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from titans_pytorch.memory.backends.base import Backend, StoreInputs
from titans_pytorch.memory.chunks import Chunks, WeightResidual
from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights, StoredBlock
from titans_pytorch.memory.schedule import Schedule
from titans_pytorch.utils.shapes import Float


def scan_chunks(
    backend: Backend, inputs: StoreInputs
) -> tuple[FastWeights, MemoryWeights, Float[Tensor, 'bh n m'] | None]:
    """`Backend.store` as a graph that does not grow with the number of chunks, which is symbolic here."""
    # imported here because PyTorch may yet move it
    from torch._higher_order_ops.scan import scan

    chunks, residual, schedule, weights, transition, with_losses, *_ = inputs
    given = [index for index, t in enumerate(chunks) if t is not None]
    added: Any = ()
    if residual is not None:
        shares, names = residual.shares, weights.newest
        steps = {name: residual.weights.steps(name, residual.first_step, shares.shape[1]) for name in names}
        added = shares, steps
    ends_batch = schedule.ends_batch(chunks.keys.device).unsqueeze(0)

    def store_one(carry: Any, of_chunk: Any) -> Any:
        weights = MemoryWeights(*carry)
        tensors, added, ends = of_chunk
        fields: list[Any] = [None] * len(Chunks._fields)
        for index, t in zip(given, tensors):
            fields[index] = t.unsqueeze(1)
        own_residual = None
        if added:
            share, dense = added
            dense = {name: w.unsqueeze(1) for name, w in dense.items()}
            own_residual = WeightResidual(FastWeights.of(dense), dense, share.unsqueeze(1), 0)

        one = StoreInputs(Chunks(*fields), own_residual, Schedule(0, 1, None), weights, transition)
        (prepared,) = backend.prepare(one)
        stored = prepared.store(weights)
        after = MemoryWeights(weights.base, stored.over_time.final, stored.momentum)
        moved = transition(after)
        newest = {name: torch.where(ends, moved.newest[name], w) for name, w in after.newest.items()}
        base = {name: torch.where(ends, moved.base[name], w) for name, w in after.base.items()}
        carried = _unaliased((base, newest, stored.momentum))
        assert stored.losses is not None
        return carried, _unaliased((weights.newest, stored.losses[:, 0]))

    carry = _unaliased(tuple(weights))
    every = _unaliased(_chunks_first(([chunks[index] for index in given], added, ends_batch)))
    for t in tree_leaves((carry, every)):
        # all sizes but the number of chunks are known while a step is traced, and `torch.func` needs them for a user's
        # network; `torch._dynamo.mark_static`, which sets this attribute, does something else during an export
        t._dynamo_static_indices = {axis for axis, size in enumerate(t.shape) if isinstance(size, int)}
    carry, by_chunk = scan(store_one, carry, every)
    before, losses = _chunks_first(by_chunk)
    weights = MemoryWeights(*carry)
    over_time = FastWeights.joined([StoredBlock(before, weights.newest)], weights.newest)
    return over_time, weights, losses if with_losses else None


def _chunks_first(tensors: Any) -> Any:
    """Exchange the first two axes of tensors."""
    return tree_map(lambda t: t.transpose(0, 1), tensors)


def _unaliased(tensors: Any) -> Any:
    # the operation accepts no two tensors that share memory, and expects the same strides at every step
    return tree_map(lambda t: t.clone(memory_format=torch.contiguous_format), tensors)
