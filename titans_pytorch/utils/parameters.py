"""Initial values of parameters, and the conversion of state dicts to and from the reference's format.

`reset_parameters()` of a module with its own parameters initialises only those, as in PyTorch's modules; its
constructor calls it. `reset_parameters()` of a `Resettable`, a module composed of others, initialises all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter in place. If it is sharded, each process receives its shard of the first process's `value`."""
    if hasattr(parameter, 'device_mesh'):
        # imported here because few programs are distributed
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        value = value.to(parameter.dtype).expand(parameter.shape).contiguous()
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def reset_parameters(module: Module) -> None:
    """Reinitialise all parameters within a module, each with the `reset_parameters()` of the module that holds it.

    Raises:
        TypeError: if one of these modules has no such method.
    """
    if isinstance(module, Resettable):
        module.reset_parameters()
        return
    for part in module.children():
        reset_parameters(part)
    if (reset := getattr(module, 'reset_parameters', None)) is not None:
        reset()
    elif next(module.parameters(recurse=False), None) is not None:
        raise TypeError(
            f'reset_parameters() cannot initialise a {type(module).__name__}, which has parameters but no method '
            'reset_parameters()'
        )


class Resettable(Module):
    """A module that can reinitialise all of its parts in the order of its constructor.

    With the seeds of its construction, it then has the same values as at construction. A subclass with parameters of
    its own sets them in `_reset_own`, and calls that in its constructor.
    """

    def reset_parameters(self) -> None:
        """Initialise every parameter anew, as the constructor does.

        Raises:
            TypeError: if a module given by the caller has parameters but no method `reset_parameters()`.
        """
        for part in self._parts():
            reset_parameters(part)
        self._reset_own()

    def _parts(self) -> Iterable[Module]:
        """The submodules, in the order in which the constructor builds them."""
        return self.children()

    def _reset_own(self) -> None:
        """Initialise the parameters that the module holds itself."""


def first_weight(*modules: Module) -> Tensor | None:
    """A parameter that shows precision and device: the `weight` of the first of `modules`, or else any parameter.

    Replicas of `torch.nn.parallel.replicate` have the attribute but no parameters. Modules that replace norms and
    linear layers may have neither; the result is then `None`.
    """
    for module in modules:
        weight = getattr(module, 'weight', None)  # a method in quantised layers
        weight = weight if isinstance(weight, Tensor) else next(module.parameters(), None)
        if weight is not None:
            return weight
    return None


class ParameterSequence(Module):
    """Parameters by index, named '0', '1', …, as in `torch.nn.ParameterList`.

    Unlike with that list, replicas of a module on several devices (`torch.nn.parallel.replicate`) find them here.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.length = 0
        for parameter in parameters:
            self.register_parameter(str(self.length), Parameter(parameter))
            self.length += 1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return getattr(self, str(range(self.length)[index]))

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, str(index)) for index in range(self.length))


class _DependingOn(torch.autograd.Function):
    @staticmethod
    def forward(output: Tensor, *parameters: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.num_parameters = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient, *(None,) * ctx.num_parameters


def depending_on(parameters: Iterable[Tensor], output: Tensor) -> Tensor:
    """`output` with every parameter in its graph, so that `DistributedDataParallel` does not wait for parameters that
    get no gradient from this call.

    This adds no gradients: outside that wrapper, their `grad` stays `None`. In a single process it returns `output`
    itself.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return output
    return _DependingOn.apply(output, *(p for p in parameters if p.requires_grad))


class InReferenceFormat(Module):
    """A module with state-dict entries that differ from the reference's. It loads both formats."""

    scalars: tuple[str, ...] = ()
    """Parameters of shape (1,) that are zero-dimensional in the reference."""

    def empty_parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of parameters without elements that the reference has and that are omitted here."""
        return {}

    def write_reference(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Convert the module's entries in a state dict to the reference's format in place."""
        for key in self._scalar_keys(state_dict, prefix):
            state_dict[key] = state_dict[key].reshape(())
        own = next(self.parameters())
        for name, shape in self.empty_parameters().items():
            state_dict[f'{prefix}{name}'] = own.new_empty(shape, requires_grad=False)

    def read_reference(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Inverse of `write_reference`; entries in our own format are left unchanged."""
        for key in self._scalar_keys(state_dict, prefix):
            state_dict[key] = state_dict[key].reshape(1)
        for name in self.empty_parameters():
            if (value := state_dict.get(f'{prefix}{name}')) is not None and value.numel() == 0:
                del state_dict[f'{prefix}{name}']

    def _scalar_keys(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        keys = [f'{prefix}{name}' for name in self.scalars]
        return [key for key in keys if key in state_dict and state_dict[key].numel() == 1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.read_reference(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def reference_state_dict(module: Module) -> dict[str, Tensor]:
    """The state dict of a module in the format of lucidrains' `titans-pytorch` 0.5.5, which loads it strictly.

    `module.state_dict()` holds each parameter once. The reference's state dict also holds every memory network a second
    time, as `memory_model.*` (copied here), parameters without elements, and zero-dimensional scalars. Modules of this
    package load both formats.
    """
    state_dict = dict(module.state_dict())
    for name, part in module.named_modules():
        if isinstance(part, InReferenceFormat):
            part.write_reference(state_dict, f'{name}.' if name else '')
    return state_dict
