"""Several processes that train one model, started by `torchrun`. In a single process, no function here does anything.

The processes (ranks) share the micro batches of a step, so that a step is the same on any number of ranks. Gradients
are averaged once per step: by `average_gradients` for replicated models, by FSDP2 itself for sharded ones.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar('T')


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def num_ranks() -> int:
    """The number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_distributed() -> bool:
    """True inside `process_group` under `torchrun`."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join the processes started by `torchrun`, if it has started this one.

    CPU tensors are exchanged by gloo, GPU tensors by NCCL. When one process fails, `torchrun` ends all of them;
    `timeout` is for a process that hangs. It must exceed the longest time for which the others wait for one, for
    example while the first process tokenises a corpus.
    """
    if not {'RANK', 'WORLD_SIZE', 'MASTER_ADDR'} <= os.environ.keys():
        yield
        return
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo', timeout=timeout)
    yield
    dist.destroy_process_group()  # not after an error, when it would wait for processes that wait for this one


def share(items: Iterable[T]) -> Iterator[T]:
    """The items of this rank: every n-th of n ranks. Each rank draws all items, so that iterators stay in step."""
    return itertools.islice(items, rank(), None, num_ranks())


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. All ranks wait for each other here."""
    if num_ranks() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Let the first rank do something, such as fill a cache, before the others do the same."""
    if rank() > 0:
        any_rank(False)
    yield
    if rank() == 0:
        any_rank(False)


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values`, summed over all ranks in place."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


# replicated


def broadcast_parameters(model: nn.Module) -> None:
    """Give all ranks the parameters of the first one."""
    if num_ranks() > 1 and not is_sharded(model):
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace the gradients of a replicated model by their means over all ranks, exchanged as one tensor.

    `DistributedDataParallel` overlaps this with the backward pass. Here it happens only once per step, and a captured
    forward and backward need not know about it. Gradients that FSDP2 has already averaged are left alone.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if num_ranks() == 1 or is_sharded(model) or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    parts = sum_over_ranks(flat).div_(num_ranks()).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])


# sharded


def shard(model: nn.Module, device: torch.device, policy: Any = None) -> None:
    """Shard a model's parameters over all ranks with FSDP2, as one group for each of its `layers` and one for the rest.

    Each rank keeps its part of every parameter, gradient and optimizer moment; a layer is gathered while it runs. Call
    this before building the optimizer. A model on the CPU is moved to `device` layer by layer, so it need not fit there
    as a whole.

    Args:
        policy: a `torch.distributed.fsdp.MixedPrecisionPolicy`. Default: parameters are gathered in their own precision
            and autocast sets the precision of products, because a memory's weights, gates and norms stay in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    broadcast_parameters(model)
    # nothing here changes the output of a layer in place
    warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view')
    mesh = init_device_mesh(device.type, (num_ranks(),))
    for part in (*model.layers, model):  # type: ignore[misc]
        fully_shard(part, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())


def is_sharded(model: nn.Module) -> bool:
    """True after `shard`."""
    return any(hasattr(parameter, 'device_mesh') for parameter in model.parameters())


def reduce_gradients_in_backward(model: nn.Module, now: bool) -> None:
    """Set whether the next backward pass of a sharded model exchanges gradients or adds to those of this rank."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)  # type: ignore[operator]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor  # type: ignore[operator]


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor  # type: ignore[operator]


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep a sharded model whole on every rank, which sampling needs because it calls parts of layers."""
    parts: list[Any] = [part for part in model.modules() if hasattr(part, 'unshard')]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
