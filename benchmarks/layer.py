"""Time and memory of one memory layer, forward and backward, compared with the reference.

    make bench                                                     (this package alone)
    make bench ARGS="--reference-path /folder/with/the/reference"  (a folder to put on PYTHONPATH)
    make bench ARGS="--kinds step growth --cases 0 1 --repeats 20 --write"

A case is timed only if its numbers are right: they are compared in float64 with those of the dense backend, which reads
the sequence in uneven pieces. Then this package (also compiled, and on a GPU as a CUDA graph) and the reference run
alternately, each time in a new process. There are four kinds of measurement:

    step     a training step: median, 10th to 90th percentile, peak memory, and the speed-up over the reference
    growth   a training step of full length and one of 2,048 tokens, alternately in one process: time per token
    stream   2²⁰ tokens in calls of 4096 without gradients: memory and time per token, at the start and at the end
    longest  a training step on a single sequence: memory per token, and the longest tried that fits

The last line of output is JSON. `--json FILE` saves each case as soon as it is measured, `--report FILE…` prints the
tables of saved cases, and `--write` puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    ROOT,
    by_turns,
    captured,
    gibibytes,
    machine,
    milliseconds,
    own_path,
    parsed,
    table,
    timed,
    write_section,
)

DIM = 384
SHORT = 2048  # tokens of the shorter sequence in measurements of growth


@dataclass(frozen=True)
class Case:
    """Dim 384, 4 heads of 64, memory 64 → 256 → 64, or one matrix without a norm; momentum and decay."""

    kind: str
    device: str
    chunk: int
    memory_batch: int | None
    batch: int
    length: int
    checkpoint_every: int | None = None
    precision: str = 'fp32'
    linear: bool = False

    @property
    def sizes(self) -> str:
        every = f', checkpoint_every={self.checkpoint_every}' if self.checkpoint_every else ''
        return f'{"one matrix, " if self.linear else ""}{self.chunk}, {self.memory_batch}{every}'

    @property
    def name(self) -> str:
        lowered = '' if self.precision == 'fp32' else f', {self.precision}'
        return f'{self.sizes}, {self.batch} × {self.length}{lowered}'

    def kwargs(self) -> dict[str, Any]:
        extra: dict[str, Any] = {'checkpoint_every': self.checkpoint_every} if self.checkpoint_every else {}
        if self.linear:
            extra |= {'default_model_kwargs': {'depth': 1}, 'mem_model_norm_add_residual': False}
        return {
            'dim': DIM,
            'dim_head': 64,
            'heads': 4,
            'chunk_size': self.chunk,
            'batch_size': self.memory_batch,
            'qk_rmsnorm': True,
            'default_step_transform_max_lr': 1e-2,
            'init_decay_bias': -3.0,
            **extra,
        }


CASES = [
    Case('step', 'cpu', 4, 128, 1, 512),
    Case('step', 'cpu', 64, None, 1, 512),
    Case('step', 'cpu', 1, 32, 1, 256),
    Case('step', 'cpu', 16, 128, 1, 1024),
    Case('step', 'cpu', 16, 16, 1, 512, linear=True),
    Case('step', 'cuda', 4, 128, 4, 512),
    Case('step', 'cuda', 4, 128, 16, 2048),
    Case('step', 'cuda', 64, 512, 4, 4096),
    Case('step', 'cuda', 1, 32, 4, 512),
    Case('step', 'cuda', 16, 128, 1, 1024),
    Case('step', 'cuda', 4, 128, 4, 512, precision='bf16'),
    Case('step', 'cuda', 4, 128, 16, 2048, precision='bf16'),
    *(Case('growth', device, 4, memory_batch, 1, 2**17) for device in ('cpu', 'cuda') for memory_batch in (128, None)),
    Case('stream', 'cpu', 64, 512, 1, 2**20),
    Case('stream', 'cuda', 4, 128, 1, 2**20),
    Case('longest', 'cuda', 4, 128, 1, 2**17),
    Case('longest', 'cuda', 4, 128, 1, 2**17, checkpoint_every=4096),
]


def check(case: Case) -> float:
    """Largest relative error in float64, outputs and gradients: one pass against uneven pieces, dense backend."""
    from titans_pytorch import NeuralMemory

    torch.manual_seed(0)
    layer = NeuralMemory(**case.kwargs()).double()
    dense = NeuralMemory(**case.kwargs() | {'checkpoint_every': None}, engine='dense').double()
    dense.load_state_dict(layer.state_dict())
    length = min(case.length, 2 * (case.memory_batch or 2 * case.chunk) + case.chunk + 3)
    seq = torch.randn(1, length, DIM, dtype=torch.float64)
    whole, _ = layer(seq)
    state, outs = None, []
    for piece in seq.split([length // 3 + 1, length // 3, length - 2 * (length // 3) - 1], dim=1):
        out, state = dense(piece, state=state)
        outs.append(out)
    results = []
    for module, out in ((layer, whole), (dense, torch.cat(outs, dim=1))):
        results.append((out, *torch.autograd.grad(out.sin().sum(), [*module.parameters()])))
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in zip(*results))


# the jobs of a worker process, on whichever package it imports


def build(case: Case) -> torch.nn.Module:
    from titans_pytorch import NeuralMemory

    torch.manual_seed(0)
    layer = NeuralMemory(**case.kwargs()).to(case.device)
    for parameter in layer.parameters():
        parameter.data = parameter.data.contiguous()  # in the reference they are views of one storage
    return layer


def peak_memory(case: Case) -> int | None:
    return torch.cuda.max_memory_allocated() if case.device == 'cuda' else None


def training_step(layer: torch.nn.Module, seq: torch.Tensor, mode: str, precision: str) -> Callable[[], None]:
    """Forward and backward in the given mode; bf16 means autocast, with states and gates in float32."""
    graph, compiled = 'graph' in mode, 'compiled' in mode

    def loss(seq: torch.Tensor) -> torch.Tensor:
        # cached casts of weights would be stale in later replays
        with torch.autocast(seq.device.type, torch.bfloat16, enabled=precision == 'bf16', cache_enabled=False):
            out = layer(seq)[0]
        return out.float().pow(2).mean()

    compute = torch.compile(loss, fullgraph=True) if compiled else loss

    def forward_and_backward() -> None:
        layer.zero_grad(set_to_none=not graph)
        compute(seq).backward()

    forward_and_backward()
    return captured(forward_and_backward) if graph else forward_and_backward


def step(case: Case, repeats: int, mode: str) -> dict[str, Any]:
    started = time.perf_counter()
    run = training_step(
        build(case), torch.randn(case.batch, case.length, DIM, device=case.device), mode, case.precision
    )
    first = time.perf_counter() - started
    seconds = timed(run, repeats)
    return {'seconds': seconds, 'peak': peak_memory(case), 'build and first step': first}


def growth(case: Case, repeats: int, mode: str) -> dict[str, Any]:
    """Time per token at two lengths, interleaved so that drift affects both equally; the short one is repeated to equal
    numbers of tokens."""
    layer, lengths = build(case), (SHORT, case.length)
    seqs = [torch.randn(case.batch, length, DIM, device=case.device) for length in lengths]
    runs = [training_step(layer, seq, mode, case.precision) for seq in seqs]
    seconds: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for own, run, times in zip(seconds, runs, (case.length // SHORT, 1)):
            own += timed(run, times, warmup=int(turn == 0))
    short, long = (statistics.median(own) / length for own, length in zip(seconds, lengths))
    return {'seconds': seconds[1], 'peak': peak_memory(case), 'short': short, 'long': long}


def stream(case: Case, repeats: int, mode: str) -> dict[str, Any]:
    layer, state, call = build(case), None, 4096
    seconds, held = [], []
    with torch.no_grad():
        for _ in range(case.length // call):
            seq = torch.randn(case.batch, call, DIM, device=case.device)

            def read(seq: torch.Tensor = seq) -> None:
                nonlocal state
                _, state = layer(seq, state=state)

            seconds += timed(read, 1, warmup=0)
            held.append(peak_memory(case))
    quarter = len(seconds) // 4
    first, last = (sorted(s)[len(s) // 2] for s in (seconds[2:quarter], seconds[-quarter:]))
    return {
        'seconds': seconds,
        'peak': held[-1],
        'peak after two calls': held[1],
        'first quarter': first / call,
        'last quarter': last / call,
    }


def longest(case: Case, repeats: int, mode: str) -> dict[str, Any]:
    """Double the length until memory runs out or the case's length is reached."""
    layer, length, tried = build(case), 4096, []
    while length <= case.length:
        torch.cuda.reset_peak_memory_stats()
        try:
            layer.zero_grad(set_to_none=True)
            seq = torch.randn(case.batch, length, DIM, device=case.device)
            started = time.perf_counter()
            layer(seq)[0].pow(2).mean().backward()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            break
        tried.append({'length': length, 'peak': peak_memory(case), 'seconds': time.perf_counter() - started})
        length *= 2
    return {
        'seconds': [t['seconds'] for t in tried],
        'peak': tried[-1]['peak'],
        'tried': tried,
        'out of memory at': length if length <= case.length else None,
        'memory of the device': torch.cuda.get_device_properties(0).total_memory,
    }


def work(case: dict[str, Any], repeats: int, mode: str) -> dict[str, Any]:
    kinds = {'step': step, 'growth': growth, 'stream': stream, 'longest': longest}
    return kinds[case['kind']](Case(**case), repeats, mode)


# the measurements


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    error = check(case)
    if not error < 1e-9:
        raise SystemExit(f'{case.name}: wrong by {error:.1e}, so nothing is timed')

    modes = {'ours': own_path()}
    if case.device == 'cuda' and case.kind in ('step', 'growth'):
        modes |= {'ours, CUDA graph': own_path()}
    if case.kind == 'step' and options.compile:
        modes |= {'ours, compiled, CUDA graph' if case.device == 'cuda' else 'ours, compiled': own_path()}
    if options.reference_path and case.kind in ('step', 'longest') and not case.checkpoint_every:
        modes |= {'reference': options.reference_path}

    rounds = options.rounds if case.kind == 'step' else 1
    figures = by_turns(__file__, modes, rounds, case=asdict(case), repeats=options.repeats)
    print(f'{case.kind} {case.name}: {json.dumps(figures)}', flush=True)
    return {'case': asdict(case), 'error': error, 'figures': figures}


def report(results: list[dict[str, Any]]) -> dict[str, str]:
    """One table per kind of measurement."""
    columns = {
        'step': ('median', '10 % to 90 %', 'peak memory', 'reference / this'),
        'growth': (f'per token of {SHORT:,}', 'per token of all', 'growth'),
        'stream': ('per token, first quarter', 'last quarter', 'peak after two calls', 'at the end'),
        'longest': (
            'longest tried that fits',
            'peak',
            'per token',
            'tokens that fit at this',
            'time',
            'out of memory at',
        ),
    }
    cells = {'step': _step_cells, 'growth': _growth_cells, 'stream': _stream_cells, 'longest': _longest_cells}
    tables = {}
    for kind, heads in columns.items():
        rows = []
        for result in (r for r in results if r['case']['kind'] == kind):
            for package, f in result['figures'].items():
                empty = [''] * (len(heads) - 1)
                own = [f'failed: {f["failed"]}', *empty] if 'failed' in f else cells[kind](f, result['figures'])
                rows.append([Case(**result['case']).name, package, *own])
        if rows:
            tables[kind] = table(['chunk, memory batch, B × N', 'package', *heads], rows)
    return tables


def _step_cells(f: dict[str, Any], all_figures: dict[str, Any]) -> list[str]:
    reference = all_figures.get('reference', {}).get('median')
    ratio = '–' if reference is None else f'{reference / f["median"]:.1f} ×'
    return [*milliseconds(f), gibibytes(f['peak']), ratio]


def _growth_cells(f: dict[str, Any], _: dict[str, Any]) -> list[str]:
    return [*(f'{f[length] * 1e6:.2f} µs' for length in ('short', 'long')), f'{(f["long"] / f["short"] - 1):+.1%}']


def _stream_cells(f: dict[str, Any], _: dict[str, Any]) -> list[str]:
    times = [f'{f[quarter] * 1e6:.1f} µs' for quarter in ('first quarter', 'last quarter')]
    return [*times, gibibytes(f['peak after two calls']), gibibytes(f['peak'])]


def _longest_cells(f: dict[str, Any], _: dict[str, Any]) -> list[str]:
    last, before = f['tried'][-1], f['tried'][-2]
    slope = (last['peak'] - before['peak']) / (last['length'] - before['length'])
    stop = f['out of memory at']
    return [
        f'{last["length"]}',
        gibibytes(last['peak']),
        f'{slope / 2**10:.1f} KiB',
        f'{f["memory of the device"] / slope:,.0f}',
        f'{last["seconds"]:.1f} s',
        'not reached' if stop is None else f'{stop}',
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, nargs='*', help='indices of the cases; default: all for this device')
    parser.add_argument('--kinds', nargs='*', default=['step'], help='step, growth, stream, longest; default: step')
    parser.add_argument('--repeats', type=int, default=5, help='timed steps in each process')
    parser.add_argument('--no-compile', dest='compile', action='store_false', help='leave out the compiled rows')
    parser.add_argument('--json', type=Path, help='append each case to this file')
    parser.add_argument('--report', type=Path, nargs='*', help='print tables of saved cases')
    options = parsed(parser, work)

    sys.path.insert(0, str(ROOT))
    if options.report:
        notes = [json.loads(line) for path in options.report for line in path.read_text().splitlines()]
        where = notes[0]['machine']
        results = sorted((note['result'] for note in notes), key=lambda r: CASES.index(Case(**r['case'])))
    else:
        device, where, results = 'cuda' if torch.cuda.is_available() else 'cpu', machine(), []
        indices = [i for i, case in enumerate(CASES) if case.device == device and case.kind in options.kinds]
        for index in options.cases or indices:
            results.append(measure(CASES[index], options))
            if options.json:
                with open(options.json, 'a') as notes:
                    notes.write(json.dumps({'machine': where, 'result': results[-1]}) + '\n')

    print(f'\n{where}')
    device = results[0]['case']['device']
    for kind, text in report(results).items():
        print(f'\n{kind}\n{text}')
        if options.write:
            write_section(f'layer, {kind}, {device}', f'{where}\n\n{text}')
    print(json.dumps({'machine': where, 'results': results}))


if __name__ == '__main__':
    main()
