"""Gradients of a captured step, whose graph a function stands in for; and the pass that compiles kernels."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache

from titans_pytorch.training import MicroStep, choose_machine, steps, validation_loss


class Graph:
    """A graph whose replays write their number to the addresses of some gradients."""

    def __init__(self, gradients):
        self.memory, self.replays = [gradient.data for gradient in gradients], 0

    def replay(self):
        self.replays += 1
        for gradient in self.memory:
            gradient.fill_(self.replays)


def replayed_step():
    model = nn.Linear(3, 2)
    step = MicroStep(model, choose_machine('cpu'))
    step.gradients = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    step.graph = Graph(step.gradients.values())
    return model, step


def gradients_of(model):
    values = {value for parameter in model.parameters() for value in parameter.grad.flatten().tolist()}
    (value,) = values
    return value


@pytest.mark.parametrize('set_to_none', [True, False])
def test_gradients_that_a_graph_writes_are_added_to_those_of_the_parameters(set_to_none):
    model, step = replayed_step()
    for micro_batches, total in ((1, 1), (2, 2 + 3), (3, 4 + 5 + 6), (1, 7)):
        for _ in range(micro_batches):
            step._replay()
        assert gradients_of(model) == total
        model.zero_grad(set_to_none)


def test_gradients_of_a_single_replay_are_not_copied():
    model, step = replayed_step()
    step._replay()
    for parameter, written in step.gradients.items():
        assert parameter.grad.data_ptr() == written.data_ptr()


def test_gradients_may_be_replaced_and_their_data_too():
    model, step = replayed_step()
    step._replay()
    for parameter in model.parameters():
        parameter.grad = parameter.grad.detach()  # another tensor in the same memory
    step._replay()
    assert gradients_of(model) == 1 + 2
    model.zero_grad()
    for number in (3, 4):
        step._replay()
        assert gradients_of(model) == number
        for parameter in model.parameters():
            parameter.grad.data = parameter.grad.data.clamp(max=0.5)
        assert gradients_of(model) == 0.5
        model.zero_grad()


class Recorded:
    """A graph that holds what the pass recorded last has written; its replays compute the same again."""

    def replay(self):
        pass


def captured_step(model, monkeypatch):
    """A step that takes the way of a captured one, on the CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (
        ('Stream', lambda: stream),
        ('current_stream', lambda: stream),
        ('stream', lambda own: contextlib.nullcontext()),
        ('graph', lambda own, **options: contextlib.nullcontext()),
        ('CUDAGraph', Recorded),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return MicroStep(model, choose_machine('cpu')._replace(cuda_graphs=True))


def test_capturing_adds_to_gradients_that_are_there_and_keeps_inputs(monkeypatch):
    model, inputs = Squared(3, 2), torch.randn(4, 3)
    step = captured_step(model, monkeypatch)
    expected = torch.autograd.grad(model(inputs, return_loss=True), [*model.parameters()])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    given = inputs.clone()
    step(given)
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, 100.0 + gradient)
    step.inputs.fill_(7.0)  # as the next call does
    assert torch.equal(given, inputs)


def test_a_captured_step_that_computes_otherwise_is_never_used(monkeypatch):
    class Growing(nn.Linear):
        calls = 0

        def forward(self, inputs, return_loss):
            self.calls += 1
            return super().forward(inputs).mean() * 10**self.calls

    step = captured_step(Growing(3, 2), monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='in the captured step'):
            step(torch.randn(4, 3))


class Squared(nn.Linear):
    """A loss of the inputs."""

    def forward(self, inputs, return_loss):
        return super().forward(inputs).square().mean()


@pytest.mark.parametrize(('given', 'came'), [(0, '0'), (1, '1'), (3, 'at least 3')])
def test_accumulate_takes_as_many_micro_batches_as_were_declared(given, came):
    step = MicroStep(Squared(3, 2), choose_machine('cpu'), micro_batches=2)
    with pytest.raises(ValueError, match=f'batches must hold 2 micro batches for this process, got {came}'):
        step.accumulate([torch.ones(1, 3)] * given)
    with pytest.raises(ValueError, match='micro_batches must be a positive integer, got 0'):
        MicroStep(Squared(3, 2), choose_machine('cpu'), micro_batches=0)


@pytest.mark.parametrize('training', [False, True])
def test_validation_restores_the_mode_of_the_model(training):
    class Model(nn.Dropout):
        def forward(self, inputs, return_loss):
            assert not self.training
            return inputs.float().mean()

    model = Model().train(training)
    tokens = torch.arange(20)
    assert validation_loss(model, tokens, choose_machine('cpu'), batches=2, batch_size=1, length=9) == 9.5
    assert model.training == training
    with pytest.raises(ValueError, match='length must be less than the 20 tokens that there are, got 20'):
        validation_loss(model, tokens, choose_machine('cpu'), batches=2, batch_size=1, length=20)
    with pytest.raises(ValueError, match='batches must be a positive integer, got 0'):
        validation_loss(model, tokens, choose_machine('cpu'), batches=0, batch_size=1, length=9)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision must be one of \['auto', 'fp32', 'tf32', 'bf16'\], got 'fp16'"):
        choose_machine('cpu', precision='fp16')


class Noisy(nn.Linear):
    """The mean of a linear map with dropout."""

    def forward(self, inputs, return_loss):
        return nn.functional.dropout(super().forward(inputs)).mean()


def test_compiled_steps_with_autocast_contexts_are_cached():
    def compute(x):
        with torch.autocast('cpu', enabled=False):
            return (x @ x).sin()

    found = torch._dynamo.utils.counters['aot_autograd']
    hits, x = [], torch.randn(3, 3)
    with fresh_cache(), torch.autocast('cpu', torch.bfloat16):
        for _ in range(2):
            torch.compiler.reset()
            found.clear()
            torch.testing.assert_close(steps._compile(compute, choose_machine('cpu'))(x), compute(x))
            hits.append(found['autograd_cache_hit'])
    assert hits == [0, 1]


def test_the_pass_that_compiles_kernels_leaves_nothing_behind(monkeypatch):
    for name in ('get_rng_state', 'set_rng_state'):  # of a GPU
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    calls = []

    @contextlib.contextmanager
    def compiled_together():
        calls.append('starts')
        yield
        calls.append('ends')

    monkeypatch.setattr(steps, 'kernels_compiled_together', compiled_together)
    torch.manual_seed(0)
    model, inputs = Noisy(3, 4), torch.randn(5, 3)
    model.weight.grad = torch.ones_like(model.weight)
    expected = {}
    for kernels_compiled in (True, False):
        torch.manual_seed(1)
        copy = Noisy(3, 4)
        copy.load_state_dict(model.state_dict())
        copy.weight.grad = model.weight.grad.clone()
        step = MicroStep(copy, choose_machine('cpu')._replace(triton=not kernels_compiled))
        losses = torch.stack([step(inputs), step(inputs)])
        figures = {'losses': losses, **{name: p.grad for name, p in copy.named_parameters()}}
        for name, figure in figures.items():
            torch.testing.assert_close(figure, expected.setdefault(name, figure), rtol=0.0, atol=0.0)
    assert calls == ['starts', 'ends']
