"""Training on two processes, replicated and sharded, equals training on one; it goes on on any number of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compare import all_in_float64, assert_same
from filelock import FileLock
from torch import Tensor

import train_mac
from titans_pytorch import MemoryAsContextTransformer
from titans_pytorch.training import (
    MicroStep,
    checkpoints,
    choose_machine,
    process_group,
    random_starts,
    read_checkpoint,
    read_metrics,
    shard,
    share,
    whole_tensor,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason='PyTorch without torch.distributed')

PROCESSES = 2
TEXT = b'The quick brown fox jumps over the lazy dog, and the dog does not mind. ' * 60
SETTINGS = (
    '--device cpu --num-batches 4 --checkpoint-every 2 --validate-every 2 --validate-batches 2 --generate-every 4 '
    '--batch-size 1 --gradient-accumulate-every 4 --seq-len 24 --learning-rate 1e-3 --prime-length 8 '
    '--generate-length 12 --dim 16 --depth 2 --heads 2 --dim-head 8 --window-size 8 --num-persist-mem 2 '
    '--num-longterm-mem 2 --neural-mem-layers 1 2 --neural-mem-heads 2 --neural-mem-dim-head 8 '
    '--neural-mem-batch-size 16'
)


def words(folder: Path, *more: str) -> list[str]:
    return [*SETTINGS.split(), '--data', str(folder / 'text'), *more]


# in one process


def model() -> MemoryAsContextTransformer:
    torch.manual_seed(0)
    random.seed(0)  # of the hyper-connections
    memory = {'dim_head': 8, 'heads': 2, 'qk_rmsnorm': True}
    return MemoryAsContextTransformer(
        num_tokens=11, dim=8, depth=2, segment_len=4, num_longterm_mem_tokens=2, neural_memory_kwargs=memory
    ).double()


def batches() -> list[Tensor]:
    return [*torch.randint(0, 11, (4, 1, 13), generator=torch.Generator().manual_seed(1))]


def gradients(of: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole_tensor(p.grad) for name, p in of.named_parameters() if p.grad is not None}


def of_one_process() -> tuple[float, dict[str, Tensor]]:
    plain, total = model(), 0.0
    for inputs in batches():
        loss = plain(inputs, return_loss=True) / 4
        loss.backward()
        total += loss.item()
    return total, gradients(plain)


def _process(rank: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {'RANK': f'{rank}', 'LOCAL_RANK': f'{rank}', 'WORLD_SIZE': f'{PROCESSES}'}
    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': f'{ports.pop()}'}
    with process_group(), all_in_float64():
        expected_loss, expected = of_one_process()
        for sharded, compiled in ((False, False), (True, False), (True, True)):
            own = model()
            if sharded:
                shard(own, torch.device('cpu'))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))  # 2 s instead of 60
                micro_step = MicroStep(own, choose_machine('cpu', compile=compiled), 4)
            loss = micro_step.accumulate(share(batches()))
            assert_same(loss, torch.tensor(expected_loss), 1e-6)  # accumulated in float32
            # compiled hyper-connections compute in float32, whatever `all_in_float64` patches
            assert_same(gradients(own), expected, 1e-6 if compiled else 1e-12)

    def run(name: str, *more: str, status: int = 0) -> None:
        os.environ['MASTER_PORT'] = f'{ports.pop()}'
        assert train_mac.main(words(folder, *more, '--run-dir', str(folder / name))) == status

    with pytest.raises(SystemExit, match='GRADIENT_ACCUMULATE_EVERY must be a multiple of the 2 processes'):
        run('odd', '--gradient-accumulate-every', '3')
    dist.destroy_process_group()  # left as it is after an error
    run('replicated')
    run('sharded', '--fsdp', '--resume', str(folder / 'replicated' / 'checkpoint_batch_2.pt'))
    if rank == 0:
        run('signalled', '--fsdp')
        with pytest.raises(RuntimeError):
            run('dead')
    else:
        in_the_third_step(lambda: os.kill(os.getpid(), signal.SIGTERM))
        run('signalled', '--fsdp', status=128 + signal.SIGTERM)
        in_the_third_step(lambda: os._exit(0))
        run('dead')


def in_the_third_step(act: Callable[[], None]) -> None:
    draw, draws = random_starts, itertools.count(1)

    def acting(*args: Any) -> Tensor:
        if next(draws) == 2 * 4 + 1:  # micro batches
            act()
        return draw(*args)

    train_mac.random_starts = acting


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one process and of two, which all workers of pytest-xdist share."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root) / 'runs'
    complete = folder / 'complete'
    with FileLock(f'{folder}.lock'):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / 'text').write_bytes(TEXT)
            torch.multiprocessing.spawn(_process, args=(free_ports(6), folder), nprocs=PROCESSES)
            assert train_mac.main(words(folder, '--run-dir', str(folder / 'one'))) == 0
            complete.touch()
    return folder


def assert_same_run(came: Path, expected: Path, count: int) -> None:
    """`count` figures of losses and gradient norms."""
    figures = []
    for folder in (came, expected):
        rows = read_metrics(folder / 'metrics.jsonl')
        keys = ('train_loss', 'grad_norm', 'val_loss')
        figures.append({(row['step'], key): row[key] for row in rows for key in keys if key in row})
    assert len(figures[0]) == count and figures[0].keys() <= figures[1].keys()
    for at, value in figures[0].items():
        assert value == pytest.approx(figures[1][at], rel=5e-5), at


def assert_same_state(came: dict[str, Any], expected: dict[str, Any]) -> None:
    assert came.keys() == expected.keys()
    for key in ('batch', 'evaluated', 'data_sha256', 'vocabulary', 'python_random'):
        assert came[key] == expected[key]
    for key in ('windows_random', 'random'):
        assert torch.equal(came[key], expected[key])
    assert_same(came['model_state_dict'], expected['model_state_dict'], 2e-4)
    states, expected_states = came['optimizer_state_dict'], expected['optimizer_state_dict']
    assert states['param_groups'] == expected_states['param_groups']
    assert_same(states['state'], expected_states['state'], 2e-4)


def test_two_processes_train_as_one(runs: Path) -> None:
    """Losses, gradient norms, weights, moments and the position in the data."""
    assert_same_run(runs / 'replicated', runs / 'one', 4 * 2 + 3)
    assert_same_run(runs / 'signalled', runs / 'one', 3 * 2 + 2)
    assert_same_state(*(read_checkpoint(runs / name / 'titans_enwik8.pt') for name in ('replicated', 'one')))


def test_shards_go_on_from_a_file(runs: Path) -> None:
    assert_same_run(runs / 'sharded', runs / 'one', 2 * 2 + 1)
    checkpoints.consolidate(runs / 'sharded' / 'titans_enwik8', runs / 'consolidated.pt')
    assert_same_state(read_checkpoint(runs / 'consolidated.pt'), read_checkpoint(runs / 'one' / 'titans_enwik8.pt'))


@pytest.mark.parametrize(
    ('checkpoint', 'count'), [('replicated/checkpoint_batch_2.pt', 5), ('signalled/checkpoint_batch_3', 3)]
)
def test_one_process_goes_on_with_the_run_of_two(runs: Path, tmp_path: Path, checkpoint: str, count: int) -> None:
    resume = ['--resume', str(runs / checkpoint), '--no-fsdp', '--num-batches', '4', '--run-dir', str(tmp_path)]
    assert train_mac.main(resume) == 0
    assert_same_run(tmp_path, runs / 'one', count)
    assert_same_state(*(read_checkpoint(run / 'titans_enwik8.pt') for run in (tmp_path, runs / 'one')))


def test_one_process_writes(runs: Path) -> None:
    for name in ('replicated', 'sharded'):
        assert (runs / name / 'samples.txt').read_text().count('--- sample') == 1
        rows = [(row['step'], 'val_loss' in row) for row in read_metrics(runs / name / 'metrics.jsonl')]
        assert len(rows) == len({*rows})
        assert not list((runs / name).glob('*tmp'))


def test_a_folder_of_shards_is_a_checkpoint(runs: Path, tmp_path: Path) -> None:
    latest = checkpoints.latest_checkpoint(runs / 'sharded')
    assert latest['batch'] == 4 and latest['shards'].parent == runs / 'sharded'
    shutil.copytree(latest['shards'], tmp_path / 'copy')
    checkpoints.main([str(tmp_path / 'copy')])
    assert checkpoints.read_resumable(tmp_path / 'copy.pt')['batch'] == 4
    next((tmp_path / 'copy').glob('*.distcp')).unlink()
    with pytest.raises(SystemExit, match='the shards in .* cannot be read'):
        checkpoints.main([str(tmp_path / 'copy')])
    resume = ['--resume', str(tmp_path / 'copy'), '--no-fsdp', '--run-dir', str(tmp_path / 'run')]
    with pytest.raises(SystemExit, match='the shards in .* cannot be read'):
        train_mac.main(resume)
    (tmp_path / 'copy' / checkpoints.CONTENT).unlink()
    with pytest.raises(SystemExit, match='there is no checkpoint'):
        checkpoints.main([str(tmp_path / 'copy')])


def test_a_signal_to_one_process_saves_and_ends_all(runs: Path) -> None:
    assert checkpoints.latest_checkpoint(runs / 'signalled')['batch'] == 3
    assert max(row['step'] for row in read_metrics(runs / 'signalled' / 'metrics.jsonl')) == 3


def test_a_process_that_dies_ends_all_with_the_steps_done_saved(runs: Path) -> None:
    assert read_checkpoint(runs / 'dead' / 'checkpoint_batch_2.pt')['batch'] == 2
    assert max(row['step'] for row in read_metrics(runs / 'dead' / 'metrics.jsonl')) == 2
