"""Training steps of `train_mac.py` on several GPUs: tokens per second, replicated (DDP) and sharded (FSDP2).

    python benchmarks/scaling.py                      # the full preset on 1, 2, 4, … GPUs of this machine
    python benchmarks/scaling.py --processes 1 2      # the quick preset on that many processes where there is no GPU

The processes share the micro batches of a step, so a step is the same for any number of processes. Each count runs
under `torchrun`, as the script does. First its gradients are compared with those of one process, in fp32; a difference
of more than one part in a thousand stops the benchmark. On a GPU, with the script's defaults, replicated steps are
compiled and captured as CUDA graphs; for a sharded model, the layers are compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import torch
from beside_reference import load_train_mac
from harness import gibibytes, machine, milliseconds, own_path, summary, table, timed, write_section

GPU = torch.cuda.is_available()


def settings(options: argparse.Namespace, **changes: Any) -> Any:
    train_mac = load_train_mac()
    preset = {'PRESET': 'full'} if GPU else {**train_mac.PRESETS['quick'], 'PRESET': 'quick'}
    sizes = {'BATCH_SIZE': options.batch_size, 'GRADIENT_ACCUMULATE_EVERY': options.micro_batches}
    return train_mac.Config(**{**preset, **sizes, 'FSDP': options.mode == 'FSDP2', **changes})


def gradient_error(options: argparse.Namespace) -> float:
    """The difference between the gradients and those of one process, relative to their norm."""
    from titans_pytorch.training import MicroStep, choose_machine, shard, share, whole_tensor

    train_mac = load_train_mac()
    small = {'DEPTH': 2, 'NEURAL_MEM_LAYERS': (1, 2), 'SEQ_LEN': 128, 'PRECISION': 'fp32'}
    config = settings(options, USE_CUDA_GRAPHS=False, COMPILE=False, **small)
    where = choose_machine(precision='fp32', cuda_graphs=False, compile=False)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 256, (options.micro_batches, 1, config.SEQ_LEN + 1), generator=generator)

    alone = train_mac.build_model(config).to(where.device)
    for inputs in batches.to(where.device):
        (alone(inputs, return_loss=True) / options.micro_batches).backward()
    together = train_mac.build_model(config)
    if config.FSDP:
        shard(together, where.device)
    MicroStep(together, where, options.micro_batches).accumulate(share(batches))
    gradients = [
        (whole_tensor(own.grad), other.grad)
        for own, other in zip(together.parameters(), alone.parameters(), strict=True)
        if own.grad is not None or other.grad is not None
    ]
    error, size = (
        torch.stack([tensor.norm() for tensor in tensors]).norm()
        for tensors in zip(*((own - other, other) for own, other in gradients))
    )
    return (error / size).item()


def work(options: argparse.Namespace) -> None:
    """The work of one process. The first process prints the figures."""
    from titans_pytorch.training import MicroStep, process_group, rank, shard, share

    train_mac = load_train_mac()
    with process_group():
        config = settings(options)
        where = train_mac.choose_machine(config)
        error = gradient_error(options)
        if not error <= 1e-3:
            raise SystemExit(f'{options.mode}: gradients differ from those of one process by {error:.1e}')
        model = train_mac.build_model(config)
        if config.FSDP:
            shard(model, where.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.LEARNING_RATE, weight_decay=0.0, fused=GPU)
        micro_step = MicroStep(model, where, options.micro_batches)
        generator = torch.Generator().manual_seed(0)
        shape = (options.micro_batches, config.BATCH_SIZE, config.SEQ_LEN + 1)
        batches = torch.randint(0, 256, shape, generator=generator)

        def step() -> None:
            micro_step.accumulate(share(batches))
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()

        started = time.perf_counter()
        step()
        first = time.perf_counter() - started
        seconds = timed(step, options.repeats)
        peak = torch.cuda.max_memory_reserved() if GPU else None
        tokens = shape[0] * shape[1] * config.SEQ_LEN
        if rank() == 0:
            print(json.dumps({'seconds': seconds, 'peak': peak, 'tokens': tokens, 'first': first, 'error': error}))


def measured(options: argparse.Namespace, mode: str, processes: int) -> dict[str, Any]:
    """Figures of a run under torchrun; `{'failed': reason}` if it fails."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', __file__]
    for name in ('batch_size', 'micro_batches', 'repeats'):
        command += [f'--{name.replace("_", "-")}', str(getattr(options, name))]
    path = {**os.environ, 'PYTHONPATH': own_path()}
    done = subprocess.run([*command, '--mode', mode], capture_output=True, text=True, check=False, env=path)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        reasons = [line for line in done.stderr.splitlines() if re.search(r'(Error|Exit|differ)\b', line)]
        return {'failed': reasons[0][-200:] if reasons else f'status {done.returncode}'}
    return summary([json.loads(done.stdout.splitlines()[-1])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    most = max(torch.cuda.device_count(), 2 - GPU)
    parser.add_argument('--processes', type=int, nargs='*', default=[n for n in (1, 2, 4, 8) if n <= most])
    parser.add_argument('--batch-size', type=int, default=4, help='windows per micro batch')
    parser.add_argument(
        '--micro-batches', type=int, default=8, help='micro batches per step, of all processes together'
    )
    parser.add_argument('--repeats', type=int, default=20, help='timed steps')
    parser.add_argument('--modes', nargs='+', default=['DDP', 'FSDP2'], help='default: both')
    parser.add_argument('--write', action='store_true', help='put the table into docs/benchmarks.md')
    parser.add_argument('--mode', choices=('DDP', 'FSDP2'), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode is not None:
        work(options)
        return

    rows, results = [], []
    for mode in options.modes:
        alone = None
        for processes in options.processes:
            figures = measured(options, mode, processes)
            results.append({'mode': mode, 'processes': processes, **figures})
            print(json.dumps(results[-1]), flush=True)
            if 'failed' in figures:
                rows.append([mode, f'{processes}', f'failed: {figures["failed"]}', *[''] * 6])
                continue
            speed = figures['tokens'] / figures['median']
            alone = alone or speed / processes
            own = [f'{speed:,.0f}', f'{speed / alone:.2f} ×', gibibytes(figures['peak']), f'{figures["first"]:.0f} s']
            rows.append([mode, f'{processes}', *milliseconds(figures), *own, f'{figures["error"]:.1e}'])
    heads = ['', 'processes', 'step', '10 % to 90 %', 'tokens/s', 'ratio', 'reserved memory', 'first step']
    heads.append('error of gradients')
    command = f'`python benchmarks/scaling.py {" ".join(sys.argv[1:])}`'.replace(' `', '`')
    text = (
        f'{machine()}; {options.micro_batches} micro batches of {options.batch_size}; {command}\n\n{table(heads, rows)}'
    )
    print(f'\n{text}')
    if options.write:
        write_section(f'scaling, {"cuda" if GPU else "cpu"}', text)
    if any('failed' in result for result in results):
        sys.exit(1)


if __name__ == '__main__':
    main()
