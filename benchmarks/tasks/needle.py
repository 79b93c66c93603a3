"""A needle in text: a key and a value once in enwik8, and far away the key again. What was the value?

    python benchmarks/tasks/needle.py --data enwik8.gz                (all models, three seeds)
    python benchmarks/tasks/needle.py --report runs.jsonl --write

A sequence of bytes ends with `[[abcd=`, and somewhere before stands `[[abcd=wxyz]]`, four random letters each. The
model is trained at 2,048 bytes to continue the text, and the answer counts as much as all of the text; tested at 2K to
16K, the needle anywhere. An answer is right if all four letters are; attention sees 128 bytes back.
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
LENGTHS = [2048, 4096, 8192, 16384]
SIZES = {'dim': 128, 'depth': 2, 'dim_head': 64, 'segment_len': 128, 'neural_memory_segment_len': 16}

SMALL = {
    **{'trained': 256, 'tested': [256, 512, 1024, 2048], 'batch': 8, 'examples': 64},
    **{'dim': 64, 'dim_head': 32, 'segment_len': 32, 'neural_memory_segment_len': 4},
}


def hidden_needles(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes (batch, length) with a needle put in, a question at the end, and after it the answer."""
    size, length = batch.shape
    device = batch.device

    def letters() -> Tensor:
        return torch.randint(97, 123, (size, LETTERS), generator=generator, device=device)

    def fixed(what: bytes) -> Tensor:
        return torch.tensor([*what], device=device).expand(size, -1)

    key, value = letters(), letters()
    needle = torch.cat((fixed(BEFORE), key, fixed(BETWEEN), value, fixed(AFTER)), dim=1)
    question = torch.cat((fixed(BEFORE), key, fixed(BETWEEN), value), dim=1)
    last = length - question.shape[1] - NEEDLE
    starts = torch.randint(0, last, (size, 1), generator=generator, device=device)
    batch = batch.scatter(1, starts + torch.arange(NEEDLE, device=device), needle)
    return torch.cat((batch[:, : -question.shape[1]], question), dim=1)


def batches(text: Tensor, size: int, length: int, generator: torch.Generator) -> Iterator[tuple[Tensor]]:
    for batch in texts.windows(text, size, length, generator):
        yield (hidden_needles(batch, generator),)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    losses = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction='none')
    losses = losses.view(len(batch), -1)
    return losses[:, :-LETTERS].mean() + losses[:, -LETTERS:].mean()


@torch.no_grad()
def accuracy(model: nn.Module, text: Tensor, length: int, generator: torch.Generator, examples: int) -> float:
    """Share of answers right in all letters, each letter predicted after the right ones before it."""
    right, size = [], max(1, 2**16 // length)
    given = batches(text, size, length, generator)
    for _ in range(-(-examples // size)):
        (batch,) = next(given)
        guessed = model(batch[:, :-1])[:, -LETTERS:].argmax(dim=-1)
        right.append((guessed == batch[:, -LETTERS:]).all(dim=1).float().mean())
    return torch.stack(right).mean().item()


def run(
    name: str,
    seed: int,
    device: str,
    steps: int,
    learning_rate: float,
    data: Path | None,
    batch: int = 8,
    trained: int = 2048,
    tested: list[int] = LENGTHS,
    examples: int = 128,
    seconds: float | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """Train one model and test it."""
    train_text, _, test_text = (part.to(device) for part in texts.load(data))
    model = models.build(name, seed, num_tokens=256, **{**SIZES, **sizes}).to(device)
    trainer = runs.Trainer(model, loss, steps, learning_rate)
    generator = torch.Generator(device).manual_seed(seed)
    done = runs.train(trainer, batches(train_text, batch, trained, generator), steps, seconds)
    held_out = torch.Generator(device).manual_seed(10_000 + seed)
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
