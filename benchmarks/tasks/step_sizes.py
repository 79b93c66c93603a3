"""Associative recall by step size, chunk and depth of the memory, with plain and with proximal steps.

    python benchmarks/tasks/step_sizes.py --json runs.jsonl             (a CPU, one seed: two hours)
    python benchmarks/tasks/step_sizes.py --report runs.jsonl --write

A small `LongTermMemoryModel` trains on MQAR (see `mqar.py`), with gradients of its memories at the newest weights: 4
pairs in 32 tokens for chunks of 4 tokens, 16 pairs in 128 tokens for chunks of 16. In a linear memory, a plain step of
size 1 moves the value of a key all the way to its target. Step sizes start there, and can learn to be twice as large.
Training counts as diverged if the loss is not finite, or above 50.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import models
import mqar
import runs
import torch

from titans_pytorch import LongTermMemoryModel
from titans_pytorch.presets import memory_settings

VOCABULARY, TOKENS = 64, 1024
DIM, DIM_HEAD = 64, 32
# tokens per chunk: tokens and pairs per sequence
SEQUENCES = {4: (32, 4), 16: (128, 16)}
DEPTHS = (1, 2, 3)
STEP_SIZES = {'1/16': 1 / 16, '1/4': 1 / 4, '1': 1.0, '4': 4.0}
STEPS = ('plain', 'proximal')


def cell(chunk: int, depth: int, kind: str, size: str) -> str:
    """Name of a cell of the table."""
    return f'chunk {chunk}, depth {depth}, {kind}, {size}'


CELLS = {cell(*own): own for own in itertools.product(SEQUENCES, DEPTHS, STEPS, STEP_SIZES)}


def run(name: str, seed: int, training: runs.Training) -> dict[str, Any]:
    """Train one model until it diverges, or for all steps, and test it on sequences of the training length.

    `training.seconds` has no effect.
    """
    chunk, depth, kind, size = CELLS[name]
    torch.manual_seed(seed)
    memory = memory_settings(
        DIM // DIM_HEAD,
        DIM_HEAD,
        chunk,
        default_model_kwargs={'depth': depth, 'expansion_factor': 2.0},
        default_step_transform_max_lr=STEP_SIZES[size] * DIM_HEAD,
        init_adaptive_step_bias=None,
        proximal_steps=kind == 'proximal',
    )
    model = LongTermMemoryModel(
        num_tokens=VOCABULARY,
        dim=DIM,
        depth=2,
        heads=DIM // DIM_HEAD,
        dim_head=DIM_HEAD,
        neural_memory_segment_len=chunk,
        neural_memory_batch_size=chunk,
        neural_memory_kwargs=memory,
    ).to(training.device)
    trainer = runs.Trainer(model, mqar.loss, training)
    generator = torch.Generator(training.device).manual_seed(seed)
    batches = mqar.batches([SEQUENCES[chunk]], TOKENS, VOCABULARY, generator)
    result = {'parameters': models.num_parameters(model), 'steps': training.steps, 'accuracy': math.nan}
    for step in range(training.steps):
        if not trainer.step(*next(batches)).item() <= 50:
            return {**result, 'steps': step}
    held_out = torch.Generator(training.device).manual_seed(10_000 + seed)
    return {**result, 'accuracy': mqar.accuracy(model, *SEQUENCES[chunk], VOCABULARY, held_out)}


def main() -> None:
    parser = runs.parser(__doc__ or '', [*CELLS], steps=400, small_steps=20, pictures=False)
    parser.set_defaults(seeds=1, learning_rate=5e-3)
    options = parser.parse_args()
    if options.memory_batch is not None or options.memory:
        parser.error('--memory-batch and --memory: memories have the settings of each row here')
    settings = runs.settings(options, {})
    where, results = runs.measured(options, partial(run, **settings))
    grouped, rows = runs.by_model(results), []
    for chunk, depth, kind in itertools.product(SEQUENCES, DEPTHS, STEPS):
        row = [f'{chunk}', f'{depth}', kind]
        for size in STEP_SIZES:
            own = grouped.get(cell(chunk, depth, kind, size), [])
            row.append(runs.spread([100 * result['accuracy'] for result in own], 1) if own else '')
        rows.append(row)
    text = f'{where}\n\n{runs.table(["chunk", "matrices", "steps", *STEP_SIZES], rows)}'
    print(f'\n{text}')
    if options.write:
        runs.write_section('task, step sizes', text)


if __name__ == '__main__':
    main()
