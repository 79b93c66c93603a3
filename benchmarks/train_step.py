"""Forward and backward of `train_mac.py`'s model on one micro batch, ours and the reference's beside it.

    python benchmarks/train_step.py --reference-path /folder/with/the/reference --write
    python benchmarks/train_step.py --batches 4 64 --precisions bf16

On a GPU the full preset, eager and as the CUDA graph that `train_mac.py` records; on a CPU the quick preset, eager.
Ours and the reference run by turns, each time in a process of its own. `tests/test_golden.py` and `tests/test_gpu.py`
compare their numbers; here both start from the same seed, and a loss that differs by more than 1 % is no figure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from beside_reference import load_train_mac
from harness import by_turns, gibibytes, machine, milliseconds, own_path, parsed, table, timed, write_section

GPU = torch.cuda.is_available()


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
            'USE_ACCELERATED_SCAN': False,  # the reference's stops with an illegal memory access on an H200
        }
    )
    model = train_mac.build_model(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # the reference's are views of one storage
    step = train_mac.MicroStep(model, config, train_mac.choose_machine(config))
    inputs = torch.randint(0, 256, (batch, config.SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))

    def forward_and_backward() -> float:
        loss = step(inputs)
        model.zero_grad(set_to_none='graph' not in mode)
        return loss

    loss = forward_and_backward().item()
    seconds = timed(forward_and_backward, repeats)
    peak = torch.cuda.max_memory_allocated() if GPU else None
    return {'seconds': seconds, 'peak': peak, 'loss': loss, 'tokens': batch * config.SEQ_LEN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batches', type=int, nargs='*', default=[4])
    parser.add_argument('--precisions', nargs='*', default=['fp32', 'bf16'] if GPU else ['fp32'])
    parser.add_argument('--repeats', type=int, default=5, help='timed steps in each process')
    parser.add_argument('--json', type=Path, help='write the figures to this file')
    options = parsed(parser, work)

    paths = {'ours': own_path(), **({'ours, CUDA graph': own_path()} if GPU else {})}
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
                    rows.append([f'{batch}', precision, mode, f'failed: {f["failed"]}', '', '', '', ''])
                    continue
                if abs(f['loss'] / reference.get('loss', f['loss']) - 1) > 0.01:
                    raise SystemExit(f'{mode}: a loss of {f["loss"]} where the reference has {reference["loss"]}')
                speed = f'{f["tokens"] / f["median"]:,.0f}'
                ratio = f'{reference["median"] / f["median"]:.1f} ×' if 'median' in reference else '–'
                rows.append([f'{batch}', precision, mode, *milliseconds(f), speed, gibibytes(f['peak']), ratio])

    where = machine()
    heads = ['batch', 'precision', 'package', 'median', '10 % to 90 %', 'tokens/s', 'peak memory', 'reference / this']
    print(f'\n{where}\n\n{table(heads, rows)}')
    if options.write:
        write_section(f'train step, {"cuda" if GPU else "cpu"}', f'{where}\n\n{table(heads, rows)}')
    line = json.dumps({'machine': where, 'results': results})
    if options.json:
        options.json.write_text(line)
    print(line)


if __name__ == '__main__':
    main()
