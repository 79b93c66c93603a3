"""Our numbers against the reference's, stored in tests/golden: outputs, states, surprises, losses, every gradient.

The closing figures (number of configurations, largest relative difference of outputs, states and gradients):

    python -m pytest tests/test_golden.py -k figures -s
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from unittest.mock import patch

import pytest
import torch
from golden import harness, store
from golden.configurations import CONFIGURATIONS, GROUPS, TOLERANCE
from torch import Tensor

from titans_pytorch.attention import segmented

REFERENCE = json.loads((store.FOLDER / 'reference.json').read_text())

# arguments of the reference that no configuration can set

NOT_COMPARED = {
    ('NeuralMemory', 'use_accelerated_scan'): 'needs a GPU',
    ('ImplicitMLPAttention.forward', 'cache'): 'the reference masks the wrong keys',
    ('NestedAttention.forward', 'cache'): 'the reference masks the wrong keys',
}

# what has no rounding: token ids, positions

EXACT = ('sampled', 'state seq_index')


@cache
def goldens() -> dict[str, store.Values]:
    return {name: values for group in GROUPS for name, values in store.load(group).items()}


def softmax_in_float32(t: Tensor, dim: int) -> Tensor:
    """The softmax of the reference's attention, also of float64."""
    return t.softmax(dim=dim, dtype=torch.float32)


@cache
def ours(name: str) -> store.Values:
    with patch.object(segmented, 'softmax', softmax_in_float32):
        return harness.run(name, CONFIGURATIONS[name])


def errors(name: str) -> dict[str, float]:
    """Relative difference by name of value."""
    golden, found = goldens()[name], ours(name)
    # of the reference's parameters without elements, which are none here
    golden = {key: value for key, value in golden.items() if value.size or not key.startswith('gradient ')}
    assert found.keys() == golden.keys()
    return {key: harness.relative_error(found[key], golden[key]) for key in golden}


@pytest.mark.parametrize('name', CONFIGURATIONS)
def test_equals_the_reference(name: str) -> None:
    tolerance = TOLERANCE[CONFIGURATIONS[name].kind]
    wrong = {key: error for key, error in errors(name).items() if error > (0 if key in EXACT else tolerance)}
    assert not wrong, '\n'.join(f'{key}: {error:.2e}' for key, error in wrong.items())


def test_every_configuration_is_stored() -> None:
    assert sorted(goldens()) == sorted(CONFIGURATIONS)
    assert len(CONFIGURATIONS) >= 70


OPTIONAL_HERE = {('MemoryAsContextTransformer.sample', 'seq_len')}
"""Arguments that the reference requires; `max_new_tokens` can replace this one."""


def test_signatures_are_those_of_the_reference() -> None:
    """The same arguments, in the same order, with the same defaults; ours may have more, behind them."""
    our_signatures = harness.public_signatures()

    for function, arguments in REFERENCE['signatures'].items():
        of_ours = our_signatures[function]
        assert list(of_ours)[: len(arguments)] == list(arguments), function
        for name, default in arguments.items():
            if (function, name) in OPTIONAL_HERE:
                assert default == 'required' != of_ours[name]
            else:
                assert of_ours[name] == default, f'{function}, {name}'


def test_configurations_set_every_argument() -> None:
    for name in CONFIGURATIONS:
        ours(name)

    arguments = {(function, name) for function, names in REFERENCE['signatures'].items() for name in names}
    arguments_set = {(function, name) for function, names in harness.arguments_set.items() for name in names}

    assert arguments - arguments_set == set(NOT_COMPARED)


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {'gradient': 'gradients', 'state': 'states', 'updates': 'states'}  # by first word; all others: outputs
    largest: dict[str, dict[str, float]] = {group: defaultdict(float) for group in GROUPS}

    for group, configurations in GROUPS.items():
        for name in configurations:
            for key, error in errors(name).items():
                kind = kinds.get(key.split()[0], 'outputs')
                largest[group][kind] = max(largest[group][kind], error)

    with capsys.disabled():
        print(f'\n{len(CONFIGURATIONS)} configurations of the reference ({REFERENCE["versions"]})')
        for group, of_group in largest.items():
            print(f'{group:12} {len(GROUPS[group]):3}', *(f'  {what} {error:.1e}' for what, error in of_group.items()))

    for group, of_group in largest.items():
        assert max(of_group.values()) <= (1e-8 if group == 'memory' else 1e-5)
