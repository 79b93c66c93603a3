"""Batches of varying length, padded to a few buckets, so that `torch.compile` compiles once for each bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import all_in_float64, assert_same, gradients, randomised
from torch import Tensor
from torch.nn import Module

from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    MemoryMLP,
    NeuralMemory,
    pad_to_bucket,
)

SMALL = {'num_tokens': 11, 'dim': 8, 'depth': 2, 'segment_len': 4, 'neural_memory_batch_size': 8}
HEADS = {'dim_head': 4, 'heads': 2}
MODELS: dict[str, Callable[..., Module]] = {
    'MAC': lambda **changes: MemoryAsContextTransformer(
        **SMALL | HEADS | changes, neural_memory_segment_len=4, num_longterm_mem_tokens=2, num_persist_mem_tokens=2
    ),
    'MAC, paper order': lambda **changes: MemoryAsContextTransformer(
        **SMALL | HEADS | {'neural_memory_batch_size': None} | changes, neural_memory_segment_len=2, paper_order=True
    ),
    'MAG': lambda **changes: MemoryAsGateTransformer(**SMALL | HEADS | {'num_residual_streams': 2} | changes),
    'MAL': lambda **changes: MemoryAsLayerTransformer(**SMALL | HEADS | changes),
    'LMM': lambda **changes: LongTermMemoryModel(**SMALL | changes),
}


@pytest.fixture
def float64():
    with all_in_float64():
        yield


def ids(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 11, (batch, length))


def loss_and_gradients(model: Module, step: Callable[..., Tensor], *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = step(*args)
    # parameters that a short sequence does not use have no gradient; with padding, a gradient of zeros
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return loss.detach(), zeros | gradients(model, loss)


@pytest.mark.parametrize('name', MODELS)
def test_padding_to_a_bucket_changes_no_loss_and_no_gradient(name: str, float64: None):
    model = randomised(MODELS[name](), 0.1).double()
    for length in (5, 12, 13):
        x = ids(length)
        padded, labels = pad_to_bucket(x, 12)
        assert padded.shape[1] == (12 if length <= 12 else 24)
        want = loss_and_gradients(model, lambda: model(x, return_loss=True))  # noqa: B023
        assert_same(loss_and_gradients(model, lambda: model(padded, labels=labels)), want)  # noqa: B023


def test_custom_labels_and_embeddings(float64: None):
    model = randomised(MODELS['MAG'](), 0.1).double()
    x, labels = torch.randn(2, 7, 8, dtype=torch.float64), ids(7)
    labels[:, 3] = -100
    padded, padded_labels = pad_to_bucket(x, (4, 9, 16), labels)
    assert padded.shape == (2, 9, 8)
    assert_same(model(padded, labels=padded_labels), model(x, labels=labels))


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match='buckets must hold a length of at least that of x, 9'):
        pad_to_bucket(ids(9), (4, 8))
    with pytest.raises(ValueError, match='labels must be given'):
        pad_to_bucket(torch.randn(2, 3, 8), 4)
    with pytest.raises(ValueError, match='labels must be'):
        pad_to_bucket(ids(9), 4, ids(8))
    with pytest.raises(ValueError, match='buckets must be a positive integer, got 0'):
        pad_to_bucket(ids(9), 0)
    with pytest.raises(TypeError, match='x must be a tensor'):
        pad_to_bucket([1, 2], 4)  # type: ignore[arg-type]


def counted(step: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[Any]]:
    """A step compiled without graph breaks, and a list with one entry per compilation."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        # a symbolic length compiles slowly
        assert not any(
            isinstance(size, torch.SymInt) for given in inputs if isinstance(given, Tensor) for size in given.shape
        )
        graphs.append(graph)
        return graph.forward

    return torch.compile(step, backend=backend, fullgraph=True), graphs


def test_lengths_of_one_bucket_compile_a_model_once(float64: None):
    model = LongTermMemoryModel(
        num_tokens=11,
        dim=8,
        depth=1,
        segment_len=4,
        num_residual_streams=1,
        neural_memory_batch_size=4,
        neural_memory_model=MemoryMLP(8, depth=1),
        neural_memory_kwargs={'momentum': False},
    )
    model = randomised(model, 0.1).double()
    step, graphs = counted(lambda x, labels: model(x, labels=labels))
    for number, length in ((1, 3), (1, 5), (1, 4), (2, 6)):
        x = ids(length)
        want = loss_and_gradients(model, lambda: model(x, return_loss=True))  # noqa: B023
        assert_same(loss_and_gradients(model, step, *pad_to_bucket(x, 5)), want)
        assert len(graphs) == number


def test_lengths_of_one_bucket_compile_a_memory_once():
    mem = NeuralMemory(8, chunk_size=2, batch_size=4, model=MemoryMLP(8, depth=1), momentum=False)
    mem = randomised(mem, 0.1).double()
    step, graphs = counted(lambda seq: mem(seq)[0])
    for number, length in ((1, 3), (1, 2), (1, 4), (2, 5)):
        seq = torch.randn(2, length, 8, dtype=torch.float64)
        padded = torch.nn.functional.pad(seq, (0, 0, 0, -length % 4))
        assert_same(step(padded)[:, :length].detach(), mem(seq)[0].detach())
        assert len(graphs) == number


@pytest.mark.parametrize('name', MODELS)
def test_a_state_that_is_carried_on_compiles_a_model_three_times(name: str, float64: None):
    """Without a state, with the first one, and with any later one at the same place in a window and a memory batch."""
    torch.compiler.reset()  # which numbers changed in earlier tests
    model = randomised(MODELS[name](depth=1, num_residual_streams=1), 0.1).double()
    step, graphs = counted(lambda x, state: model(x, return_loss=True, state=state, return_state=True))
    state = after = None
    for number in (1, 2, 3, 3, 3):
        x = ids(17)
        loss, state = model(x, return_loss=True, state=state, return_state=True)
        came, after = step(x, after)
        assert_same((came, gradients(model, came), after), (loss, gradients(model, loss), state))
        assert len(graphs) == number
        state, after = state.detach(), after.detach()


def test_a_state_is_carried_on_with_dynamic_sizes(float64: None):
    torch.compiler.reset()
    model = randomised(MODELS['MAG'](depth=1, num_residual_streams=1), 0.1).double()

    def step(x: Tensor, state: Any) -> Any:
        return model(x, return_loss=True, state=state, return_state=True)

    compiled = torch.compile(step, backend='eager', fullgraph=True, dynamic=True)
    state = after = None
    for _ in range(2):
        x = ids(17)
        (loss, state), (came, after) = step(x, state), compiled(x, after)
        assert_same((came.detach(), after.detach()), (loss.detach(), state.detach()))
