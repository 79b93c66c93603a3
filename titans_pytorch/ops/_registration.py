"""Registration of a kernel with PyTorch, as one operation for autograd and `torch.compile`, differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def register_kernel(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    outputs: Callable[..., Any],
    saved: Sequence[int] = (),
    not_differentiable: Sequence[int] = (),
    materialize_grads: bool = True,
) -> CustomOpDef:
    """Create the operation `titans_pytorch::<name>` and its gradient `titans_pytorch::<name>_backward`.

    Args:
            forward: the launcher. Its annotations are the schema: `Tensor`, `Tensor | None`, `list[Tensor]`, then
                settings (int, float, bool, dtype, str, lists of numbers). It returns a tensor, a tuple of tensors or a
                list of tensors.
            backward: the launcher of the gradient. It is called with the gradient of each differentiable output (for an
                operation that returns a list: one list), then the saved outputs, then everything that `forward` was
                called with. It returns the gradient of each tensor argument, structured like the arguments, with `None`
                for an absent tensor. No two gradients may share memory. Gradients that are not contiguous are copied,
                because tracing expects contiguous ones. Launchers run with the tensors' device as the current one.
            outputs: a function that returns the uninitialised outputs, given the arguments of `forward`; tracing takes
                shapes and dtypes from it, and `forward` allocates with it.
            saved: indices of the outputs that the gradient needs, in addition to all arguments.
            not_differentiable: indices of outputs that only the gradient needs.
            materialize_grads: whether `backward` receives zeros for an output without a gradient; otherwise it receives
                `None`.

    A second derivative is an error that names `without_kernels`.
    """
    schema = infer_schema(forward, mutates_args=())
    parameters, returns = schema.removeprefix('(').split(') -> ')
    takes_tensors = ['Tensor' in parameter for parameter in parameters.split(', ')]
    returns_list = returns == 'Tensor[]'

    def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
        given = [argument for argument, takes in zip(arguments, takes_tensors) if takes]
        return [leaf for leaf in tree_leaves(given) if leaf is not None]

    def results(*arguments: Any) -> Any:
        with torch.cuda.device_of(tensors_of(arguments)[0]):
            return forward(*arguments)

    def gradients(d_outputs: list[Tensor | None], kept: list[Tensor], *arguments: Any) -> list[Tensor]:
        first = (d_outputs,) if returns_list else d_outputs
        with torch.cuda.device_of(tensors_of(arguments)[0]):
            found = tree_leaves(backward(*first, *kept, *arguments))
            return [leaf.contiguous() for leaf in found if leaf is not None]

    def empty_gradients(d_outputs: list[Tensor | None], kept: list[Tensor], *arguments: Any) -> list[Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor in tensors_of(arguments)]

    operation = custom_op(f'titans_pytorch::{name}', results, mutates_args=(), schema=schema)
    operation.register_fake(outputs)
    gradient_operation = custom_op(
        f'titans_pytorch::{name}_backward',
        gradients,
        mutates_args=(),
        schema=f'(Tensor?[] d_outputs, Tensor[] kept, {parameters}) -> Tensor[]',
    )
    gradient_operation.register_fake(empty_gradients)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        produced = [output] if isinstance(output, Tensor) else output
        leaves, ctx.structure = tree_flatten(inputs, is_leaf=_is_list_of_numbers)
        ctx.settings = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(
            *(leaf if isinstance(leaf, Tensor) else None for leaf in leaves), *(produced[index] for index in saved)
        )
        ctx.mark_non_differentiable(*(produced[index] for index in not_differentiable))
        ctx.set_materialize_grads(materialize_grads)

    def differentiate(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
        flat = tree_leaves(d_outputs)
        d_outputs_needed = [d for index, d in enumerate(flat) if index not in not_differentiable]
        if all(d is None for d in d_outputs_needed):
            return tree_unflatten([None] * len(ctx.settings), ctx.structure)
        saved_tensors = ctx.saved_tensors  # under checkpointing they can be read only once
        tensors, kept = saved_tensors[: len(ctx.settings)], [*saved_tensors[len(ctx.settings) :]]
        leaves = [setting if tensor is None else tensor for tensor, setting in zip(tensors, ctx.settings)]
        arguments = tree_unflatten(leaves, ctx.structure)
        found = iter(gradient_operation(d_outputs_needed, kept, *arguments))
        return tree_unflatten([None if tensor is None else next(found) for tensor in tensors], ctx.structure)

    operation.register_autograd(differentiate, setup_context=setup_context)
    gradient_operation.register_autograd(refuse_second_derivatives(name))
    return operation


def _is_list_of_numbers(tree: Any) -> bool:
    """True for a list that autograd treats as a single argument."""
    return isinstance(tree, list) and any(not isinstance(leaf, Tensor) for leaf in tree)


def refuse_second_derivatives(name: str) -> Callable[..., NoReturn]:
    """The gradient of a kernel's gradient: it raises an error that names the switch."""

    def refuse(ctx: Any, *d_gradients: Any) -> NoReturn:
        raise RuntimeError(
            f'{name} is computed by a Triton kernel, which can be differentiated once: for derivatives of a gradient, '
            'compute both the gradient and the function that it is taken of within '
            '`with titans_pytorch.without_kernels():`'
        )

    return refuse
