"""One module called from several threads at a time: each gets the numbers that it would get alone."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import CLASSES, build, ids
from compare import leaves
from memories import inputs, memory
from torch import Tensor

BATCHES = (2, 1, 3, 2)  # two threads of equal batches, which might mix up their numbers, beside others


@pytest.fixture(autouse=True)
def threads_switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def outcomes(call: Callable[[Tensor], Any], arguments: list[Tensor], repeats: int) -> Counter[str]:
    """How calls from a thread per argument ended: 'right', 'wrong' or the error, with their numbers."""
    with torch.no_grad():
        expected = [leaves(call(argument)) for argument in arguments]

    def thread(index: int) -> list[str]:
        ended = []
        for _ in range(repeats):
            try:
                with torch.no_grad():
                    came = leaves(call(arguments[index]))
                same = all(torch.equal(came[path], want) for path, want in expected[index].items())
                ended.append('right' if same else 'wrong')
            except Exception as error:
                ended.append(repr(error))
        return ended

    with ThreadPoolExecutor(len(arguments)) as pool:
        return Counter(end for ended in pool.map(thread, range(len(arguments))) for end in ended)


@pytest.mark.parametrize('switch', ['plain', 'spectral norm', 'attention memory', "a user's module"])
@pytest.mark.parametrize('engine', ['dual', 'dense'])
def test_a_memory_serves_four_threads(engine: str, switch: str):
    if (engine, switch) == ('dual', "a user's module"):
        pytest.skip('the dual engine does not serve it')
    mem = memory(switch, engine=engine)
    arguments = [inputs(mem, 21, batch) for batch in BATCHES]
    assert outcomes(mem, arguments, repeats=12) == {'right': 48}


@pytest.mark.parametrize('name', CLASSES)
def test_a_model_serves_four_threads(name: str):
    model = build(name).eval()
    assert outcomes(model, [ids(15, batch) for batch in BATCHES], repeats=4) == {'right': 16}


@pytest.mark.parametrize('name', CLASSES)
def test_four_clients_sample_at_a_time(name: str):
    model = build(name)  # in training mode, which sampling leaves and comes back to

    def sample(prompt: Tensor) -> Tensor:
        return model.sample(prompt, 16, temperature=0.0, use_cache=True, show_progress=False)

    assert outcomes(sample, [ids(7, batch) for batch in BATCHES], repeats=3) == {'right': 12}
    assert model.training


def test_gradients_of_four_threads():
    mem = memory('plain')

    def gradient(seq: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = seq.clone().requires_grad_()
            return torch.autograd.grad(mem(leaf)[0].square().sum(), leaf)[0]

    assert outcomes(gradient, [inputs(mem, 13, batch) for batch in BATCHES], repeats=8) == {'right': 32}


@pytest.mark.gpu
@pytest.mark.parametrize('cuda_graphs', [True, False])
def test_four_clients_sample_at_a_time_on_a_gpu(cuda_graphs: bool):
    model = build('MAG').float().cuda().eval()

    def sample(prompt: Tensor) -> Tensor:
        kwargs = {'temperature': 0.0, 'show_progress': False, 'cuda_graphs': cuda_graphs}
        return model.sample(prompt, 40, use_cache=True, **kwargs)

    assert outcomes(sample, [ids(7, batch).cuda() for batch in BATCHES], repeats=3) == {'right': 12}


@pytest.mark.gpu
@pytest.mark.parametrize('switch', ['plain', 'spectral norm', 'attention memory'])
def test_a_memory_serves_four_threads_on_a_gpu(switch: str):
    mem = memory(switch).float().cuda()
    arguments = [inputs(mem, 21, batch).float().cuda() for batch in BATCHES]
    assert outcomes(mem, arguments, repeats=12) == {'right': 48}


def test_clients_share_compiled_steps(steps_compiled_eagerly: list[Any]):
    torch.compiler.reset()
    model = build('LMM', depth=1, num_residual_streams=1).eval()

    def sample(prompt: Tensor) -> Tensor:
        return model.sample(prompt, 12, temperature=0.0, use_cache=True, compiled=True, show_progress=False)

    assert outcomes(sample, [ids(5) for _ in range(3)], repeats=3) == {'right': 9}
    assert len(steps_compiled_eagerly) == 2  # inside a chunk, and at its end
