"""A trial of a user's memory network on random numbers, in both backends."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from titans_pytorch.memory.backends.base import Backend
from titans_pytorch.memory.backends.dense import DenseBackend
from titans_pytorch.memory.backends.dual import DualBackend
from titans_pytorch.memory.chunks import Chunks
from titans_pytorch.memory.fast_weights import FastWeights, Weights
from titans_pytorch.memory.reference import default_loss_fn
from titans_pytorch.memory_models import is_unmodified, without_norm
from titans_pytorch.ops.associative_scan import AssocScan
from titans_pytorch.utils.checks import first_line
from titans_pytorch.utils.functional import (
    call_with_weights,
    keeping_random_state,
    on_cpu,
    on_meta,
    with_tensors,
)
from titans_pytorch.utils.plain import is_intercepted

MOST_ROWS = 256
"""Number of rows of a chunk in a trial; more would take long."""


def is_built_in(network: Module) -> bool:
    """True for an unmodified network of this package, which needs no trial."""
    return is_unmodified(network) and not is_intercepted(network.modules())


class Trial(NamedTuple):
    """A memory network with random weights and rows in float64."""

    network: Module
    base: Weights
    over_time: Weights
    chunks: Chunks

    @classmethod
    def of(cls, network: Module, dim: int, rows: int) -> Trial:
        """A trial of a copy of a network, on chunks of `rows` rows. It does not change the global random state."""
        rows = min(rows, MOST_ROWS)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device='cpu')

        # without values, which is how a memory holds its network
        copy = on_meta(network)
        pairs = zip(copy.buffers(), network.buffers())
        constants = {id(e): draw(*b.shape) if b.is_meta else b.to('cpu', torch.float64) for e, b in pairs}
        copy = with_tensors(copy, constants) if constants else copy
        shapes = {name: p.shape for name, p in copy.named_parameters()}
        base, over_time = (
            {name: draw(*leading, *shape) for name, shape in shapes.items()} for leading in ((2,), (2, 3))
        )
        keys, values, step_sizes = draw(2, 3, rows, dim), draw(2, 3, rows, dim), draw(2, 3, rows).sigmoid()
        trial = cls(copy, base, over_time, Chunks(keys, values, step_sizes, draw(2, 3), None, None, None))
        if trial._is_finite():
            return trial
        # a network may be defined only for positive weights, for example if it takes their logarithm
        base, over_time = ({name: w.abs() for name, w in weights.items()} for weights in (base, over_time))
        return trial._replace(base=base, over_time=over_time)

    def obstacle_to_dense(self, network: Module) -> str | None:
        """Why the network does not run with weights that differ from chunk to chunk; `None` if it does.

        `network`: the user's module, with its weights; the trial itself runs a copy without weights.
        """
        try:
            self._dense_gradients()
            if not self._is_random() and not self._uses_given_weights(network):
                return 'its result depends on weights that it does not reach through `self`'
        except Exception as cause:
            return first_line(cause)
        return None

    def unseen_rows(self, rowwise: bool) -> str | None:
        """How the network uses rows that it may not see, because a sequence may be split; `None` if it does not.

        `rowwise`: whether it claims to treat rows separately.
        """
        self.network.eval()
        if self._is_random():
            return None  # there is nothing to compare
        rows, out = self.chunks.keys[0, 0], self._output(self.network)
        for length in {1, len(rows) // 2, len(rows) - 1} - {0, len(rows)}:
            if not torch.allclose(self._output(self.network, rows[:length]), out[:length]):
                return 'must be causal, but its output for a row depends on later rows, or on how many there are'
        first_changed = rows.clone()
        first_changed[0] = -rows[0].flip(0)  # not shifted by a constant, which a norm would subtract
        if rowwise and not torch.allclose(self._output(self.network, first_changed)[1:], out[1:]):
            return 'has rowwise=True, but its output for a row depends on earlier rows'
        return None

    def obstacle_to_dual(self, network: Module) -> str | None:
        """Why the dual form cannot serve a network; `None` if it can."""
        inner = without_norm(network)
        if not self._is_finite():
            return 'its results for random numbers are not finite'
        if 'linear' not in inspect.signature(inner.forward).parameters:
            return 'its forward takes no `linear`'
        names = {id(p): name for name, p in network.named_parameters()}
        constants = {id(buffer) for buffer in network.buffers()}
        used: list[str] = []

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            if id(weight) not in constants:
                used.append(names.get(id(weight), 'a tensor that is no parameter'))
            return x @ weight

        first = next(inner.parameters())
        try:
            with keeping_random_state(first.device), torch.no_grad():
                network(self.chunks.keys[0, 0].to(first.device, first.dtype), linear=linear)
        except Exception as cause:
            return f'it fails there: {first_line(cause)}'
        matrices = [name for name, p in network.named_parameters() if p.ndim > 1]
        if sorted(used) != sorted(matrices):
            return f'it must use each of its matrices {matrices} once through `linear`, and used {used}'
        return next(filter(None, (self._difference(training) for training in (True, False))), None)

    def _difference(self, training: bool) -> str | None:
        """How the dual backend's results differ from those of the dense one; `None` if they are equal."""
        self.network.train(training)
        try:
            expected, dense_gradients = self._retrieved(DenseBackend), self._dense_gradients()
            if self._is_random():
                return None  # there is nothing to compare
            try:
                broadcasts = torch.allclose(self._retrieved(DualBackend), expected)
            except RuntimeError:
                broadcasts = False
            if not broadcasts:
                return 'its vectors must broadcast over rows, as `vector.unsqueeze(-2)` does'
            for grad_enabled in (True, False):
                with torch.set_grad_enabled(grad_enabled):
                    dual_gradients = self._dual_gradients()
                if not all(torch.allclose(dual_gradients[name], dense_gradients[name]) for name in self.base):
                    return (
                        'gradients through its products differ from those of its weights, as with operations in place'
                    )
        except Exception as cause:
            return f'it fails there: {first_line(cause)}'
        return None

    def _backend(self, kind: type[Backend]) -> Any:
        return kind(self.network, None, default_loss_fn, AssocScan(), None, False)

    def _retrieved(self, kind: type[Backend]) -> Tensor:
        with on_cpu():
            return self._backend(kind).apply_over_time(FastWeights.of(self.over_time), self.chunks.keys, 0)

    def _dense_gradients(self) -> Weights:
        with on_cpu():
            return self._backend(DenseBackend).gradients_of_chunks(self.chunks, self.base, None)[0]

    def _dual_gradients(self) -> Weights:
        with on_cpu():
            gradients = self._backend(DualBackend).traced_gradients(self.chunks, self.base, None)
        return {name: gradients.dense(name) for name in self.base}

    def _is_random(self) -> bool:
        """True if equal rows are treated differently, for example by dropout."""
        with on_cpu():  # around both calls, so that they do not begin with the same random numbers
            first, second = (self._computed(self.network) for _ in range(2))
        return not torch.allclose(first, second, equal_nan=True)

    def _is_finite(self) -> bool:
        try:
            return bool(self._output(self.network).isfinite().all())
        except Exception:
            return True  # other checks report why it fails

    def _uses_given_weights(self, network: Module) -> bool:
        """True if given weights replace all of the network's weights."""
        if any(t.is_meta for t in (*network.parameters(), *network.buffers())):
            return True  # it has no others
        other = deepcopy(network).to('cpu', torch.float64)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.copy_(self.base[name][0])
        return torch.allclose(self._output(self.network), self._output(other), equal_nan=True)

    def _output(self, network: Module, rows: Tensor | None = None) -> Tensor:
        """Output of the network for `rows`; by default for those of a chunk."""
        with on_cpu():
            return self._computed(network, rows)

    def _computed(self, network: Module, rows: Tensor | None = None) -> Tensor:
        weights = {name: w[0] for name, w in self.base.items()}
        with torch.no_grad():
            return call_with_weights(network, weights, self.chunks.keys[0, 0] if rows is None else rows)
