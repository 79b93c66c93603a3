"""Kernels as functions: launched directly, and as operations of PyTorch where calls are recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titans_pytorch.ops._registration import register_kernel


def _outputs(rows: list[Tensor], weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(rows[0].new_empty(rows[0].shape) for _ in range(3))


def _forward(rows: list[Tensor], weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """scale · a · b · weight, a + b, and a · b."""
    a, b = rows
    product = a * b
    return scale * product * (1 if weight is None else weight), a + b, product


def _backward(
    d_scaled: Tensor | None,
    d_sum: Tensor | None,
    product: Tensor,
    rows: list[Tensor],
    weight: Tensor | None,
    scale: float,
) -> list[object]:
    a, b = rows
    d_scaled = torch.zeros_like(a) if d_scaled is None else d_scaled * scale
    d_sum = torch.zeros_like(a) if d_sum is None else d_sum
    of_product = d_scaled if weight is None else d_scaled * weight
    return [[of_product * b + d_sum, of_product * a + d_sum], None if weight is None else d_scaled * product]


kernel = register_kernel(
    'test_kernel',
    _forward,
    _backward,
    outputs=_outputs,
    saved=(2,),
    not_differentiable=(2,),
    materialize_grads=False,
)


def problem(with_weight: bool) -> tuple[list[Tensor], Tensor | None, float]:
    torch.manual_seed(0)
    a, b, weight = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return [a, b], weight if with_weight else None, 3.0


class Recorded(TorchDispatchMode):
    """The names of all operations of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == 'titans_pytorch':
            self.names.append(operation._opname)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize('with_weight', [True, False])
@pytest.mark.parametrize('used', [(0,), (1,), (0, 1)])
def test_a_launch_equals_the_operation(with_weight, used):
    results = []
    for function in (kernel, kernel.operation):
        rows, weight, scale = problem(with_weight)
        outputs = function(rows, weight, scale)
        assert not outputs[2].requires_grad
        sum(outputs[index].square().sum() for index in used).backward()
        results.append([*outputs, *(t.grad for t in (*rows, weight) if t is not None)])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda *rows: kernel([*rows], None, 2.0)[:2], problem(False)[0])


def test_modes_see_the_operation():
    rows, weight, scale = problem(True)
    with Recorded() as forward:
        scaled, *_ = kernel(rows, weight, scale)
    with Recorded() as backward:
        scaled.sum().backward()
        kernel(*problem(True))[0].sum()
    assert forward.names == ['test_kernel']
    assert backward.names == ['test_kernel_backward', 'test_kernel']

    scaled, *_ = kernel(*problem(True))
    with Recorded() as backward:
        scaled.sum().backward()
    assert backward.names == ['test_kernel_backward']


def test_subclasses_see_the_operation():
    seen = []

    class Telling(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(getattr(function, '__name__', str(function)))
            return super().__torch_function__(function, types, args, kwargs)

    (a, b), _, scale = problem(False)
    kernel([a.detach().as_subclass(Telling), b], None, scale)
    assert any('test_kernel' in name for name in seen)


def test_without_gradients_nothing_is_kept():
    rows, weight, scale = problem(True)
    with torch.no_grad():
        assert all(not t.requires_grad for t in kernel(rows, weight, scale))
    with torch.inference_mode():
        assert all(t.is_inference() for t in kernel(rows, weight, scale))


def test_a_second_derivative_names_the_switch():
    rows, weight, scale = problem(True)
    gradient, _ = torch.autograd.grad(kernel(rows, weight, scale)[0].square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match='without_kernels'):
        gradient.sum().backward()


def test_the_compiler_sees_the_operation():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if 'test_kernel' in str(node.target))
        return graph.forward

    rows, weight, scale = problem(True)
    compiled = torch.compile(lambda: kernel(rows, weight, scale)[0], backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(), kernel(rows, weight, scale)[0])
    assert len(seen) == 1
