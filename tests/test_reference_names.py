"""The reference's helpers: importable and equal in numbers, or named in the guide; and what a seed draws."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compare import assert_same
from golden import helpers, store

REFERENCE = json.loads((store.FOLDER / 'helpers.json').read_text())
GUIDE = (Path(__file__).resolve().parents[1] / 'docs/guides/moving-from-the-reference.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('name', helpers.HELPERS)
def test_helpers_compute_the_figures_of_the_reference(name):
    assert_same(helpers.HELPERS[name](), torch.tensor(REFERENCE['figures'][name], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize('module', helpers.MODULES)
def test_each_name_imports_or_the_guide_says_what_to_use(module):
    table = GUIDE.split('| helper of the reference |')[1].split('\n\n')[0]
    cells = re.findall(r'^\| (.*?) \|', table, re.MULTILINE)
    replaced = set(re.findall(r'`(\w+)`', ' '.join(cells)))
    missing = {name for name in REFERENCE['names'][module] if not hasattr(helpers.module(module), name)}
    assert missing <= replaced
    assert not replaced & {name for name in REFERENCE['names'][module] if name not in missing}


def test_gradients_of_zero_are_clamped_to_zero():
    """Where the reference gives NaN."""
    assert torch.equal(helpers.module('neural_memory').softclamp_grad_norm(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))


@pytest.mark.parametrize('name', helpers.SEEDED)
def test_a_seed_draws_the_initial_weights_of_the_reference(name):
    """The classes that the guide lists. In float32, in which normal numbers may be rounded otherwise elsewhere."""
    expected = {key: torch.tensor(values) for key, values in REFERENCE['initial'][name].items()}
    assert_same({key: torch.tensor(values) for key, values in helpers.initial(name).items()}, expected, 1e-6)
