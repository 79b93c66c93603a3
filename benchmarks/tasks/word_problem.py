"""State tracking: the word problem of a symmetric group. After each swap, in which order are the items now?

    python benchmarks/tasks/word_problem.py                                 (S₅, all models, three seeds)
    python benchmarks/tasks/word_problem.py --group 2 --models "linear, steps to 2" attention
    python benchmarks/tasks/word_problem.py --small                         (two CPU cores)

Every token swaps two of n items, or none. Its target is the order that results from all swaps so far, one of n!
classes. With two items this is parity. With five, the problem is complete for NC¹, so a model whose depth does not grow
with the length, such as a transformer or a diagonal recurrence, solves it only up to a limited length (arXiv
2404.08819). A swap is a reflection, I − 2 k kᵀ, which a linear memory performs with a step of 2 (arXiv 2411.12537); a
step of 1 stores a value. Titans' Theorem 4.1 claims that deep memories solve the problem.

Models train on sequences of 32 tokens and are tested, at the last token, on longer ones too. Chunks and memory batches
are single tokens, without momentum.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import models
import runs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pytorch import LongTermMemoryModel, MemoryAsGateTransformer
from titans_pytorch.models.base import Transformer
from titans_pytorch.presets import memory_settings

TRAINED, TESTED = 32, [8, 16, 32, 64, 128]
SIZES = {'dim': 128, 'depth': 2, 'dim_head': 64}
SMALL = {'dim': 32, 'dim_head': 16, 'batch': 16, 'trained': 8, 'tested': [8, 16], 'group': 2}

# depth of the memory, and its largest step size relative to one that moves a value all the way to its target; `None`:
# proximal steps, which need no limit
MEMORIES: dict[str, tuple[int, float | None]] = {
    'linear, steps to 1': (1, 1.0),
    'linear, steps to 2': (1, 2.0),
    'linear, proximal steps': (1, None),
    'deep, steps to 1': (2, 1.0),
    'deep, steps to 2': (2, 2.0),
    'deep, proximal steps': (2, None),
}
MODELS = ['attention', *MEMORIES]


def group_table(n: int) -> Tensor:
    """The order that each swap produces from each order, (n!, number of swaps)."""
    orders = [*itertools.permutations(range(n))]
    index = {order: number for number, order in enumerate(orders)}
    swaps = [(0, 0), *itertools.combinations(range(n), 2)]

    def swapped(order: tuple[int, ...], i: int, j: int) -> tuple[int, ...]:
        items = [*order]
        items[i], items[j] = items[j], items[i]
        return tuple(items)

    return torch.tensor([[index[swapped(order, *swap)] for swap in swaps] for order in orders])


def examples(batch: int, length: int, table: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Swaps, and the order after each of them, (batch, length)."""
    swaps = torch.randint(table.shape[1], (batch, length), generator=generator, device=generator.device)
    order, orders = torch.zeros_like(swaps[:, 0]), []
    for swap in swaps.unbind(1):
        order = table[order, swap]
        orders.append(order)
    return swaps, torch.stack(orders, dim=1)


def loss(model: nn.Module, swaps: Tensor, orders: Tensor) -> Tensor:
    return F.cross_entropy(model(swaps).flatten(0, 1), orders.flatten())


def batches(batch: int, length: int, table: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield examples(batch, length, table, generator)


@torch.no_grad()
def accuracy(model: nn.Module, length: int, table: Tensor, generator: torch.Generator) -> float:
    """Accuracy at the last token."""
    swaps, orders = examples(512, length, table, generator)
    parts = zip(swaps.split(128), orders[:, -1].split(128))
    return torch.cat([runs.right(model(part)[:, -1], last) for part, last in parts]).mean().item()


def build(name: str, seed: int, num_tokens: int, longest: int, **sizes: Any) -> Transformer:
    torch.manual_seed(seed)
    heads = sizes['dim'] // sizes['dim_head']
    common: dict[str, Any] = {**sizes, 'heads': heads, 'num_tokens': num_tokens}
    if name == 'attention':
        return MemoryAsGateTransformer(**common, segment_len=longest, neural_memory_layers=())
    depth, largest = MEMORIES[name]
    changes: dict[str, Any] = {'momentum': False, 'default_model_kwargs': {'depth': depth, 'expansion_factor': 2.0}}
    if largest is not None:
        # a step of half the number of a head's features moves a value all the way
        step = largest * sizes['dim_head'] / 2
        changes |= {'proximal_steps': False, 'default_step_transform_max_lr': step, 'init_adaptive_step_bias': None}
    return LongTermMemoryModel(
        **common,
        segment_len=1,
        neural_memory_segment_len=1,
        neural_memory_batch_size=1,
        neural_memory_kwargs=memory_settings(heads, sizes['dim_head'], 1, **changes),
    )


def run(
    name: str,
    seed: int,
    training: runs.Training,
    group: int,
    batch: int = 128,
    trained: int = TRAINED,
    tested: list[int] = TESTED,
    **sizes: Any,
) -> dict[str, Any]:
    """Train one model and test it."""
    table = group_table(group).to(training.device)
    model = build(name, seed, max(table.shape), max(tested), **{**SIZES, **sizes}).to(training.device)
    trainer = runs.Trainer(model, loss, training)
    generator = torch.Generator(training.device).manual_seed(seed)
    done = runs.train(trainer, batches(batch, trained, table, generator))
    held_out = torch.Generator(training.device).manual_seed(10_000 + seed)
    tests = {str(length): accuracy(model, length, table, held_out) for length in tested}
    return {'steps': done, 'parameters': models.num_parameters(model), 'accuracy': tests}


def main() -> None:
    parser = runs.parser(__doc__ or '', MODELS, steps=3000, small_steps=200)
    parser.add_argument('--group', type=int, default=5, help='items of the symmetric group; 2 is parity')
    options = parser.parse_args()
    if options.memory_batch is not None or options.memory:
        parser.error('--memory-batch and --memory: memories store single tokens here, with the settings of each row')
    settings = {'group': options.group, **runs.settings(options, SMALL)}
    where, results = runs.measured(options, partial(run, **settings))
    tested = settings.get('tested', TESTED)
    columns = {str(n): (lambda r, key=str(n): 100 * r['accuracy'][key]) for n in tested}
    runs.report(options, f'word problem of {settings["group"]} items', where, results, columns, 1, MODELS)


if __name__ == '__main__':
    main()
