"""Metrics and samples of a run, and its loss curve."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titans_pytorch.training.files import atomic_file, one_line, say

METRICS, SAMPLES, CURVE = 'metrics.jsonl', 'samples.txt', 'loss.png'


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, each with the integer `step`; lines cut short by a kill are left out."""
    path = Path(path)
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get('step')) is int:
                rows.append(row)
    if len(rows) < len(lines):
        say(f'NOTICE: {path}: {len(lines) - len(rows)} damaged lines of {len(lines)} are left out')
    return rows


def rewind(folder: str | Path, batch: int, evaluated: int) -> None:
    """Remove metrics and samples later than the checkpoint to resume, because they will be written again."""
    metrics, samples = Path(folder, METRICS), Path(folder, SAMPLES)
    rows = [row for row in read_metrics(metrics) if row['step'] <= (evaluated if 'val_loss' in row else batch)]
    with atomic_file(metrics) as file:
        file.writelines(json.dumps(row).encode() + b'\n' for row in rows)
    text = samples.read_bytes() if samples.exists() else b''
    for sample in re.finditer(rb'^--- sample after (\d+) steps$', text, re.MULTILINE):
        if int(sample[1]) > evaluated:
            with atomic_file(samples) as file:
                file.write(text[: sample.start()])
            break


class LossCurve:
    """The plot of the losses in a run folder: training, smoothed, and validation, in bits per byte.

    A failure to draw it is reported once and never raised, because it must not end a run. `redraw` leaves the plot as
    it is when drawing would take more than a fiftieth of the time; `draw` always draws.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.next_time = 0.0
        self.reported = False

    def redraw(self) -> None:
        if time.monotonic() >= self.next_time:
            self.draw()

    def draw(self) -> None:
        started = time.monotonic()
        try:
            _draw(self.folder)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError)
            if not self.reported:
                say(f'no loss curve was drawn: {"matplotlib is not installed" if missing else one_line(error)}')
            self.reported = True
        self.next_time = time.monotonic() + 50 * (time.monotonic() - started)


def _draw(folder: Path) -> None:
    from matplotlib.figure import Figure

    rows = read_metrics(folder / METRICS)
    if not rows:
        return
    axes = (figure := Figure(figsize=(8, 5), layout='constrained')).subplots()
    training, validation = (
        [(row['step'], row['bpb']) for row in rows if key in row] for key in ('train_loss', 'val_loss')
    )
    if training:
        steps, losses = zip(*training)
        axes.plot(steps, losses, color='C0', alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color='C0', label='training')
    if validation:
        axes.plot(*zip(*validation), color='C1', label='validation', marker='o', markersize=4)
    axes.set(xlabel='steps', ylabel='bits per byte')
    axes.set_title(str(folder), parse_math=False)  # a path may hold a $
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(folder / CURVE) as file:
        figure.savefig(file, format='png', dpi=120)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """For each value, the mean of the most recent ones: a twentieth of all of them."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - max(1, len(values) // 20), 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
