"""State dicts in the format of the reference, both ways. The keys and shapes of its state dicts are in tests/golden."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden import harness, store
from golden.configurations import CHECKPOINTS
from torch import Tensor, nn

from titans_pytorch import MemoryAsContextTransformer, NeuralMemory, reference_state_dict

REFERENCE = json.loads((store.FOLDER / 'reference.json').read_text())['state_dicts']


def checkpoint_of_reference(name: str) -> dict[str, Tensor]:
    """Random values in the reference's format: a memory's parameters, and its untrained copy under `memory_model`."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in REFERENCE[name].items()}


def trained(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if 'memory_model' not in key.split('.') and value.numel()}


def assert_holds(module: nn.Module, values: dict[str, Tensor]) -> None:
    held = dict(module.named_parameters())
    assert held.keys() == values.keys()
    for key, value in values.items():
        assert torch.equal(held[key].flatten(), value.flatten()), key


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_writes_the_keys_and_shapes_of_the_reference(name: str) -> None:
    written = {key: list(value.shape) for key, value in reference_state_dict(harness.construct(name)).items()}
    assert written == REFERENCE[name]


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_its_own_state_dict_holds_every_parameter_and_nothing_else(name: str) -> None:
    module = harness.construct(name)
    parameters = dict(module.named_parameters())
    assert module.state_dict().keys() == parameters.keys() == trained(checkpoint_of_reference(name)).keys()


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('name', CHECKPOINTS)
def test_reads_and_writes_back_a_checkpoint_of_the_reference(name: str, assign: bool) -> None:
    module, checkpoint = harness.construct(name), checkpoint_of_reference(name)
    module.load_state_dict(checkpoint, strict=True, assign=assign)
    assert_holds(module, trained(checkpoint))
    assert all(p.ndim and p.numel() for p in module.parameters())

    written = reference_state_dict(module)
    assert written.keys() == checkpoint.keys()
    for key, value in trained(checkpoint).items():
        assert torch.equal(written[key], value), key
    storages = [value.untyped_storage().data_ptr() for value in written.values() if value.numel()]
    assert len({*storages}) == len(storages)


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_a_second_module_takes_over_what_the_first_wrote(name: str) -> None:
    for write in (nn.Module.state_dict, reference_state_dict):
        first, second = harness.construct(name), harness.construct(name)
        first.load_state_dict(checkpoint_of_reference(name))
        second.load_state_dict(write(first))
        assert_holds(second, first.state_dict())


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_reads_what_this_package_wrote_before_it_left_out_copies(name: str) -> None:
    """With `memory_model.*`, views of the first head, with parameters without elements, and scalars without shape."""
    module, first = harness.construct(name), harness.construct(name)
    first.load_state_dict(checkpoint_of_reference(name))
    older = reference_state_dict(first)
    for prefix, memory in first.named_modules():
        if isinstance(memory, NeuralMemory):
            prefix = f'{prefix}.' if prefix else ''
            for index, parameter in enumerate(memory.memory_model_parameter_names):
                weight = older[f'{prefix}memory_model_parameters.{index}']
                view = weight[0] if memory.per_head_learned_parameters else weight
                older[f'{prefix}memory_model.{parameter}'] = view
    module.load_state_dict(older, strict=True)
    assert_holds(module, first.state_dict())


@pytest.mark.parametrize('name', ['shared_between_heads', 'everything_spectral', 'defaults'])
def test_either_name_of_a_tensor_that_the_reference_holds_under_two_will_do(name: str) -> None:
    """Where heads share them, and with a single head, `memory_model.*` are the same tensors: savers that write each
    tensor once keep these names."""
    module, checkpoint = harness.construct(name), checkpoint_of_reference(name)
    assert isinstance(module, NeuralMemory)
    once: dict[str, Any] = {}
    for key, value in checkpoint.items():
        if key.startswith('memory_model_parameters.'):
            parameter = module.memory_model_parameter_names[int(key.split('.')[1])]
            once[f'memory_model.{parameter}'] = value.reshape(module._parameter_shapes[parameter])
        elif not key.startswith('memory_model.'):
            once[key] = value
    module.load_state_dict(once, strict=True)
    assert_holds(module, trained(checkpoint))


@pytest.mark.parametrize('name', ['heads', 'mac_script'])
def test_refuses_what_the_reference_refuses(name: str) -> None:
    checkpoint = checkpoint_of_reference(name)
    key = next(key for key in trained(checkpoint) if 'memory_model_parameters' in key)

    with pytest.raises(RuntimeError, match=key):
        harness.construct(name).load_state_dict({k: value for k, value in checkpoint.items() if k != key})
    with pytest.raises(RuntimeError, match=key):
        harness.construct(name).load_state_dict({**checkpoint, key: checkpoint[key][..., :-1]})
    copy = key.rpartition('memory_model_parameters')[0] + 'memory_model.other'
    for other in ('no such parameter', copy):
        with pytest.raises(RuntimeError, match=other):
            harness.construct(name).load_state_dict({**checkpoint, other: torch.zeros(1)})


def test_refuses_learned_tokens_that_the_model_does_not_have() -> None:
    def model(**kwargs: int) -> MemoryAsContextTransformer:
        return MemoryAsContextTransformer(num_tokens=5, dim=8, depth=1, segment_len=4, heads=2, dim_head=4, **kwargs)

    with_tokens, without = model(num_longterm_mem_tokens=1, num_persist_mem_tokens=1), model()
    for reads, writes in ((with_tokens, without), (without, with_tokens)):
        with pytest.raises(RuntimeError, match=r'(?s)longterm_mems.*persistent_memory'):
            reads.load_state_dict(reference_state_dict(writes))
