"""Models on two processes, sharded from the meta device on."""

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
)
from titans_pytorch.transformer import Transformer

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
    """Run `work(rank, folder)` in two processes, connected by gloo."""
    torch.multiprocessing.spawn(_process, args=(work, folder), nprocs=PROCESSES)


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


def _trained_and_reloaded(rank: int, folder: Path) -> None:
    for name in MODELS:
        torch.manual_seed(0)
        random.seed(rank)  # no agreement is needed on Python's random numbers
        ids = torch.randint(0, 11, (PROCESSES, 13))
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

        before = model(own, return_loss=True).item()
        for _ in range(3):
            optimizer.zero_grad()
            model(own, return_loss=True).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert model(own, return_loss=True).item() < before

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
