"""Text of the language tasks: the first bytes of enwik8, 90 % for training, 5 % each for validation and test."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parents[2] / 'data'


def read(path: Path | None, num_bytes: int = -1) -> Tensor:
    """The first bytes, or all, of a file of text, gzipped or not, as uint8. Default: enwik8 in `data/`."""
    path = HERE / 'enwik8.gz' if path is None else path
    if not path.exists():
        raise SystemExit(f'no text at {path}: give a file with --data')
    with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
        return torch.frombuffer(bytearray(file.read(num_bytes)), dtype=torch.uint8)


def load(path: Path | None, num_bytes: int = 4_000_000) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test bytes of the file that `read` reads."""
    text = read(path, num_bytes).long()
    first, second = int(len(text) * 0.9), int(len(text) * 0.95)
    return text[:first], text[first:second], text[second:]


def windows(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """An endless iterator of random windows (batch, length), on the device of `text`."""
    offsets = torch.arange(length, device=text.device)
    while True:
        starts = torch.randint(0, len(text) - length, (batch, 1), generator=generator, device=text.device)
        yield text[starts + offsets]
