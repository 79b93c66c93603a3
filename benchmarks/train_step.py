"""Forward and backward of the model of `train_mac.py` on one micro batch, compared with the reference.

    python benchmarks/train_step.py --reference-path /folder/with/the/reference --write
    python benchmarks/train_step.py --batches 4 64 --precisions bf16

On a GPU, it runs the full preset: eager, captured as a CUDA graph, and compiled and captured, which is the default of
`train_mac.py`; and the last once more without memory layers, to show their share. On a CPU, it runs the quick preset,
eager and compiled. This package and the reference run alternately, each time in a new process. `tests/test_golden.py`
and `tests/integration/test_gpu.py` compare their numbers; here, both start from the same seed, and the script stops if
their losses differ by more than 1 %.

The last column is the model FLOP utilisation: the matrix products in the model's equations, forward and twice that for
backward, over the peak rate of the tensor cores in bf16 without sparsity.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from beside_reference import load_train_mac
from harness import by_turns, gibibytes, machine, milliseconds, own_path, parsed, table, timed, write_section

GPU = torch.cuda.is_available()
PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}
"""Peak dense bf16 rate by a part of the device name."""
NO_MEMORY = 'ours, compiled, CUDA graph, no memory layers'


def model_flops(model: torch.nn.Module, config: Any) -> float:
    """Floating-point operations of the matrix products in one forward and backward. They depend only on the model, not
    on operations that an implementation adds, repeats or saves."""
    positions = config.BATCH_SIZE * model.num_positions(config.SEQ_LEN)
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    keys = config.WINDOW_SIZE + config.NUM_LONGTERM_MEM + config.NUM_PERSIST_MEM
    attention = config.DEPTH * 4 * keys * config.HEADS * config.DIM_HEAD

    # per memory matrix: the forward of a row, its gradients by input and by weight, and the retrieval of a query
    stored, chunks = 8.0, 1 / config.NEURAL_MEM_SEGMENT_LEN
    matrices = [w[0] for memory in model._memories for w in memory.memory_model_parameters if w.ndim > 2]
    memory = sum(stored * w.numel() for w in matrices) * config.NEURAL_MEM_HEADS
    if config.NEURAL_MEM_SPEC_NORM_SURPRISES:
        sides = [sorted(w.shape) for w in matrices]
        of_one = sum(5 * (4 * short * short * long + 2 * short**3) for short, long in sides)
        memory += of_one * config.NEURAL_MEM_HEADS * chunks
    return 3.0 * positions * (linear + attention + memory)


def work(batch: int, precision: str, repeats: int, mode: str) -> dict[str, Any]:
    train_mac = load_train_mac()
    settings = {'PRESET': 'full', 'DEVICE': 'cuda'} if GPU else {**train_mac.PRESETS['quick'], 'PRESET': 'quick'}
    config = train_mac.Config(
        **{
            **settings,
            'BATCH_SIZE': batch,
            'PRECISION': precision,
            'GRADIENT_ACCUMULATE_EVERY': 1,
            'USE_CUDA_GRAPHS': 'graph' in mode,
            'COMPILE': 'compiled' in mode,
            **({'NEURAL_MEM_LAYERS': ()} if mode == NO_MEMORY else {}),
            'USE_ACCELERATED_SCAN': False,  # in the reference it stops with an illegal memory access on an H200
        }
    )
    model = train_mac.build_model(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # in the reference they are views of one storage
    step = train_mac.MicroStep(model, train_mac.choose_machine(config))
    inputs = torch.randint(0, 256, (batch, config.SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters())  # only for its `zero_grad`, which handles all gradients at once

    def forward_and_backward() -> float:
        loss = step(inputs)
        optimizer.zero_grad()
        return loss

    started = time.perf_counter()
    loss = forward_and_backward().item()
    first = time.perf_counter() - started
    seconds = timed(forward_and_backward, repeats)
    peak = torch.cuda.max_memory_allocated() if GPU else None
    figures = {'seconds': seconds, 'peak': peak, 'loss': loss, 'tokens': batch * config.SEQ_LEN, 'first': first}
    return figures if mode == 'reference' else {**figures, 'flops': model_flops(model, config)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batches', type=int, nargs='*', default=[4])
    parser.add_argument('--precisions', nargs='*', default=['fp32', 'bf16'] if GPU else ['fp32'])
    parser.add_argument('--modes', nargs='*', help='only these modes of this package')
    parser.add_argument('--repeats', type=int, default=5, help='timed steps in each process')
    parser.add_argument('--json', type=Path, help='write the figures to this file')
    options = parsed(parser, work)

    own_modes = (
        ['ours', 'ours, CUDA graph', 'ours, compiled, CUDA graph', NO_MEMORY] if GPU else ['ours', 'ours, compiled']
    )
    paths = {mode: own_path() for mode in own_modes}
    if options.modes:
        paths = {mode: path for mode, path in paths.items() if mode in options.modes}
    if options.reference_path:
        paths['reference'] = options.reference_path
    rows, results = [], []
    for batch in options.batches:
        for precision in options.precisions:
            figures = by_turns(
                __file__, paths, options.rounds, batch=batch, precision=precision, repeats=options.repeats
            )
            print(f'{batch}, {precision}: {json.dumps(figures)}', flush=True)
            results.append({'batch': batch, 'precision': precision, 'figures': figures})
            reference = figures.get('reference', {})
            for mode, f in figures.items():
                if 'failed' in f:
                    rows.append([f'{batch}', precision, mode, f'failed: {f["failed"]}', *[''] * 6])
                    continue
                if mode != NO_MEMORY and not abs(f['loss'] / reference.get('loss', f['loss']) - 1) <= 0.01:
                    raise SystemExit(f'{mode}: the loss is {f["loss"]}, and {reference["loss"]} in the reference')
                speed = f'{f["tokens"] / f["median"]:,.0f}'
                ratio = f'{reference["median"] / f["median"]:.1f} ×' if 'median' in reference else '–'
                peak = next((rate for name, rate in PEAK_FLOPS.items() if GPU and name in machine()), None)
                used = f'{f["flops"] / f["median"] / peak:.1%}' if peak and 'flops' in f else '–'
                own = [*milliseconds(f), f'{f["first"]:.0f} s', speed, gibibytes(f['peak']), ratio, used]
                rows.append([f'{batch}', precision, mode, *own])

    where = machine()
    heads = ['batch', 'precision', 'package', 'median', '10 % to 90 %', 'first step', 'tokens/s', 'peak memory']
    heads += ['reference / this', 'FLOP utilisation']
    print(f'\n{where}\n\n{table(heads, rows)}')
    if options.write:
        write_section(f'train step, {"cuda" if GPU else "cpu"}', f'{where}\n\n{table(heads, rows)}')
    line = json.dumps({'machine': where, 'results': results})
    if options.json:
        options.json.write_text(line)
    print(line)


if __name__ == '__main__':
    main()
