"""Whether all architectures train on windows of any length, in both precisions.

    python benchmarks/tasks/lengths.py --data train.gz --memory-batch 16 --json runs.jsonl
    python benchmarks/tasks/lengths.py --report runs.jsonl --write

Each model takes a few steps on random windows of text, from the same weights at every length, and with the same number
of bytes per step unless a single window is longer. A row has the loss of the last steps, which should fall from eight
bits per byte, and the largest norm of a gradient before clipping.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import models
import runs
import text as texts
import torch
from harness import table, write_section
from torch import Tensor, nn

SIZES = {'dim': 64, 'depth': 2, 'dim_head': 32, 'segment_len': 64, 'neural_memory_segment_len': 16}
NAMES = [name for name in models.ARCHITECTURES if name != 'attention alone'] + ['gated delta rule']


def loss(low: bool, model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=low):
        return model(batch, return_loss=True)


def run(name: str, seed: int, training: runs.Training, options: argparse.Namespace, **sizes: Any) -> dict[str, Any]:
    """Train one model at every length, in every precision."""
    text = texts.read(options.data).long().to(training.device)
    found = []
    for length in options.lengths:
        for low in (False, True):
            model = models.build(name, seed, num_tokens=256, **{**SIZES, **sizes}).to(training.device)
            trainer = runs.Trainer(model, partial(loss, low), training)
            generator = torch.Generator(training.device).manual_seed(seed)
            windows = texts.windows(text, max(1, options.tokens // length), length + 1, generator)
            losses, norms = [], []
            for _ in range(training.steps):
                losses.append(trainer.step(next(windows)).item() / math.log(2))
                norms.append(trainer.norm.item())
            last = sum(losses[-3:]) / 3
            found.append({'length': length, 'low': low, 'first': losses[0], 'last': last, 'norm': max(norms)})
            print(f'  {found[-1]}', flush=True)
    return {'steps': training.steps, 'found': found}


def main() -> None:
    parser = runs.parser(__doc__ or '', NAMES, steps=40, small_steps=40, pictures=False)
    parser.add_argument('--data', type=Path, help='a file of text, gzipped or not; default: enwik8 in data/')
    parser.add_argument('--lengths', type=int, nargs='+', default=[512, 2048, 8192, 16_384], help='bytes of a window')
    parser.add_argument('--tokens', type=int, default=4096, help='bytes of a step, but at least one window')
    parser.set_defaults(seeds=1, learning_rate=3e-3)
    options = parser.parse_args()
    where, results = runs.measured(options, partial(run, options=options, **runs.settings(options, {})))
    rows = []
    for result in results:
        for precision, low in (('fp32', False), ('bf16', True)):
            own = [found for found in result['found'] if found['low'] == low]
            rows.append([result['model'], precision, *(f'{f["last"]:.2f} ({f["norm"]:.1f})' for f in own)])
    lengths = [f'{found["length"]:,}' for found in results[0]['found'] if not found['low']]
    written = f'{where}\n\n{table(["model", "precision", *lengths], rows)}'
    print(f'\n{written}')
    if options.write:
        write_section('task, lengths', written)


if __name__ == '__main__':
    main()
