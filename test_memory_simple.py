"""Does the memory learn? A demonstration that takes a few seconds on a CPU:

python test_memory_simple.py

A `NeuralMemory` stores pairs of random keys and unrelated random values, a few at a time and all of them repeatedly,
and is then queried with the keys. Nothing is trained: the projections keep their initial values, and only the state
changes, through the gradient steps that the memory takes as it stores. Three things must then hold:

- surprise, the loss on a pair when it is stored, falls from showing to showing;
- the recall error of the values retrieved for stored keys falls as pairs are stored;
- pairs that were never stored stay unknown, so recall is memory and not a rule common to all pairs.

The last line is the verdict. The exit status is 0 if the memory learned, 1 if it did not. With `--max-step 0` there are
no gradient steps, and the verdict must be that it did not.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch import NeuralMemory

DIM = 32
NUM_PAIRS = 32
PAIRS_PER_CALL = 8
SHOWINGS = 8  # of each pair
MUCH_SMALLER = 0.25  # a falling quantity must fall to a quarter


class Row(NamedTuple):
    """Measurements after some pairs were stored. Errors are relative to answering zero: 1 means nothing is known."""

    stored: int
    surprise: float
    recall: float
    never_stored: float


def build_memory(max_step: float) -> NeuralMemory:
    memory = NeuralMemory(
        DIM,
        chunk_size=4,
        batch_size=4,  # gradients at the newest weights: each chunk is one step of gradient descent
        qkv_receives_diff_views=True,  # keys and values from different inputs: values cannot be computed from keys
        qk_rmsnorm=True,
        default_step_transform_max_lr=max_step,
        init_adaptive_step_bias=0.0,  # every step half of max_step
        init_momentum_bias=-2.0,
        init_decay_bias=-10.0,  # forget almost nothing
        mem_model_norm_add_residual=False,
    )
    memory.to_queries.load_state_dict(memory.to_keys.state_dict())  # query with the keys that were stored
    return memory


def error(memory: NeuralMemory, weights: Mapping[str, Tensor], keys: Tensor, values: Tensor) -> float:
    """Relative squared error of the values retrieved for `keys`; `keys` and `values` are (1, n, d)."""
    target = memory.to_values(memory.store_norm(values))
    return ((memory.retrieve_memories(keys, weights) - target).square().mean() / target.square().mean()).item()


def show_pairs(max_step: float) -> list[Row]:
    """Store all pairs `SHOWINGS` times, a few per call; measure before the first call and after each."""
    torch.manual_seed(0)
    memory = build_memory(max_step)
    keys, values, other_keys, other_values = torch.randn(4, 1, NUM_PAIRS, DIM)

    def measure(stored: int, surprise: float, weights: Mapping[str, Tensor]) -> Row:
        known, unknown = error(memory, weights, keys, values), error(memory, weights, other_keys, other_values)
        return Row(stored, surprise, known, unknown)

    rows = [measure(0, float('nan'), memory.init_weights(1))]
    power = memory.to_values(memory.store_norm(values)).square().mean()
    state = None

    for _ in range(SHOWINGS):
        for some_keys, some_values in zip(keys.split(PAIRS_PER_CALL, dim=1), values.split(PAIRS_PER_CALL, dim=1)):
            views = torch.stack((some_keys, some_keys, some_values))  # queries, keys, values
            _, state, (losses, _) = memory(views, state=state, return_surprises=True)

            newest_weights, _ = state.states
            rows.append(measure(rows[-1].stored + PAIRS_PER_CALL, (losses.mean() / power).item(), newest_weights))

    return rows


def judge(rows: list[Row]) -> list[tuple[bool, str]]:
    """Whether each of the three conditions holds, with its numbers."""
    before, after = rows[0], rows[-1]
    calls = NUM_PAIRS // PAIRS_PER_CALL
    first_surprise = sum(row.surprise for row in rows[1 : calls + 1]) / calls
    last_surprise = sum(row.surprise for row in rows[-calls:]) / calls

    return [
        (
            last_surprise < MUCH_SMALLER * first_surprise,
            f'surprise falls: {first_surprise:.3f} when pairs are first shown, {last_surprise:.3f} when last',
        ),
        (
            after.recall < MUCH_SMALLER * before.recall,
            f'recall improves: error {before.recall:.3f} before, {after.recall:.3f} after',
        ),
        (
            after.recall < MUCH_SMALLER * after.never_stored,
            f'stored pairs are told from others: error {after.recall:.3f} against {after.never_stored:.3f}',
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Does the memory learn?')
    parser.add_argument('--max-step', type=float, default=1.0, help='largest step size of the memory (default 1)')
    max_step = parser.parse_args(arguments).max_step

    with torch.no_grad():
        rows = show_pairs(max_step)

    print(f'{NUM_PAIRS} pairs, shown {PAIRS_PER_CALL} at a time; errors relative to answering zero\n')
    print(f'{"pairs stored":>12}  {"surprise":>9}  {"recall error":>12}  {"never stored":>12}')

    for index, row in enumerate(rows):
        calls = NUM_PAIRS // PAIRS_PER_CALL
        if index <= calls or index % calls == 0:  # the first showing call by call, then each showing
            print(f'{row.stored:12}  {row.surprise:9.3f}  {row.recall:12.3f}  {row.never_stored:12.3f}')

    print()
    verdicts = judge(rows)
    for holds, numbers in verdicts:
        print(f'{"yes" if holds else "NO ":3}  {numbers}')

    learned = all(holds for holds, _ in verdicts)
    print(f'\nThe memory {"learned" if learned else "did NOT learn"}.')
    return 0 if learned else 1


if __name__ == '__main__':
    raise SystemExit(main())
