"""Models on two processes: sharded from the meta device on, and replicated with a state from call to call."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from compare import assert_same
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    NeuralMemory,
)
from titans_pytorch.models.base import Transformer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason='PyTorch without torch.distributed')

PROCESSES = 2
MODELS: dict[str, Callable[..., Transformer]] = {
    'MAC': MemoryAsContextTransformer,
    'MAC, paper order': lambda **kwargs: MemoryAsContextTransformer(paper_order=True, **kwargs),
    'MAG': MemoryAsGateTransformer,
    'MAL': MemoryAsLayerTransformer,
    'LMM': LongTermMemoryModel,
}


def build(name: str) -> Transformer:
    return MODELS[name](num_tokens=11, dim=8, depth=2, segment_len=4)


def in_processes(work: Callable[[int, Path], None], folder: Path) -> None:
    """Run `work(rank, folder)` in two processes, connected by gloo; forked from a server that has imported this."""
    torch.multiprocessing.get_context('forkserver').set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(_process, (work, folder), PROCESSES, start_method='forkserver')


def _process(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    # of PyTorch: on a CPU each process draws for itself; a view must not be changed in place, which nothing does here
    warnings.filterwarnings('ignore', message='DTensor random operators|FSDP2-wrapped module')
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=PROCESSES)
    try:
        work(rank, folder)
    finally:
        dist.destroy_process_group()


# sharded


def sharded_on_meta(name: str) -> Any:
    with torch.device('meta'):
        model = build(name).double()
    mesh = init_device_mesh('cpu', (PROCESSES,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor()


def over_processes(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


def _trained_and_reloaded(rank: int, folder: Path) -> None:
    for name in MODELS:
        torch.manual_seed(0)
        random.seed(rank)  # no agreement is needed on Python's random numbers
        ids = torch.randint(0, 11, (PROCESSES, 10))
        own = ids[rank : rank + 1]

        model = sharded_on_meta(name)
        model.to_empty(device='cpu')
        model.reset_parameters()
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))

        # as one process computes it, with the same weights
        plain = build(name).double()
        plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(own, return_loss=True).backward()
        plain(ids, return_loss=True).backward()
        expected = {key: p.grad for key, p in plain.named_parameters() if p.requires_grad}
        came = {key: full(p.grad) for key, p in model.named_parameters() if p.requires_grad}
        assert_same(came, expected, 1e-5, name)

        before = over_processes(model(own, return_loss=True))
        for _ in range(2):
            optimizer.zero_grad()
            model(own, return_loss=True).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert over_processes(model(own, return_loss=True)) < before

        checkpoint = folder / name.replace(', ', ' ')
        dcp.save({'model': model.state_dict()}, checkpoint_id=checkpoint)
        other = sharded_on_meta(name)
        other.to_empty(device='cpu')
        weights = {'model': other.state_dict()}
        dcp.load(weights, checkpoint_id=checkpoint)
        other.load_state_dict(weights['model'])
        with torch.no_grad():
            assert_same(other(own), model(own), 0.0, name)


def test_a_sharded_model_is_reset_trained_saved_and_reloaded(tmp_path: Path) -> None:
    in_processes(_trained_and_reloaded, tmp_path)


# replicated


def seeded(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(0)
    random.seed(0)
    return make(*args).double()


PIECES = (6, 1, 9, 2)


def model_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Truncated backpropagation: the loss of each piece, with the memory of earlier pieces."""
    state, start = None, 0
    for length in PIECES:
        loss, state = model(ids[:, start : start + length + 1], return_loss=True, state=state, return_state=True)
        loss.backward()
        state, start = state.detach(), start + length
    return gradients_of(model)


def memory_gradients(memory: nn.Module, seq: Tensor) -> dict[str, Tensor]:
    state = None
    for piece in seq.split(PIECES, dim=1):
        retrieved, state = memory(piece, state=state, detach_mem_state=True)
        retrieved.square().mean().backward()
    return gradients_of(memory)


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    named = {name.removeprefix('module.'): p for name, p in module.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}


def _pieces_in_turn(rank: int, folder: Path) -> None:
    ddp = nn.parallel.DistributedDataParallel
    torch.manual_seed(1)
    ids = torch.randint(0, 11, (PROCESSES, sum(PIECES) + 1))
    seq = torch.randn(PROCESSES, sum(PIECES), 8, dtype=torch.float64)
    own = slice(rank, rank + 1)

    for name in MODELS:
        came = model_gradients(ddp(seeded(build, name)), ids[own])
        assert_same(came, model_gradients(seeded(build, name), ids), 1e-6, name)

    def memory() -> NeuralMemory:
        return NeuralMemory(8, chunk_size=4, batch_size=8, heads=2, dim_head=4, gated_transition=True)

    came = memory_gradients(ddp(seeded(memory)), seq[own])
    assert_same(came, memory_gradients(seeded(memory), seq), 1e-9)


def test_truncated_backpropagation_with_default_settings_equals_one_process(tmp_path: Path) -> None:
    in_processes(_pieces_in_turn, tmp_path)


def test_a_parameter_without_a_gradient_keeps_none() -> None:
    """Where one process is all there is, an optimizer leaves it alone."""
    memory = NeuralMemory(8, chunk_size=4, batch_size=8)
    _, state = memory(torch.randn(1, 8, 8))
    memory(torch.randn(1, 8, 8), state=state.detach())[0].sum().backward()
    assert all(p.grad is None for p in memory.memory_model_parameters)
    assert memory.to_queries.weight.grad is not None
