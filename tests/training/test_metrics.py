"""Figures of a run: smoothing, and a plot that takes little of the time."""

from __future__ import annotations

import json

import numpy as np

from titans_pytorch.training import LossCurve, metrics


def test_smoothed_is_the_mean_of_the_last_twentieth():
    values = np.random.default_rng(0).normal(size=100)
    expected = [values[max(0, end - 5) : end].mean() for end in range(1, 101)]
    np.testing.assert_allclose(metrics.smoothed(values), expected, atol=1e-12)
    np.testing.assert_allclose(metrics.smoothed([2.0, 4.0]), [2.0, 4.0])


def test_the_plot_waits_until_it_is_cheap(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])

    def drawing(folder):
        now[0] += 2.0
        drawn.append(now[0])

    drawn, curve = [], LossCurve(tmp_path)
    monkeypatch.setattr(metrics, '_draw', drawing)
    for now[0] in (100.0, 150.0, 201.0, 202.0, 210.0):
        curve.redraw()
    assert drawn == [102.0, 204.0]
    curve.draw()
    assert len(drawn) == 3


def test_a_plot_of_many_steps(tmp_path):
    rows = [{'step': step, 'train_loss': 1.0, 'bpb': 1.4} for step in range(1, 500)] + [
        {'step': 500, 'val_loss': 1.0, 'bpb': 1.4}
    ]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    LossCurve(tmp_path).draw()
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
