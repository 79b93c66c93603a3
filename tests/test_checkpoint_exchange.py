"""State dicts in the format of the reference, both ways. The keys and shapes of its state dicts are in tests/golden."""

from __future__ import annotations

import json

import pytest
import torch
from golden import harness, store
from golden.configurations import CHECKPOINTS

REFERENCE = json.loads((store.FOLDER / 'reference.json').read_text())['state_dicts']


def reference_state_dict(name: str) -> dict[str, torch.Tensor]:
    """Random values in the reference's format: a memory's parameters, and its untrained twin under `memory_model`."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in REFERENCE[name].items()}


def trained(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state_dict.items() if 'memory_model' not in key.split('.')}


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_writes_the_keys_and_shapes_of_the_reference(name: str) -> None:
    written = {key: list(value.shape) for key, value in harness.construct(name).state_dict().items()}
    assert written == REFERENCE[name]


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_reads_and_writes_back_a_checkpoint_of_the_reference(name: str) -> None:
    module, checkpoint = harness.construct(name), reference_state_dict(name)
    module.load_state_dict(checkpoint, strict=True)

    held = dict(module.named_parameters())
    held |= dict(module.named_buffers())
    for key, value in trained(checkpoint).items():
        assert torch.equal(held[key], value), key

    written = module.state_dict()
    assert written.keys() == checkpoint.keys()
    for key, value in trained(checkpoint).items():
        assert torch.equal(written[key], value), key


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_a_second_module_takes_over_what_the_first_wrote(name: str) -> None:
    first, second = harness.construct(name), harness.construct(name)
    first.load_state_dict(reference_state_dict(name))
    second.load_state_dict(first.state_dict())

    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize('name', ['heads', 'mac_script'])
def test_refuses_what_the_reference_refuses(name: str) -> None:
    checkpoint = reference_state_dict(name)
    key = next(key for key in trained(checkpoint) if 'memory_model_parameters' in key)

    with pytest.raises(RuntimeError, match=key):
        harness.construct(name).load_state_dict({k: value for k, value in checkpoint.items() if k != key})
    with pytest.raises(RuntimeError, match=key):
        harness.construct(name).load_state_dict({**checkpoint, key: checkpoint[key][..., :-1]})
    with pytest.raises(RuntimeError, match='no such parameter'):
        harness.construct(name).load_state_dict({**checkpoint, 'no such parameter': torch.zeros(1)})
