"""Bits per byte on unseen text, for all models at equal numbers of parameters and steps.

    python benchmarks/tasks/enwik8.py --data enwik8.gz                (all models, three seeds)
    python benchmarks/tasks/enwik8.py --report runs.jsonl --write

Models train on random windows of 1,024 bytes from the first 90 % of the first 4 MB of enwik8. They are tested on the
last 5 % in windows of 4,096 bytes; attention sees 128 bytes back. A second figure covers the last 1,024 bytes of each
window, where most of the useful context lies outside the attention window.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import models
import runs
import text as texts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {'dim': 256, 'depth': 4, 'dim_head': 64, 'segment_len': 128, 'neural_memory_segment_len': 16}
TESTED = 4096

SMALL = {
    **{'trained': 256, 'tested': 1024, 'batch': 8},
    **{'dim': 64, 'depth': 2, 'dim_head': 32, 'segment_len': 32, 'neural_memory_segment_len': 8},
}


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch, return_loss=True)


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, length: int, num_windows: int) -> tuple[float, float]:
    """Bits per byte over consecutive windows, and over the last quarter of each."""
    rows = text[: num_windows * length + 1]
    rows = rows.unfold(0, length + 1, length)
    losses = []
    for batch in rows.split(max(1, 2**16 // length)):
        each = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction='none')
        losses.append(each.view(len(batch), -1))
    bits = torch.cat(losses) / math.log(2)
    return bits.mean().item(), bits[:, -length // 4 :].mean().item()


def run(
    name: str,
    seed: int,
    training: runs.Training,
    data: Path | None,
    batch: int = 16,
    trained: int = 1024,
    tested: int = TESTED,
    num_windows: int = 48,
    **sizes: Any,
) -> dict[str, Any]:
    """Train one model and test it."""
    train_text, _, test_text = (part.to(training.device) for part in texts.load(data))
    model = models.build(name, seed, num_tokens=256, **{**SIZES, **sizes}).to(training.device)
    trainer = runs.Trainer(model, loss, training)
    generator = torch.Generator(training.device).manual_seed(seed)
    given = ((window,) for window in texts.windows(train_text, batch, trained + 1, generator))
    done = runs.train(trainer, given)
    whole, late = bits_per_byte(model, test_text, tested, num_windows)
    return {'steps': done, 'parameters': models.num_parameters(model), 'whole': whole, 'late': late}


def main() -> None:
    parser = runs.parser(__doc__ or '', [*models.MODELS], steps=600, small_steps=300, pictures=False)
    parser.add_argument('--data', type=Path, help='a file of text, gzipped or not; default: enwik8 in data/')
    options = parser.parse_args()
    one = partial(run, data=options.data, **runs.settings(options, SMALL))
    where, results = runs.measured(options, one)
    columns = {'bits per byte': lambda r: r['whole'], 'its last quarter': lambda r: r['late']}
    runs.report(options, 'enwik8', where, results, columns, 3, [*models.MODELS])


if __name__ == '__main__':
    main()
