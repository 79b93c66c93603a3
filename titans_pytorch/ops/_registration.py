"""Kernels as functions that autograd and `torch.compile` know, differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema
from torch.nn import Parameter
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten


class Kernel:
    """A kernel and its gradient as a function of tensors and settings, made by `register_kernel`.

    Where calls are recorded it is an operation of PyTorch: by the compiler, by dispatch modes (a FLOP counter,
    selective activation checkpointing), and for tensor subclasses. Everywhere else it is launched directly, because to
    dispatch an operation that is written in Python takes longer than many kernels run.
    """

    def __init__(
        self,
        operation: CustomOpDef,
        gradient_operation: CustomOpDef,
        forward: Callable[..., Any],
        gradients: Callable[..., list[Tensor]],
        saved: Sequence[int],
        not_differentiable: Sequence[int],
        materialize_grads: bool,
    ):
        self.operation, self.gradient_operation = operation, gradient_operation
        self.forward, self.gradients = forward, gradients
        self.saved, self.not_differentiable, self.materialize_grads = saved, not_differentiable, materialize_grads

    def __call__(self, *arguments: Any) -> Any:
        leaves, structure = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if _is_recorded(tensors):
            return self.operation(*arguments)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _Launch.apply(self, structure, *leaves)
        return self.forward(*arguments)

    def save(self, ctx: Any, leaves: Sequence[Any], structure: TreeSpec, output: Any) -> None:
        """Save the arguments, flattened, and the outputs that the gradient needs."""
        produced = [output] if isinstance(output, Tensor) else output
        ctx.structure = structure
        ctx.settings = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(
            *(leaf if isinstance(leaf, Tensor) else None for leaf in leaves),
            *(produced[index] for index in self.saved),
        )
        ctx.mark_non_differentiable(*(produced[index] for index in self.not_differentiable))
        ctx.set_materialize_grads(self.materialize_grads)

    def differentiate(
        self, ctx: Any, gradients: Callable[..., list[Tensor]], d_outputs: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradient of each argument, flattened."""
        needed = [d for index, d in enumerate(d_outputs) if index not in self.not_differentiable]
        if all(d is None for d in needed):
            return [None] * len(ctx.settings)
        tensors = ctx.saved_tensors[: len(ctx.settings)]
        leaves = [setting if tensor is None else tensor for tensor, setting in zip(tensors, ctx.settings)]
        arguments = tree_unflatten(leaves, ctx.structure)
        found = iter(gradients(needed, [*ctx.saved_tensors[len(leaves) :]], *arguments))
        return [None if tensor is None else next(found) for tensor in tensors]


class _Launch(torch.autograd.Function):
    """A direct launch of a kernel."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, structure: TreeSpec, *leaves: Any) -> Any:
        ctx.kernel = kernel
        output = kernel.forward(*tree_unflatten(leaves, structure))
        kernel.save(ctx, leaves, structure, output)
        # autograd takes the tensors of a tuple for results, not those of a list
        return tuple(output) if isinstance(output, list) else output

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> Any:
        kernel: Kernel = ctx.kernel
        # with `create_graph` autograd records the gradient, which refuses to be differentiated
        recorded = torch.is_grad_enabled() or _is_recorded([d for d in d_outputs if d is not None])
        gradients = kernel.gradient_operation if recorded else kernel.gradients
        return None, None, *kernel.differentiate(ctx, gradients, d_outputs)


def _is_recorded(tensors: Sequence[Tensor]) -> bool:
    """True while the compiler traces, within a dispatch mode, and for tensor subclasses."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not all(type(t) in (Tensor, Parameter) for t in tensors)


def register_kernel(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    outputs: Callable[..., Any],
    saved: Sequence[int] = (),
    not_differentiable: Sequence[int] = (),
    materialize_grads: bool = True,
) -> Kernel:
    """The operation `titans_pytorch::<name>`, and its gradient `titans_pytorch::<name>_backward`.

    Args:
        forward: the launcher. Its annotations are the schema: `Tensor`, `Tensor | None`, `list[Tensor]`, then settings
            (int, float, bool, dtype, str); it returns a tensor, a tuple of them or a list of them.
        backward: the launcher of the gradient, called with the gradient of each differentiable output (of an operation
            that returns a list: one list), then the saved outputs, then everything that `forward` was called with. It
            returns the gradient of each tensor argument, structured like the arguments and contiguous, with `None` for
            an absent tensor. No two may share memory.
            Launchers run with the tensors' device current.
        outputs: the outputs, uninitialised, given the arguments of `forward`: shapes and dtypes for tracing. `forward`
            allocates by the same function.
        saved: indices of the outputs that the gradient needs, beside all arguments.
        not_differentiable: indices of outputs that are needed only by the gradient.
        materialize_grads: whether `backward` gets zeros for an output without a gradient; else it gets `None`.

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
            return [leaf for leaf in tree_leaves(backward(*first, *kept, *arguments)) if leaf is not None]

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

    kernel = Kernel(operation, gradient_operation, results, gradients, saved, not_differentiable, materialize_grads)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kernel.save(ctx, *tree_flatten(inputs), output)

    def differentiate(ctx: Any, *d_outputs: Any) -> Any:
        return tree_unflatten(kernel.differentiate(ctx, gradient_operation, tree_leaves(d_outputs)), ctx.structure)

    operation.register_autograd(differentiate, setup_context=setup_context)
    gradient_operation.register_autograd(refuse_second_derivatives(name))
    return kernel


def refuse_second_derivatives(name: str) -> Callable[..., NoReturn]:
    """The gradient of a kernel's gradient: an error that names the switch."""

    def refuse(ctx: Any, *d_gradients: Any) -> NoReturn:
        raise RuntimeError(
            f'{name} is computed by a Triton kernel, which can be differentiated once: for derivatives of a gradient, '
            'compute both the gradient and the function that it is taken of within '
            '`with titans_pytorch.without_kernels():`'
        )

    return refuse
