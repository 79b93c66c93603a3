"""Multi-query associative recall (Zoology, arXiv 2312.04927): which value came with this key?

    python benchmarks/tasks/mqar.py                                   (all models, three seeds)
    python benchmarks/tasks/mqar.py --models LMM MAG --json runs.jsonl
    python benchmarks/tasks/mqar.py --small                           (two CPU cores, half an hour)
    python benchmarks/tasks/mqar.py --report runs.jsonl --write
    python benchmarks/tasks/mqar.py --models LMM "LMM, linear memory" --memory-batch 16 --steps 900 \\
        --learning-rate 3e-3 --vocabulary 512 --trained 256/32 --tested 256/32 512/64 1024/128

A sequence begins with pairs of a key and a value. Each key appears once more later, as a query whose answer is its
value. Half of the vocabulary of 8,192 is keys. Training goes from 64 tokens with 4 pairs to 256 with 64, and tests go
up to 1,024 with 256; attention sees 64 tokens back. Positions of queries follow Zoology's power law (exponent 0.01),
and the rest of the sequence consists of random values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import models
import runs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 8192
TRAINED = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
TESTED = [*TRAINED, (512, 128), (1024, 256)]
SIZES = {'dim': 128, 'depth': 2, 'dim_head': 64, 'segment_len': 64, 'neural_memory_segment_len': 16}

SMALL = {
    **{'vocabulary': 64, 'trained': [(32, 4)], 'tested': [(32, 4), (64, 8), (128, 16)], 'tokens': 1024},
    **{'dim': 64, 'dim_head': 32, 'segment_len': 16, 'neural_memory_segment_len': 4},
}


def examples(
    batch: int, length: int, pairs: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (batch, length), positions of the queries (batch, pairs), and their answers (batch, pairs)."""
    device = generator.device
    half = vocabulary // 2
    keys = torch.rand(batch, half - 1, generator=generator, device=device).topk(pairs).indices + 1
    values = torch.randint(half, vocabulary, (batch, pairs), generator=generator, device=device)
    tokens = torch.randint(half, vocabulary, (batch, length), generator=generator, device=device)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values

    # every second position after the pairs, drawn without replacement; early ones are more likely
    num_places = (length - 2 * pairs) // 2
    log_odds = (0.01 - 1) * torch.arange(1, num_places + 1, device=device).log()
    noise = -(-torch.rand(batch, num_places, generator=generator, device=device).log()).log()
    places = 2 * pairs + 2 * (log_odds + noise).topk(pairs).indices
    return tokens.scatter(1, places, keys), places, values


def answers(model: nn.Module, tokens: Tensor, places: Tensor) -> Tensor:
    """Logits only at the queries, because the vocabulary is large."""
    hidden = model(tokens, return_hidden=True)
    return model.to_logits(hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])))


def loss(model: nn.Module, tokens: Tensor, places: Tensor, values: Tensor) -> Tensor:
    return F.cross_entropy(answers(model, tokens, places).flatten(0, 1), values.flatten())


def batches(
    lengths: list[tuple[int, int]], tokens: int, vocabulary: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of each length in turn, of `tokens` tokens each."""
    while True:
        for length, pairs in lengths:
            yield examples(tokens // length, length, pairs, vocabulary, generator)


@torch.no_grad()
def accuracy(model: nn.Module, length: int, pairs: int, vocabulary: int, generator: torch.Generator) -> float:
    right = []
    for _ in range(4):
        tokens, places, values = examples(max(2, 2**15 // length), length, pairs, vocabulary, generator)
        right.append(runs.right(answers(model, tokens, places), values).mean())
    return torch.stack(right).mean().item()


def run(
    name: str,
    seed: int,
    training: runs.Training,
    tokens: int = 2**14,
    vocabulary: int = VOCABULARY,
    trained: list[tuple[int, int]] = TRAINED,
    tested: list[tuple[int, int]] = TESTED,
    **sizes: Any,
) -> dict[str, Any]:
    """Train one model and test it."""
    model = models.build(name, seed, num_tokens=vocabulary, **{**SIZES, **sizes}).to(training.device)
    trainer = runs.Trainer(model, loss, training)
    generator = torch.Generator(training.device).manual_seed(seed)
    done = runs.train(trainer, batches(trained, tokens, vocabulary, generator))
    held_out = torch.Generator(training.device).manual_seed(10_000 + seed)
    tests = {f'{length}/{pairs}': accuracy(model, length, pairs, vocabulary, held_out) for length, pairs in tested}
    return {'steps': done, 'parameters': models.num_parameters(model), 'accuracy': tests}


def sizes(text: str) -> tuple[int, int]:
    """Length and pairs, given as `256/32`."""
    length, pairs = map(int, text.split('/'))
    return length, pairs


def main() -> None:
    parser = runs.parser(__doc__ or '', [*models.MODELS], steps=2500, small_steps=400)
    parser.add_argument('--vocabulary', type=int, help=f'words, half of them keys; default: {VOCABULARY:,}')
    parser.add_argument('--trained', type=sizes, nargs='+', help='tokens/pairs of training sequences, in turn')
    parser.add_argument('--tested', type=sizes, nargs='+', help='tokens/pairs of test sequences')
    parser.add_argument('--section', default='mqar', help='of docs/benchmarks.md, for --write; default: mqar')
    options = parser.parse_args()
    own = {name: getattr(options, name) for name in ('vocabulary', 'trained', 'tested') if getattr(options, name)}
    if own and options.write and options.section == 'mqar':
        parser.error('--write with sizes of your own needs --section, as its table is not that of the default sizes')
    settings = {**runs.settings(options, SMALL), **own}
    where, results = runs.measured(options, partial(run, **settings))
    columns = {key: (lambda r, key=key: 100 * r['accuracy'][key]) for key in results[0]['accuracy']}
    runs.report(options, options.section, where, results, columns, 1, [*models.MODELS])


if __name__ == '__main__':
    main()
