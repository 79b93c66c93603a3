"""Gradients of a training step and validation loss, with micro batches shared by ranks, compiled and captured."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch import ops
from titans_pytorch.generation.evaluation import evaluation_mode
from titans_pytorch.ops._compilation import kernels_compiled_together
from titans_pytorch.training.data import even_starts, windows
from titans_pytorch.training.distributed import (
    average_gradients,
    broadcast_parameters,
    is_sharded,
    num_ranks,
    reduce_gradients_in_backward,
    share,
    sum_over_ranks,
)
from titans_pytorch.training.machine import Machine
from titans_pytorch.utils.checks import check_positive
from titans_pytorch.utils.functional import keeping_random_state


class MicroStep:
    """Forward and backward over one micro batch, adding to the gradients. Compiled and captured as a CUDA graph where
    `machine` says so; in a sharded model, each layer is compiled. All ranks start from the parameters of the first.

    A captured step writes gradients to its own memory, which becomes the gradient of parameters that have none. The
    next call overwrites that memory, after copying whatever is still the gradient of a parameter. To keep a gradient
    beyond `zero_grad`, clone it, and do not rely on the addresses of gradients, which change.

    Args:
        model: called as `model(inputs, return_loss=True)`.
        micro_batches: number of micro batches in a step, over all ranks.

    Raises:
        ValueError: if the ranks cannot share the micro batches evenly.
    """

    def __init__(self, model: nn.Module, machine: Machine, micro_batches: int = 1):
        _check_shared('micro_batches', micro_batches)
        broadcast_parameters(model)
        self.model = model
        # not the model itself: validation and sampling, with their other lengths, are not to be compiled
        self.loss_of, self.compiled_layers = self._loss, {}
        if machine.compile and is_sharded(model):
            self.compiled_layers = _compiled(model.layers, machine)  # type: ignore[arg-type]
        elif machine.compile:
            self.loss_of = _compile(self._loss, machine)
        self.own_micro_batches = micro_batches // num_ranks()
        self.machine = machine
        self.kernels_compiled = not machine.triton
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run one micro batch. Return its loss over the rank's number of micro batches; the next call overwrites it."""
        if not self.kernels_compiled:
            self._compile_kernels(inputs)
        if not self.machine.cuda_graphs:
            return self._compute(inputs.to(self.machine.device))
        if self.graph is None:
            self._capture(inputs)
        self.inputs.copy_(inputs, non_blocking=True)
        self._replay()
        return self.loss

    def accumulate(self, batches: Iterable[Tensor]) -> Tensor:
        """Run a step. Return the mean loss over the micro batches of all ranks; their mean gradients are in the
        parameters.

        Args:
            batches: micro batches of this rank; see `share`.

        Raises:
            ValueError: if there are more or fewer batches than `micro_batches` says; the gradients are then useless.
        """
        total, number = torch.zeros((), device=self.machine.device), 0
        for number, inputs in enumerate(batches, 1):
            if number > self.own_micro_batches:
                raise self._wrong_number(f'at least {number}')
            reduce_gradients_in_backward(self.model, number == self.own_micro_batches)
            total += self(inputs)
        if number < self.own_micro_batches:
            raise self._wrong_number(number)
        average_gradients(self.model)
        return sum_over_ranks(total) / num_ranks()

    def _wrong_number(self, came: int | str) -> ValueError:
        return ValueError(f'batches must hold {self.own_micro_batches} micro batches for this process, got {came}')

    def _loss(self, inputs: Tensor) -> Tensor:
        return self.model(inputs, return_loss=True) / self.own_micro_batches

    def _compile_kernels(self, inputs: Tensor) -> None:
        """Run a pass without results, in which the kernels of this package are compiled in parallel."""
        random_state = keeping_random_state(self.machine.device)
        with self._gradients_set_aside(), random_state, kernels_compiled_together():
            self._compute(inputs.to(self.machine.device))
        self.kernels_compiled = True

    @contextmanager
    def _gradients_set_aside(self) -> Iterator[None]:
        """A context without gradients, which restores the earlier gradients of all parameters at its end."""
        gradients = {parameter: parameter.grad for parameter in self.model.parameters()}
        self.model.zero_grad()
        try:
            yield
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient

    def _compute(self, inputs: Tensor) -> Tensor:
        with _in_place_of_forward(self.compiled_layers):
            with self.machine.autocast():
                loss = self.loss_of(inputs)
            loss.backward()
        return loss.detach()

    def _capture(self, inputs: Tensor) -> None:
        # a copy, because later inputs overwrite it
        self.inputs = inputs.to(self.machine.device, copy=True)
        with self._gradients_set_aside():
            try:
                self._record()
            except BaseException:
                self.graph = None
                raise

    def _record(self) -> None:
        """Capture the step as a graph, and compare its results with those of the uncaptured step."""
        # warm-up passes compile the step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.model.zero_grad()
                expected = self._outcome(self._compute(self.inputs))
        torch.cuda.current_stream().wait_stream(stream)
        # without existing gradients to add to, the graph writes its own
        self.model.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local, because NCCL's own thread may query its events meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode='thread_local'):
            self.loss = self._compute(self.inputs)
        self.gradients = {p: p.grad for p in self.model.parameters() if p.grad is not None}

        self.model.zero_grad()
        self._replay()
        captured = self._outcome(self.loss)
        if not torch.allclose(captured, expected, rtol=0.02):
            raise RuntimeError(
                f'loss and gradient norm are {captured.tolist()} in the captured step and {expected.tolist()} in the '
                f'step itself: train with --no-use-cuda-graphs, or with --no-compile'
            )

    def _replay(self) -> None:
        """Replay the graph. It writes the gradients of parameters without one, and adds to those of the others."""
        assert self.graph is not None
        # the graph is about to overwrite gradients that are still in its memory
        held = [
            (parameter, written) for parameter, written in self.gradients.items() if _is_at(parameter.grad, written)
        ]
        copies = [torch.empty_like(written) for _, written in held]
        if held:
            torch._foreach_copy_(copies, [written for _, written in held])
        for (parameter, _), copy in zip(held, copies):
            parameter.grad = copy
        self.graph.replay()
        sums, terms = [], []
        for parameter, written in self.gradients.items():
            if parameter.grad is None:
                parameter.grad = written.detach()  # a tensor of its own, whose `data` may be replaced
            else:
                sums.append(parameter.grad)
                terms.append(written)
        if sums:
            torch._foreach_add_(sums, terms)

    def _outcome(self, loss: Tensor) -> Tensor:
        """The loss and the gradient norm."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.stack((loss.float(), nn.utils.get_total_norm(gradients)))


def _is_at(gradient: Tensor | None, written: Tensor) -> bool:
    return gradient is not None and gradient.data_ptr() == written.data_ptr()


@torch.no_grad()
def validation_loss(
    model: nn.Module, tokens: Tensor, machine: Machine, *, batches: int, batch_size: int, length: int
) -> float:
    """Mean loss in nats per token, in evaluation mode, over evenly spaced windows, which are the same in every run. The
    ranks share the windows, and the model's mode is restored.

    Raises:
        ValueError: if the ranks cannot share the batches evenly, or there are fewer tokens than in a window.
    """
    _check_shared('batches', batches)
    starts = even_starts(tokens, batches * batch_size, length).split(batch_size)
    losses = torch.zeros(batches, dtype=torch.float64, device=machine.device)
    with evaluation_mode(model):  # type: ignore[arg-type]
        for number in share(range(batches)):
            with machine.autocast():
                losses[number] = model(windows(tokens, starts[number], length + 1).to(machine.device), return_loss=True)
    return sum_over_ranks(losses).mean().item()


def _compile(function: Callable[..., Any], machine: Machine) -> Callable[..., Any]:
    """Compile a function as one graph, which later processes find in PyTorch's cache."""
    options = _cacheable()
    if machine.triton:
        # small kernels that do not depend on each other, such as casts, are merged into one
        options = options | {'combo_kernels': True}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


@functools.cache
def _cacheable() -> dict[str, Any]:
    """The option that lets PyTorch cache graphs that enter or leave autocast, as ours do where precision matters.

    PyTorch's key for a graph holds only the names of its operations, so a digest of the sources of ours is added to it.
    """
    sources = sorted(Path(*ops.__path__).rglob('*.py'))
    key = hashlib.sha256(b''.join(source.read_bytes() for source in sources)).hexdigest()
    names = ('torch.amp.autocast_mode._enter_autocast', 'torch.amp.autocast_mode._exit_autocast')
    return {'unsafe_marked_cacheable_functions': dict.fromkeys(names, key)}


def _compiled(layers: Iterable[nn.Module], machine: Machine) -> dict[nn.Module, Callable[..., Any]]:
    """The forward of each layer, compiled separately, because FSDP2's hooks between the layers are Python."""
    return {layer: _compile(layer.forward, machine) for layer in layers}


@contextmanager
def _in_place_of_forward(compiled: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A context in which layers run their compiled forward. Outside it, they can be copied and saved as usual."""
    if not compiled:
        yield
        return
    limits = torch._dynamo.config
    # layers share the code of their forward, and PyTorch compiles 8 variants of the same code before it refuses
    with limits.patch(recompile_limit=limits.recompile_limit + len(compiled)):
        for layer, forward in compiled.items():
            layer.forward = forward
        try:
            yield
        finally:
            for layer in compiled:
                del layer.forward


def _check_shared(name: str, count: int) -> None:
    check_positive(**{name: count})
    if count % num_ranks():
        raise ValueError(f'{name} must be a multiple of the {num_ranks()} processes that share them, got {count}')
