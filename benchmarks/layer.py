"""Time and memory of one memory layer, forward and backward, ours and the reference's beside it.

    make bench                                                     (ours alone)
    make bench ARGS="--reference-path /folder/with/the/reference"  (a folder to put on PYTHONPATH)
    make bench ARGS="--cases 0 1 --repeats 20"

For each case the numbers are checked first, in float64 against the dense engine in uneven pieces; while they are wrong
there is no figure. Ours (on a GPU also as a CUDA graph) and the reference then run by turns, each time in a process of
its own. The table gives the
median over all repeats and the range from 10 % to 90 %; the last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """Dim 384, 4 heads of 64, memory 64 → 256 → 64, momentum and decay."""

    chunk: int
    memory_batch: int | None
    batch: int
    length: int
    machine: str

    @property
    def name(self) -> str:
        return f'{self.chunk}, {self.memory_batch}, {self.batch} × {self.length}'

    def kwargs(self) -> dict[str, Any]:
        return {
            'dim': 384,
            'dim_head': 64,
            'heads': 4,
            'chunk_size': self.chunk,
            'batch_size': self.memory_batch,
            'qk_rmsnorm': True,
            'default_step_transform_max_lr': 1e-2,
            'init_decay_bias': -3.0,
        }


CASES = [
    Case(4, 128, 1, 512, 'cpu'),
    Case(64, None, 1, 512, 'cpu'),
    Case(1, 32, 1, 256, 'cpu'),
    Case(16, 128, 1, 1024, 'cpu'),
    Case(4, 128, 4, 512, 'cuda'),
    Case(4, 128, 16, 2048, 'cuda'),
    Case(64, 512, 4, 4096, 'cuda'),
    Case(1, 32, 4, 512, 'cuda'),
    # growth: time per token should not depend on the length
    Case(4, 128, 1, 2048, 'cuda'),
    Case(4, 128, 1, 16384, 'cuda'),
    Case(4, None, 1, 2048, 'cuda'),
    Case(4, None, 1, 16384, 'cuda'),
]


def check(case: Case) -> float:
    """Largest relative error of a layer in float64, outputs and gradients: one pass against uneven pieces, dense."""
    from titans_pytorch import NeuralMemory

    torch.manual_seed(0)
    layer = NeuralMemory(**case.kwargs()).double()
    dense = NeuralMemory(**case.kwargs(), engine='dense').double()
    dense.load_state_dict(layer.state_dict())
    length = min(case.length, 2 * (case.memory_batch or 2 * case.chunk) + case.chunk + 3)
    seq = torch.randn(1, length, 384, dtype=torch.float64)
    whole, _ = layer(seq)
    state, outs = None, []
    for piece in seq.split([length // 3 + 1, length // 3, length - 2 * (length // 3) - 1], dim=1):
        out, state = dense(piece, state=state)
        outs.append(out)
    results = []
    for module, out in ((layer, whole), (dense, torch.cat(outs, dim=1))):
        results.append((out, *torch.autograd.grad(out.sin().sum(), [*module.parameters()])))
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in zip(*results))


def measure(case: Case, repeats: int, graph: bool) -> dict[str, Any]:
    """Seconds of each repeat and peak memory, with whichever package this process imports."""
    from titans_pytorch import NeuralMemory

    device, cuda = case.machine, case.machine == 'cuda'
    torch.manual_seed(0)
    layer = NeuralMemory(**case.kwargs()).to(device)
    for parameter in layer.parameters():
        parameter.data = parameter.data.contiguous()  # the reference's are views of one storage
    seq = torch.randn(case.batch, case.length, 384, device=device)

    def forward_and_backward() -> None:
        layer.zero_grad(set_to_none=not graph)
        out, _ = layer(seq)
        out.pow(2).mean().backward()

    replay = forward_and_backward
    if graph:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                forward_and_backward()
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        torch.cuda.reset_peak_memory_stats()
        with torch.cuda.graph(recorded):
            forward_and_backward()
        replay = recorded.replay

    def step() -> None:
        replay()
        if cuda:
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    if cuda and not graph:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {'seconds': seconds, 'peak': torch.cuda.max_memory_allocated() if cuda else None}


def in_own_process(index: int, repeats: int, path: str, graph: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, '--worker', str(index), '--repeats', str(repeats)]
    command += ['--graph'] if graph else []
    environment = {**os.environ, 'PYTHONPATH': path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {'seconds': [], 'peak': None, 'failed': done.stderr.splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s for run in runs for s in run['seconds']]
    if not seconds:
        return {'failed': runs[0]['failed']}
    low, *_, high = statistics.quantiles(seconds, n=10)
    peaks = [run['peak'] for run in runs if run['peak'] is not None]
    return {'median': statistics.median(seconds), 'low': low, 'high': high, 'peak': max(peaks, default=None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, nargs='*', help='which of the cases; default: those of this machine')
    parser.add_argument('--repeats', type=int, default=5, help='timed steps in each of two processes')
    parser.add_argument('--reference-path', help='PYTHONPATH that holds the reference package')
    parser.add_argument('--graph', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--worker', type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(measure(CASES[options.worker], options.repeats, options.graph)))
        return

    machine = 'cuda' if torch.cuda.is_available() else 'cpu'
    indices = options.cases or [i for i, case in enumerate(CASES) if case.machine == machine]
    sys.path.insert(0, str(ROOT))
    own_path = f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    paths = {'ours': own_path}
    if machine == 'cuda':
        paths['ours, CUDA graph'] = own_path
    if options.reference_path:
        paths['reference'] = options.reference_path

    device = torch.cuda.get_device_name() if machine == 'cuda' else f'{os.cpu_count()} × {platform.processor()}'
    print(f'{device}, PyTorch {torch.__version__}, {time.strftime("%Y-%m-%d")}\n')
    print('| chunk, memory batch, B × N | package | median | 10 % to 90 % | peak memory | reference / this |')
    print('| --- | --- | --- | --- | --- | --- |')
    results = []
    for index in indices:
        case = CASES[index]
        error = check(case)
        if not error < 1e-9:
            raise SystemExit(f'{case.name}: wrong by {error:.1e}, so there is no figure')
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
        for _ in range(2):
            for name, path in paths.items():
                runs[name].append(in_own_process(index, options.repeats, path, 'graph' in name))
        figures = {name: summary(own) for name, own in runs.items()}
        for name, f in figures.items():
            if 'failed' in f:
                print(f'| {case.name} | {name} | failed: {f["failed"]} | | | |', flush=True)
                continue
            spread = f'{f["low"] * 1e3:.1f}–{f["high"] * 1e3:.1f} ms'
            peak = '–' if f['peak'] is None else f'{f["peak"] / 2**30:.2f} GiB'
            reference = figures.get('reference', {}).get('median')
            ratio = '–' if reference is None else f'{reference / f["median"]:.1f} ×'
            print(f'| {case.name} | {name} | {f["median"] * 1e3:.1f} ms | {spread} | {peak} | {ratio} |', flush=True)
        results.append({'case': asdict(case), 'error': error, **figures})
    print(json.dumps({'device': device, 'torch': torch.__version__, 'results': results}))


if __name__ == '__main__':
    main()
