"""A memory layer with gradients at the newest weights, compared with other sequence mixers of the same width.

    python benchmarks/peers.py                                   (about 4 minutes on a GPU)
    python benchmarks/peers.py --compile                         (a minute more for each row)
    python benchmarks/peers.py --compile --together              (2 to 3 minutes on 16 cores; --timeout 90: 114 s)
    python benchmarks/peers.py --together --tokens 131072 --lengths 2048 8192 32768 131072
    python benchmarks/peers.py --rows '*fla*' 'memory, depth 1*' (rows with such names)
    python benchmarks/peers.py --quick                           (a minute on a CPU: does it run?)

Every layer has a norm, projections of width 384 to four heads of 64, and a projection back. The number of tokens is
constant: at twice the length, there are half as many sequences. A row is the time of forward and backward under
autocast in bf16, as a CUDA graph if one can be captured; with `--compile`, also that of the layer compiled by
`torch.compile`. Before it is timed, a memory is compared with the dense backend in float64, and any other mixer with a
loop over tokens; the table has the error of its output in the row's precision. It also has the share of the GPU's bf16
rate that is reached, counting the products of which the layer and its recurrence consist, however they are computed.

The first step of rows of flash-linear-attention (package `fla-core`) searches for settings, which takes minutes if
other rows are prepared at the same time.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from harness import (
    captured,
    gibibytes,
    in_own_process,
    machine,
    own_path,
    parsed,
    table,
    timed,
    together,
    turn,
    write_section,
)
from mixers import DIM, DIM_HEAD, DIM_HIDDEN, HEADS, PEERS, Mixer
from torch import Tensor, nn

# rate of dense products in bf16, from NVIDIA's data sheets, by a part of the GPU's name
FLOPS_A_SECOND = {'H100': 989e12, 'H200': 989e12}
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@dataclass(frozen=True)
class Row:
    mixer: str
    chunk: int = 0
    memory_batch: int = 0
    depth: int = 0
    proximal: bool = False
    spectral: bool = False

    @property
    def name(self) -> str:
        if self.depth == 0:
            return self.mixer
        options = ', proximal steps' * self.proximal + ', spectral norm' * self.spectral
        return f'{self.mixer}, depth {self.depth}, ({self.chunk}, {self.memory_batch}){options}'

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `NeuralMemory`. A linear memory has no norm around it, as in the delta rule."""
        return {
            'dim': DIM,
            'dim_head': DIM_HEAD,
            'heads': HEADS,
            'chunk_size': self.chunk,
            'batch_size': self.memory_batch,
            'qk_rmsnorm': True,
            'default_step_transform_max_lr': 1e-2,
            'init_decay_bias': -3.0,
            'default_model_kwargs': {'depth': self.depth, 'expansion_factor': DIM_HIDDEN / DIM_HEAD},
            'mem_model_norm_add_residual': self.depth > 1,
            'spectral_norm_surprises': self.spectral,
            # options that the reference lacks
            **({'proximal_steps': True, 'normalized_momentum': True} if self.proximal else {}),
        }

    def flops(self, length: int) -> float:
        """Floating-point operations per token, forward and backward, in products of the projections and of the rule."""
        if self.depth == 0:
            peer = PEERS[self.mixer]
            gates, products = peer.gates, peer.products(length)
        else:
            # gates: step size, momentum, decay; a matrix is multiplied by keys, twice by gradients, and by queries
            widths = [DIM_HEAD, *[DIM_HIDDEN] * (self.depth - 1), DIM_HEAD]
            gates, products = 3 * HEADS, 4 * sum(a * b for a, b in pairwise(widths))
        projections = DIM * (4 * HEADS * DIM_HEAD + gates)
        return 3 * 2 * (projections + HEADS * products)


MEMORIES = [(1, 1, 1), (16, 16, 1), (64, 64, 1), (16, 16, 2), (32, 32, 2), (64, 64, 2), (4, 128, 2), (16, 16, 3)]
PROXIMAL = [(1, 1, 1), (16, 16, 1), (16, 16, 2), (32, 32, 2), (64, 64, 2)]
SPECTRAL = [(16, 128, 2), (64, 64, 2)]


def build(row: Row) -> tuple[nn.Module, nn.Module]:
    """A layer, and another with the same weights that computes the same exactly, in float64."""

    def build_one(exactly: bool) -> nn.Module:
        torch.manual_seed(0)
        if row.depth == 0:
            return Mixer(PEERS[row.mixer], exactly)
        from titans_pytorch import NeuralMemory

        # the reference has no engines
        has_engines = 'engine' in inspect.signature(NeuralMemory).parameters
        return NeuralMemory(**row.kwargs(), **({'engine': 'dense'} if exactly and has_engines else {}))

    return build_one(False).to(DEVICE), build_one(True).double()


def output(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    return out if isinstance(out, Tensor) else out[0]


def work(
    row: dict[str, Any],
    length: int,
    tokens: int,
    repeats: int,
    compiles: bool,
    gate: dict[str, Any] | None = None,
) -> dict[str, Any]:
    # TorchScript, which the reference's scan uses, fails on some GPUs to fuse casts to bfloat16
    torch._C._jit_set_texpr_fuser_enabled(False)
    layer, exact = build(Row(**row))

    def loss(x: Tensor) -> Tensor:
        # cached casts of weights would be stale in later replays
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            return output(layer, x)

    tokens_checked = 256 if row['depth'] else max(256, 2 * PEERS[row['mixer']].chunk + 64)
    short = torch.randn(1, tokens_checked, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = output(exact, short)
        error = (loss(short.float().to(DEVICE)).cpu() - expected).norm() / expected.norm()
    if not error < 0.05:
        raise SystemExit(f'wrong by {error:.1e}, so nothing is timed')

    x = torch.randn(tokens // length, length, DIM, device=DEVICE)
    gradient = torch.randn_like(x)

    def prepared(forward: Callable[[Tensor], Tensor]) -> tuple[Callable[[], Any], bool]:
        """A step, and whether it is a CUDA graph."""

        def step() -> None:
            layer.zero_grad(set_to_none=True)
            forward(x).backward(gradient.to(torch.bfloat16))

        step()
        run, captures = step, DEVICE == 'cuda'
        if captures:
            try:
                run = captured(step)
            except RuntimeError:  # some kernel cannot be captured
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                captures = False
        run()
        return run, captures

    run, captures = prepared(loss)
    peak = torch.cuda.max_memory_allocated() if DEVICE == 'cuda' else None
    run_compiled = prepared(torch.compile(loss, dynamic=False))[0] if compiles else None
    with turn(gate):
        seconds = timed(run, repeats)
        compiled = None if run_compiled is None else timed(run_compiled, repeats)
    return {'seconds': seconds, 'compiled': compiled, 'peak': peak, 'error': error.item(), 'captures': captures}


def all_rows() -> list[Row]:
    rows = [Row('memory', *sizes) for sizes in MEMORIES]
    rows += [Row('memory', *sizes, proximal=True) for sizes in PROXIMAL]
    return rows + [Row('memory', *sizes, spectral=True) for sizes in SPECTRAL] + [Row(name) for name in PEERS]


def measured(jobs: list[tuple[Row, str, str]], length: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures of each job, which is a row, its name, and the PYTHONPATH of the package."""
    sizes = dict(length=length, tokens=options.tokens, repeats=options.repeats)
    arguments = [
        (path, dict(row=asdict(row), **sizes, compiles=options.compile and path != options.reference_path))
        for row, _, path in jobs
    ]
    # the reference may need the memory of the whole GPU, so it runs last and alone
    side_by_side = [job for job in arguments if options.together and job[0] != options.reference_path]
    by_themselves = arguments[len(side_by_side) :]
    yield from together(__file__, side_by_side, options.timeout) if side_by_side else ()
    yield from (in_own_process(__file__, path, options.timeout, **job) for path, job in by_themselves)


def best(figures: dict[str, Any]) -> float:
    """The shorter of the two median times, uncompiled and compiled."""
    return min(statistics.median(seconds) for seconds in (figures['seconds'], figures['compiled']) if seconds)


def milliseconds(seconds: float) -> str:
    return f'{seconds * 1e3:.2f} ms' if seconds < 0.1 else f'{seconds * 1e3:.0f} ms'


def time_as_it_is(figures: dict[str, Any]) -> str:
    eager = '' if figures['captures'] or DEVICE == 'cpu' else ', eager'
    return f'{milliseconds(statistics.median(figures["seconds"]))}{eager}'


def share_of_rate(row: Row, length: int, tokens: int, figures: dict[str, Any]) -> str:
    """Share of the rate of dense products in bf16, if the GPU's rate is known."""
    name = torch.cuda.get_device_name() if DEVICE == 'cuda' else ''
    rate = next((rate for part, rate in FLOPS_A_SECOND.items() if part in name), None)
    return '–' if rate is None else f'{row.flops(length) * tokens / best(figures) / rate:.1%}'


def of_one_length(jobs: list[tuple[Row, str, str]], results: list[dict[str, Any]], length: int, tokens: int) -> str:
    """Table of all figures."""
    heads = ['layer', 'forward and backward', 'compiled', 'tokens/s', 'of the rate', 'peak memory', 'error']
    cells = []
    for (row, name, _), figures in zip(jobs, results):
        if 'failed' in figures:
            cells.append([name, figures['failed'].split('. ')[0], *[''] * (len(heads) - 2)])
            continue
        compiled = figures['compiled']
        cells.append(
            [
                name,
                time_as_it_is(figures),
                milliseconds(statistics.median(compiled)) if compiled else '–',
                f'{tokens / best(figures) / 1e6:.2f} M',
                share_of_rate(row, length, tokens, figures),
                gibibytes(figures['peak']),
                f'{figures["error"]:.1e}',
            ]
        )
    return table(heads, cells)


def of_lengths(
    jobs: list[tuple[Row, str, str]], results: list[list[dict[str, Any]]], lengths: list[int], tokens: int
) -> str:
    """Table of times, with a column for each length."""
    cells = []
    for (row, name, _), *figures in zip(jobs, *results):
        times = ['failed' if 'failed' in own else time_as_it_is(own) for own in figures]
        last = figures[-1]
        share = '–' if 'failed' in last else share_of_rate(row, lengths[-1], tokens, last)
        cells.append([name, *times, share])
    heads = ['layer', *(f'{length:,} tokens' for length in lengths), 'of the rate, longest']
    return table(heads, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--lengths', type=int, nargs='+', default=[2048], help='tokens of a sequence')
    parser.add_argument('--tokens', type=int, default=32_768, help='tokens of a step')
    parser.add_argument('--rows', nargs='+', default=['*'], help='only rows whose names match one of these patterns')
    parser.add_argument('--repeats', type=int, default=20, help='timed steps')
    parser.add_argument('--compile', action='store_true', help='time each layer compiled too')
    parser.add_argument('--timeout', type=float, default=180.0, help='seconds after which a row is given up')
    parser.add_argument('--together', action='store_true', help='prepare all rows of a length at the same time')
    parser.add_argument('--quick', action='store_true', help='few tokens')
    options = parsed(parser, work)
    if options.quick:
        options.lengths, options.tokens, options.repeats = [256], 512, 3

    jobs = [(row, row.name, own_path()) for row in all_rows()]
    if options.reference_path:
        jobs.append((Row('memory', 16, 16, 2), 'reference, depth 2, (16, 16)', options.reference_path))
    jobs = [job for job in jobs if any(fnmatchcase(job[1], pattern) for pattern in options.rows)]
    results: list[list[dict[str, Any]]] = []
    for length in options.lengths:
        results.append([])
        for (_, name, _), figures in zip(jobs, measured(jobs, length, options)):
            print(json.dumps({'row': name, 'length': length, **figures}), flush=True)
            results[-1].append(figures)
        if len(options.lengths) == 1:
            section, own = 'peers', of_one_length(jobs, results[0], length, options.tokens)
            size = f'sequences of {length:,} tokens, {options.tokens:,} in all'
        else:
            # also after each length, as a run may be stopped
            so_far = options.lengths[: len(results)]
            section, own = 'peers by length', of_lengths(jobs, results, so_far, options.tokens)
            size = f'{options.tokens:,} tokens'
        text = f'{machine()}, {size}\n\n{own}'
        print(f'\n{text}')
        if options.write:
            write_section(f'{section}, {DEVICE}', text)


if __name__ == '__main__':
    main()
