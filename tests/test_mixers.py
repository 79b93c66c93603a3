"""Mixers of `benchmarks/peers.py` that need no GPU, in float64, against the loops that the benchmark checks with."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import assert_same

sys.path.append(str(Path(__file__).resolve().parent.parent / 'benchmarks'))
import mixers

LACT = mixers.Peer(
    partial(mixers.large_chunks, chunk=8, updates_of=mixers.swiglu_updates),
    partial(mixers.large_chunks, chunk=8, updates_of=mixers.swiglu_updates_by_autograd),
    lambda length: 0.0,
    gates=3 * mixers.HEADS,
    parameters=mixers.swiglu_parameters,
)


@pytest.mark.parametrize('peer', [mixers.PEERS['causal attention'], LACT], ids=['attention', 'LaCT'])
def test_a_mixer_equals_its_loop(peer):
    x = torch.randn(2, 20, mixers.DIM, dtype=torch.float64)
    results = []
    for exactly in (False, True):
        torch.manual_seed(0)
        layer = mixers.Mixer(peer, exactly).double()
        out = layer(x)
        results.append((out, torch.autograd.grad(out.square().sum(), [*layer.parameters()])))
    assert_same(*results, 1e-10)
