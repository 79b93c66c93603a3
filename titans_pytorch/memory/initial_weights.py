"""The learned initial weights of a memory."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import Module

from titans_pytorch.memory_models import PlainMLP
from titans_pytorch.utils.functional import on_meta, with_tensors
from titans_pytorch.utils.parameters import ParameterSequence, fill, reset_parameters
from titans_pytorch.utils.plain import is_intercepted
from titans_pytorch.utils.precision import at_least_float32


class InitialWeights(ParameterSequence):
    """The learned initial weights of a memory, in the order of its network's parameters.

    Their shapes are (heads, …), or (…) if heads share them. The network's buffers are constants, and are registered
    too.

    Args:
        network: the memory network, initialised.
        heads: number of heads with weights of their own, which all start equal; `None` if heads share their weights.
    """

    def __init__(self, network: Module, heads: int | None):
        leading = () if heads is None else (heads,)
        weights = [p.detach().expand((*leading, *p.shape)) for p in network.parameters()]
        super().__init__(w.clone(memory_format=torch.contiguous_format) for w in weights)
        self.names = [name for name, _ in network.named_parameters()]
        number = {parameter: index for index, parameter in enumerate(network.parameters())}
        self.all_names = {name: number[p] for name, p in network.named_parameters(remove_duplicate=False)}
        """Index of the weight with each name; a tied weight has several names."""
        # inside a tuple, the template is not registered; on the meta device, it holds no weights
        self.template = (on_meta(network),)
        self._mlp, self._network_modules = PlainMLP.of(network), tuple(self.template[0].modules())
        for index, constant in enumerate(network.buffers()):
            self.register_buffer(f'constant_{index}', constant)

    @property
    def network(self) -> Module:
        """The memory network as a template: it has its constants but no weights."""
        template = self.template[0]
        if not self._buffers:
            return template
        constants = {id(empty): at_least_float32(own) for empty, own in zip(template.buffers(), self.buffers())}
        return with_tensors(template, constants)

    @property
    def mlp(self) -> PlainMLP | None:
        """The memory network if it is a plain MLP without hooks."""
        return None if is_intercepted(self._network_modules) else self._mlp

    def with_weights(self, weights: Mapping[str, Tensor]) -> Module:
        """The memory network with these weights, given by name."""
        return with_tensors(self.network, {id(p): weights[name] for name, p in self.template[0].named_parameters()})

    def forward(self) -> dict[str, Tensor]:
        """The weights by name. A call, not an attribute, so that hooks can bring in offloaded parameters."""
        return dict(zip(self.names, self))

    def reset_parameters(self) -> None:
        """Redraw the weights with the `reset_parameters()` of the network's modules."""
        network = deepcopy(self.template[0]).to_empty(device=self[0].device)
        reset_parameters(network)
        drawn = dict(network.named_parameters())
        for name, weight in zip(self.names, self):
            fill(weight, drawn[name])
        for constant, value in zip(self.buffers(), network.buffers()):
            fill(constant, value)
