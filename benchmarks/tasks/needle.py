"""A needle in text: a key and its value hidden in enwik8, and a question for the value long after them.

    python benchmarks/tasks/needle.py --data enwik8.gz                (all models, three seeds)
    python benchmarks/tasks/needle.py --report runs.jsonl --write

A sequence of bytes ends with `[[abcd=`, and `[[abcd=wxyz]]` stands at a random position before it; key and value are
four random letters each. Tests use 2K to 16K bytes; an answer is right if all four letters are. Attention
sees 128 bytes back.

Models train as language models on text with many needles, each asked for at a later position, at lengths of 256 to
2,048 bytes in turn, as one answer in two thousand bytes would teach nothing in so few steps. The loss on the answers
has the same weight as the loss on the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import runs
import text as texts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LETTERS = 4
BEFORE, BETWEEN, AFTER = b'[[', b'=', b']]'
NEEDLE = len(BEFORE) + LETTERS + len(BETWEEN) + LETTERS + len(AFTER)
QUESTION = len(BEFORE) + LETTERS + len(BETWEEN)
TRAINED = [256, 512, 1024, 2048]
LENGTHS = [2048, 4096, 8192, 16384]
BYTES_PER_NEEDLE = 64
SIZES = {'dim': 128, 'depth': 2, 'dim_head': 64, 'segment_len': 128, 'neural_memory_segment_len': 16}

SMALL = {
    **{'trained': [64, 128, 256], 'tested': [256, 512, 1024, 2048], 'tokens': 4096, 'examples': 64},
    **{'dim': 64, 'dim_head': 32, 'segment_len': 32, 'neural_memory_segment_len': 4},
}


def _letters(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(97, 123, (size, count, LETTERS), generator=generator, device=generator.device)


def _marked(keys: Tensor, values: Tensor) -> Tensor:
    """`[[key=value]]` as bytes, (batch, count, NEEDLE)."""

    def fixed(text: bytes) -> Tensor:
        return torch.tensor([*text], device=keys.device).expand(*keys.shape[:2], -1)

    return torch.cat((fixed(BEFORE), keys, fixed(BETWEEN), values, fixed(AFTER)), dim=-1)


def hidden_needle(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes (batch, length) with a needle inserted, and a question with its answer at the end."""
    size, length = batch.shape
    needle = _marked(_letters(size, 1, generator), _letters(size, 1, generator))[:, 0]
    question = needle[:, : -len(AFTER)]
    last = length - question.shape[1] - NEEDLE
    starts = torch.randint(0, last, (size, 1), generator=generator, device=batch.device)
    batch = batch.scatter(1, starts + torch.arange(NEEDLE, device=batch.device), needle)
    return torch.cat((batch[:, : -question.shape[1]], question), dim=1)


def hidden_needles(batch: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes (batch, length) with `count` needles, each of which appears again later as a question, with its value as
    the answer; and the positions of the answers, (batch, count · LETTERS)."""
    size, length = batch.shape
    device = batch.device
    needles = _marked(_letters(size, count, generator), _letters(size, count, generator))
    # slots keep needles from overlapping; the earlier slot of a pair holds the needle, the later its question
    slots = torch.rand(size, length // NEEDLE, generator=generator, device=device).topk(2 * count).indices
    first, again = slots.unflatten(1, (2, count)).sort(dim=1).values.unbind(1)
    within = torch.arange(NEEDLE, device=device)
    for slot in (first, again):
        places = slot.unsqueeze(-1) * NEEDLE + within
        batch = batch.scatter(1, places.flatten(1), needles.flatten(1))
    answers = again.unsqueeze(-1) * NEEDLE + QUESTION + torch.arange(LETTERS, device=device)
    return batch, answers.flatten(1)


def batches(
    text: Tensor, tokens: int, lengths: list[int], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of each length in turn, of `tokens` bytes each."""
    windows = [texts.windows(text, tokens // length, length, generator) for length in lengths]
    while True:
        for length, given in zip(lengths, windows):
            yield hidden_needles(next(given), length // BYTES_PER_NEEDLE, generator)


def loss(model: nn.Module, batch: Tensor, answers: Tensor) -> Tensor:
    losses = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction='none')
    losses = losses.view(len(batch), -1)
    return losses.mean() + losses.gather(1, answers - 1).mean()


@torch.no_grad()
def accuracy(model: nn.Module, text: Tensor, length: int, generator: torch.Generator, examples: int) -> float:
    """Share of answers with all letters right, each predicted from the correct letters before it."""
    right, size = [], max(1, 2**16 // length)
    windows = texts.windows(text, size, length, generator)
    for _ in range(-(-examples // size)):
        batch = hidden_needle(next(windows), generator)
        letters = runs.right(model(batch[:, :-1])[:, -LETTERS:], batch[:, -LETTERS:])
        right.append(letters.prod(dim=1).mean())
    return torch.stack(right).mean().item()


def run(
    name: str,
    seed: int,
    training: runs.Training,
    data: Path | None,
    tokens: int = 2**15,
    trained: list[int] = TRAINED,
    tested: list[int] = LENGTHS,
    examples: int = 128,
    **sizes: Any,
) -> dict[str, Any]:
    """Train one model and test it."""
    train_text, _, test_text = (part.to(training.device) for part in texts.load(data))
    model = models.build(name, seed, num_tokens=256, **{**SIZES, **sizes}).to(training.device)
    trainer = runs.Trainer(model, loss, training)
    generator = torch.Generator(training.device).manual_seed(seed)
    done = runs.train(trainer, batches(train_text, tokens, trained, generator))
    held_out = torch.Generator(training.device).manual_seed(10_000 + seed)
    tests = {f'{length}': accuracy(model, test_text, length, held_out, examples) for length in tested}
    return {'steps': done, 'parameters': models.num_parameters(model), 'accuracy': tests}


def main() -> None:
    parser = runs.parser(__doc__ or '', [*models.MODELS], steps=1200, small_steps=600)
    parser.add_argument('--data', type=Path, help='a file of text, gzipped or not; default: enwik8 in data/')
    options = parser.parse_args()
    one = partial(run, data=options.data, **runs.settings(options, SMALL))
    where, results = runs.measured(options, one)
    tested = SMALL['tested'] if options.small else LENGTHS
    columns = {f'{n:,}': (lambda r, key=f'{n}': 100 * r['accuracy'][key]) for n in tested}
    runs.report(options, 'needle', where, results, columns, 1, [*models.MODELS])


if __name__ == '__main__':
    main()
