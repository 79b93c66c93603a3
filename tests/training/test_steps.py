"""Gradients of a captured step, whose graph a function stands in for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from titans_pytorch.training import MicroStep, choose_machine


@pytest.mark.parametrize('set_to_none', [True, False])
def test_gradients_that_a_graph_writes_are_added_to_those_of_the_parameters(set_to_none):
    model = nn.Linear(3, 2)
    step = MicroStep(model, choose_machine('cpu'))
    written = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}

    class Graph:
        def replay(self):
            for gradient in written.values():
                gradient.add_(1.0)

    step.graph, step.gradients = Graph(), written
    for first in (1.0, 3.0):
        step._replay()
        step._replay()
        for parameter in model.parameters():
            assert parameter.grad is not written[parameter]
            torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 2 * first + 1))
        model.zero_grad(set_to_none)
