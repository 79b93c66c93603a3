"""Tokens per second of sampling with a cache, compared with the reference.

    python benchmarks/decoding.py                                              (this package alone)
    python benchmarks/decoding.py --reference-path /folder/with/the/reference  (a folder to put on PYTHONPATH)
    python benchmarks/decoding.py --repeats 5 --write

On a GPU, the model is that of `train_mac.py --preset full`, at batch 1 and 64, with and without CUDA graphs; on a CPU
it is that of `--preset quick`, at batch 1, with and without compiled steps. Decoding is timed only if it is right: the
steps of a small model in float64 are compared with one pass over the whole sequence. This package and the reference run
alternately, each in a new process. A timed call of `sample` includes reading the prompt of 64 tokens. The first call,
which captures CUDA graphs and compiles, is reported separately.

The last line of output is JSON; `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from beside_reference import load_train_mac
from harness import ROOT, by_turns, gibibytes, machine, own_path, parsed, table, timed, write_section

PROMPT = 64


@dataclass(frozen=True)
class Case:
    device: str
    preset: str
    batch: int


CASES = [Case('cpu', 'quick', 1), Case('cuda', 'full', 1), Case('cuda', 'full', 64)]

# new tokens per call: fewer in slow modes
TOKENS = {'ours': 4096, 'ours, no CUDA graphs': 128, 'reference': 48}
TOKENS_ON_CPU = 128


def small_model() -> torch.nn.Module:
    from titans_pytorch import MemoryAsContextTransformer

    torch.manual_seed(0)
    return MemoryAsContextTransformer(
        num_tokens=16,
        dim=32,
        depth=3,
        heads=2,
        dim_head=16,
        segment_len=6,
        num_persist_mem_tokens=2,
        num_longterm_mem_tokens=2,
        neural_memory_layers=(2, 3),
        neural_memory_segment_len=4,
        neural_memory_batch_size=8,
        neural_memory_qkv_receives_diff_views=True,
        neural_mem_weight_residual=True,
        neural_memory_kwargs={'heads': 2, 'dim_head': 16, 'qk_rmsnorm': True, 'spectral_norm_surprises': True},
        sliding_window_attn=True,
    )


def check(device: str) -> float:
    """Largest relative error of a small model's steps in float64."""
    from tests.compare import all_in_float64
    from titans_pytorch.generation.stepper import Stepper

    with torch.no_grad(), all_in_float64():
        model = small_model().double().to(device).eval()
        ids = torch.randint(0, 16, (2, 60), device=device)
        whole = model(ids)
        _, cache = model(ids[:, :7], return_cache=True)
        step = Stepper.of(model, cache, cuda_graphs=None)
        steps = torch.stack([step(token).clone() for token in ids[:, 7:].unbind(1)], dim=1)
    return ((steps - whole[:, 7:]).abs().max() / whole.abs().max()).item()


def work(case: dict[str, Any], mode: str, repeats: int) -> dict[str, Any]:
    """The job of a worker process, on whichever package it imports."""
    import titans_pytorch

    device, batch = case['device'], case['batch']
    train_mac = load_train_mac()
    options = {'PRESET': case['preset'], 'DEVICE': device, 'USE_ACCELERATED_SCAN': False, 'USE_FLEX_ATTN': False}
    model = train_mac.build_model(train_mac.config_from_options(options)).eval()

    tokens = TOKENS[mode] if device == 'cuda' else TOKENS_ON_CPU
    prompt = torch.randint(0, 256, (batch, PROMPT), device=device)
    kwargs = {'use_cache': True, 'show_progress': False, 'compiled': 'compiled' in mode}
    kwargs['cuda_graphs'] = False if 'no CUDA' in mode else None
    known = inspect.signature(model.sample).parameters
    kwargs = {name: value for name, value in kwargs.items() if name in known}

    def sample() -> None:
        model.sample(prompt, PROMPT + tokens, **kwargs)

    started = time.perf_counter()
    sample()
    first = time.perf_counter() - started
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(sample, repeats, warmup=0)
    return {
        'seconds': [s / tokens for s in seconds],
        'peak': torch.cuda.max_memory_allocated() if device == 'cuda' else None,
        'first call': first,
        'tokens': tokens,
        'threads': torch.get_num_threads(),
        'package': titans_pytorch.__file__,
    }


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    modes = {'ours': own_path()}
    modes |= {'ours, no CUDA graphs' if case.device == 'cuda' else 'ours, compiled': own_path()}
    if options.reference_path:
        modes |= {'reference': options.reference_path}
    job = {'case': asdict(case), 'repeats': options.repeats}
    figures = by_turns(__file__, modes, options.rounds, options.timeout, **job)
    print(f'{case}: {json.dumps(figures)}', flush=True)
    return {'case': asdict(case), 'figures': figures}


def report(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        case, figures = Case(**result['case']), result['figures']
        reference = figures.get('reference', {}).get('median')
        for package, f in figures.items():
            own = [f'failed: {f["failed"]}', *[''] * 4] if 'failed' in f else _cells(f, case.batch, reference)
            rows.append([case.preset, str(case.batch), package, *own])
    heads = ['tokens/s', '10 % to 90 %', 'first call', 'peak memory', 'this / reference']
    return table(['preset', 'batch', 'package', *heads], rows)


def _cells(f: dict[str, Any], batch: int, reference: float | None) -> list[str]:
    speed, low, high = (f'{batch / f[key]:,.0f}' for key in ('median', 'high', 'low'))
    ratio = '–' if reference is None else f'{reference / f["median"]:.1f} ×'
    first = f'{f["first call"]:.1f} s for {f["tokens"]} tokens'
    return [speed, f'{low}–{high}', first, gibibytes(f['peak']), ratio]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3, help='timed calls in each process')
    parser.add_argument('--timeout', type=float, default=600.0, help='time limit of a process, in seconds')
    options = parsed(parser, work)

    sys.path.insert(0, str(ROOT))
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    error = check(device)
    print(f'largest error of steps, float64: {error:.1e}', flush=True)
    if not error < 1e-9:
        raise SystemExit(f'decoding is wrong by {error:.1e}, so nothing is timed')

    results = [measure(case, options) for case in CASES if case.device == device]
    threads = '' if device == 'cuda' else f', {torch.get_num_threads()} threads'
    text = f'{machine()}{threads}, fp32\n\n{report(results)}'
    print(f'\n{text}')
    if options.write:
        write_section(f'decoding, {device}', text)
    print(json.dumps({'machine': machine(), 'error': error, 'results': results}))


if __name__ == '__main__':
    main()
