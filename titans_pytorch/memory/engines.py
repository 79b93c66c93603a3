"""How chunks are stored in a memory network, by gradient descent with momentum and forgetting (Titans eq. 10, 12, 13).

Two engines of one meaning. The dense one forms a gradient, a momentum and a weight for every chunk; it serves any
memory network, and is what the other is tested against. The dual one keeps, for each matrix of the network, the rows
that it saw and the errors of what it gave, and never forms a matrix per chunk; it serves networks that send every
product of a row with a matrix through `linear`, as those of `memory_models.py` do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import Module
from torch.utils._pytree import tree_leaves, tree_map

from titans_pytorch.memory.fast_weights import Factors, FastWeights, Piece, Runs, Stretch, Weights, times
from titans_pytorch.memory_models import NETWORKS, ResidualNorm, inner_mlp
from titans_pytorch.ops import _dispatch, inner_gradient, memory_batch_scan, retrieve_sequence
from titans_pytorch.ops.associative_scan import AssocScan, coefficient_product, gate_products
from titans_pytorch.ops.momentum_scan import momentum_scan, vector_scan, weight_scan
from titans_pytorch.ops.newton_schulz import newton_schulz
from titans_pytorch.utils.checks import described
from titans_pytorch.utils.functional import (
    call_with_weights,
    is_intercepted,
    is_traced,
    on_meta,
    transformed,
    with_tensors,
)
from titans_pytorch.utils.precision import at_least_float32, no_autocast, operand_dtype
from titans_pytorch.utils.shapes import Bool, Float

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), both (m, d), to one loss a row, (m,)."""


def default_loss_fn(pred: Float[Tensor, '... d'], target: Float[Tensor, '... d']) -> Float[Tensor, ' ...']:
    """‖M(k) − v‖², a mean over features (Titans eq. 12)."""
    return (pred - target).pow(2).mean(dim=-1)


def batched_loss(loss_fn: LossFn, axes: int) -> LossFn:
    """`loss_fn` for so many axes in front; the default one takes any."""
    if loss_fn is default_loss_fn:
        return loss_fn
    for _ in range(axes):
        loss_fn = transformed(vmap, loss_fn)
    return loss_fn


def _split(tensors: Iterable[Tensor | None], lengths: list[int]) -> list[Sequence[Any]]:
    """Each along its second axis."""
    # not by slices: the gradient of each would be as long as the whole
    return [[None] * len(lengths) if t is None else t.split(lengths, dim=1) for t in tensors]


class Chunks(NamedTuple):
    """What a run of chunks asks the memory to learn, and how."""

    keys: Float[Tensor, 'bh n m d']
    values: Float[Tensor, 'bh n m d']
    step_sizes: Float[Tensor, 'bh n m']
    """θ, the weight of a row's loss; 0 where nothing is to be stored."""
    decay: Float[Tensor, 'bh n']
    """Logits of α, the share of the memory forgotten."""
    momentum: Float[Tensor, 'bh n o'] | None
    """Logits of η, the share of the past surprise carried on, for each order."""
    momentum_mix: Float[Tensor, 'bh n o'] | None
    """How the orders combine; one more than `momentum` has if the plain surprise takes part. `None`: the last."""
    modulation: Float[Tensor, 'bh n w'] | None
    """A factor on the update of each parameter."""

    def split(self, lengths: list[int]) -> list[Chunks]:
        """So many chunks, then so many, to the end."""
        return [Chunks(*own) for own in zip(*_split(self, lengths))]


class Residual(NamedTuple):
    """Another memory's weights, a share of which is added to the base weights that gradients are taken at."""

    weights: FastWeights
    dense: Weights
    """Those that are held dense, before each chunk, (bh, n, …)."""
    shares: Float[Tensor, 'bh n']
    first: int
    """The step that belongs to the first chunk."""

    @classmethod
    def of(cls, weights: FastWeights, shares: Float[Tensor, 'bh n'], first: int) -> Residual:
        dense = {name: weights.steps(name, first, shares.shape[1]) for name in weights.dense}
        return cls(weights, dense, shares, first)

    def split(self, lengths: list[int]) -> list[Residual]:
        dense = {name: w.split(lengths, dim=1) for name, w in self.dense.items()}
        firsts = accumulate(lengths[:-1], initial=self.first)
        return [
            Residual(self.weights, {name: parts[run] for name, parts in dense.items()}, shares, first)
            for run, (shares, first) in enumerate(zip(self.shares.split(lengths, dim=1), firsts))
        ]

    def steps(self, name: str) -> Float[Tensor, 'bh n ...']:
        """A share of a parameter before each chunk."""
        held = self.dense.get(name)
        return _per_chunk(
            self.shares, self.weights.steps(name, self.first, self.shares.shape[1]) if held is None else held
        )

    def linear(self, name: str, x: Float[Tensor, 'bh n m d']) -> Float[Tensor, 'bh n m e']:
        """A share of the rows of each chunk times the matrix before it."""
        out = times(x, self.dense[name]) if name in self.dense else self.weights.linear(name, x, self.first)
        return _per_chunk(self.shares, out)


Momentum = dict[str, list[Tensor]]
"""Per parameter of the memory network, by name: that of each order, (bh, …)."""


class Gates(NamedTuple):
    """Logarithms of the shares of the states before a chunk that it leaves."""

    log_momentum: Float[Tensor, 'bh n'] | None
    """log η"""
    log_retention: Float[Tensor, 'bh n']
    """log (1 − α)"""

    @classmethod
    def of(cls, chunks: Chunks) -> Gates:
        """Of momentum of one order."""
        momentum = None if chunks.momentum is None else F.logsigmoid(at_least_float32(chunks.momentum.squeeze(-1)))
        return cls(momentum, F.logsigmoid(-at_least_float32(chunks.decay)))

    def split(self, lengths: list[int]) -> list[Gates]:
        return [Gates(*own) for own in zip(*_split(self, lengths))]


class Span(NamedTuple):
    """Consecutive chunks whose gradients are taken at one set of base weights."""

    length: int
    """In chunks."""
    whole: bool
    """Whether it is a memory batch, from its start to its end."""
    ends_batch: bool
    """Whether a memory batch ends with it."""


class Run(NamedTuple):
    """What is stored at once: a span of chunks, or several memory batches. For the dual engine with their recurrences,
    in one of three forms."""

    chunks: Chunks
    residual: Residual | None
    ends_batch: bool
    mixing: Mixing | None = None
    """Solved."""
    batches: Mixing | None = None
    """Solved for several memory batches in a row, each with its own place in the second axis."""
    gates: Gates | None = None
    """To be walked, chunk after chunk."""


class Stored(NamedTuple):
    """What storing a run of chunks gives."""

    weights: Piece | Stretch
    momentum: Momentum
    """After the last chunk; empty without momentum."""
    losses: Float[Tensor, 'bh n m']
    """‖M(k) − v‖² of each row before it is stored, unweighted: how surprising it was."""


class Engine:
    """Stores chunks in the weights of `model`, and sends rows through weights over time.

    Args:
        model: the memory network, a template whose own weights are not used.
        loss_fn: what gradient descent lowers.
        scan: how the dense engine solves its recurrences.
        max_grad_norm: soft bound of a gradient's norm.
        spectral_norm: orthogonalise the momentum.
    """

    def __init__(
        self, model: Module, loss_fn: LossFn, scan: AssocScan, max_grad_norm: float | None, spectral_norm: bool
    ):
        self.model = model
        self.loss_fn = loss_fn
        self.scan = scan
        self.max_grad_norm = max_grad_norm
        self.spectral_norm = spectral_norm

    def run_length(self, device: torch.device, rows: int) -> int | None:
        """How many chunks of so many rows are best stored in one run; `None`: all that there are."""
        return None

    def runs(self, chunks: Chunks, residual: Residual | None, spans: list[Span], weights: Weights) -> list[Run]:
        """Chunks as runs, ready to be stored one after the other, from `weights` on."""
        lengths = [span.length for span in spans]
        residuals = [None] * len(spans) if residual is None else residual.split(lengths)
        parts = zip(chunks.split(lengths), residuals, spans)
        return [Run(own, added, span.ends_batch) for own, added, span in parts]

    def store(self, run: Run, base: Weights, last: Weights, last_momentum: Momentum) -> Stored:
        """Store a run, all gradients at `base` (plus its residual), going on from `last` and `last_momentum`."""
        raise NotImplementedError

    def scanned(
        self,
        chunks: Chunks,
        residual: Residual | None,
        ends_batch: Bool[Tensor, '1 n'],
        base: Weights,
        last: Weights,
        momentum: Momentum,
        transition: Callable[[Weights, Weights], Weights],
    ) -> tuple[Stored, Weights]:
        """Chunk after chunk by one operation of the graph, with whose number the graph does not grow.

        `ends_batch`: whether a memory batch ends with each chunk, by which the base weights become
        `transition(base, last)`. Returns also the base weights after the last chunk.
        """
        served = isinstance(self, DualEngine) and is_plain_mlp(self.model, self.loss_fn)
        if torch.is_grad_enabled() or not served:
            # whose gradient is written out; the operation takes no transforms of `torch.func`
            raise ValueError(
                "a length that is dynamic in torch.export needs torch.no_grad(), engine='dual', the default loss and a "
                'MemoryMLP of one or two matrices: export this for a fixed length'
            )
        # imported where it is used: PyTorch may yet move it
        from torch._higher_order_ops.scan import scan

        given = [index for index, t in enumerate(chunks) if t is not None]
        added: Any = ()
        if residual is not None:
            shares = residual.shares
            added = shares, {name: residual.weights.steps(name, residual.first, shares.shape[1]) for name in last}

        def step(carry: Any, of_chunk: Any) -> Any:
            base, last, momentum = carry
            tensors, added, ends = of_chunk
            one: list[Any] = [None] * len(Chunks._fields)
            for index, t in zip(given, tensors):
                one[index] = t.unsqueeze(1)
            own = None
            if added:
                share, dense = added
                dense = {name: w.unsqueeze(1) for name, w in dense.items()}
                own = Residual(FastWeights.of(dense), dense, share.unsqueeze(1), 0)
            orders = {name: [*every.unbind(0)] for name, every in momentum.items()}
            (run,) = self.runs(Chunks(*one), own, [Span(1, False, False)], last)
            stored = self.store(run, base, last, orders)
            end = stored.weights.end
            moved = transition(base, end)
            after = {name: torch.where(ends, moved[name], w) for name, w in end.items()}
            new_base = {name: torch.where(ends, moved[name], w) for name, w in base.items()}
            new_momentum = {name: torch.stack(every) for name, every in stored.momentum.items()}
            return apart((new_base, after, new_momentum)), apart((last, stored.losses[:, 0]))

        def apart(tensors: Any) -> Any:
            # the operation takes no two tensors of one memory, and wants every step's strides alike
            return tree_map(lambda t: t.clone(memory_format=torch.contiguous_format), tensors)

        carry = apart((base, last, {name: torch.stack(own) for name, own in momentum.items()}))
        every = apart(_chunks_first(([chunks[index] for index in given], added, ends_batch)))
        for t in tree_leaves((carry, every)):
            # all sizes but the number of chunks are known in the trace of a step, as transforms of own networks want;
            # `torch._dynamo.mark_static`, which sets this, does something else within an export
            t._dynamo_static_indices = {axis for axis, size in enumerate(t.shape) if isinstance(size, int)}
        (base, last, stacked), by_chunk = scan(step, carry, every)
        before, losses = _chunks_first(by_chunk)
        orders = {name: [*own.unbind(0)] for name, own in stacked.items()}
        return Stored(Piece(before, None, None, {}, last), orders, losses), base

    def retrieve(self, weights: FastWeights, rows: Float[Tensor, 'bh n c d'], first: int) -> Float[Tensor, 'bh n c d']:
        """Group k of `rows` through the network with the weights of step `first + k`."""
        lengths = weights.lengths(first, rows.shape[1])
        if len(lengths) == 1:
            return self.retrieve_with(self.model, weights, rows, first)
        firsts = accumulate(lengths[:-1], initial=first)
        parts = zip(rows.split(lengths, dim=1), firsts)
        return torch.cat([self.retrieve_with(self.model, weights, part, start) for part, start in parts], dim=1)

    @staticmethod
    def retrieve_with(model: Module, weights: FastWeights, rows: Tensor, first: int) -> Tensor:
        raise NotImplementedError


def choose_engine(requested: str, model: Module, dim: int) -> type[Engine]:
    """The engine for a network of width `dim`: the one requested, or with `auto` the dual one if it can serve."""
    if not isinstance(requested, str) or requested not in ('auto', 'dual', 'dense'):
        raise ValueError(f"engine must be 'auto', 'dual' or 'dense', got {described(requested)}")
    if _is_ours(model):
        return DenseEngine if requested == 'dense' else DualEngine
    trial = Trial.of(model, dim)
    obstacle_to_any = obstacle_to_dense(model, trial)
    if obstacle_to_any is not None:
        raise ValueError(
            'model must run under torch.func.vmap and torch.func.grad, by which the memory is computed, with weights '
            'that it reaches through `self`: write what fails there as plain operations on tensors, such as products '
            f'of matrices. It failed: {obstacle_to_any}'
        )
    if requested == 'dense':
        return DenseEngine
    obstacle = obstacle_to_dual(model, trial)
    if obstacle is None:
        return DualEngine
    if requested == 'dual':
        raise ValueError(f"engine='dual' cannot serve this model: {obstacle}; use engine='dense'")
    return DenseEngine


def _inner(model: Module) -> Module:
    return model.model if isinstance(model, ResidualNorm) else model


def _is_ours(model: Module) -> bool:
    """Whether it is a network of this package, as it is: then there is nothing to try."""
    return type(_inner(model)) in NETWORKS and not is_intercepted(model.modules())


def obstacle_to_dense(model: Module, trial: Trial) -> str | None:
    """What is wrong with a memory network where weights differ from chunk to chunk, or `None` if it runs."""
    try:
        trial.gradients_of_weights()
        if not trial.is_random() and not trial.takes_weights(model):
            return 'its result depends on weights that it does not reach through `self`'
    except Exception as cause:
        return _first_line(cause)
    return None


def obstacle_to_dual(model: Module, trial: Trial) -> str | None:
    """Why the dual form cannot serve a memory network, or `None` if it can: networks of a user are tried."""
    inner = _inner(model)
    if 'linear' not in inspect.signature(inner.forward).parameters:
        return 'its forward takes no `linear`'
    names = {id(p): name for name, p in model.named_parameters()}
    constants = {id(buffer) for buffer in model.buffers()}
    used: list[str] = []

    def record(x: Tensor, weight: Tensor) -> Tensor:
        if id(weight) not in constants:
            used.append(names.get(id(weight), 'a tensor that is no parameter'))
        return x @ weight

    first = next(inner.parameters())
    with torch.no_grad():
        model(trial.chunks.keys[0, 0].to(first.device, first.dtype), linear=record)
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    if sorted(used) != sorted(matrices):
        return f'it must use each of its matrices {matrices} once through `linear`, and used {used}'
    return next(filter(None, (trial.difference(training) for training in (True, False))), None)


class Trial(NamedTuple):
    """A memory network on random weights and rows in float64, in both engines."""

    model: Module
    base: Weights
    over_time: Weights
    chunks: Chunks

    @classmethod
    def of(cls, model: Module, dim: int) -> Trial:
        """Of a copy. Building a module must not move the global random state: these numbers have their own."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device='cpu')

        # without values, as a memory holds it
        copy = on_meta(model)
        pairs = zip(copy.buffers(), model.buffers())
        constants = {id(e): draw(*b.shape) if b.is_meta else b.to('cpu', torch.float64) for e, b in pairs}
        copy = with_tensors(copy, constants) if constants else copy
        shapes = {name: p.shape for name, p in copy.named_parameters()}
        base, over_time = (
            {name: draw(*leading, *shape) for name, shape in shapes.items()} for leading in ((2,), (2, 3))
        )
        keys, values, step_sizes = draw(2, 3, 4, dim), draw(2, 3, 4, dim), draw(2, 3, 4).sigmoid()
        return cls(copy, base, over_time, Chunks(keys, values, step_sizes, draw(2, 3), None, None, None))

    def engine(self, kind: type[Engine]) -> Any:
        return kind(self.model, default_loss_fn, AssocScan(), None, False)

    def retrieved(self, kind: type[Engine]) -> Tensor:
        with torch.random.fork_rng(devices=[]), torch.device('cpu'):
            return kind.retrieve_with(self.model, FastWeights.of(self.over_time), self.chunks.keys, 0)

    def gradients_of_weights(self) -> Weights:
        with torch.random.fork_rng(devices=[]), torch.device('cpu'):
            return self.engine(DenseEngine)._gradients(self.chunks, self.base, None)[0]

    def gradients_by_products(self) -> Weights:
        with torch.random.fork_rng(devices=[]), torch.device('cpu'):
            inputs, errors, vectors, _ = self.engine(DualEngine)._traced_factors(self.chunks, self.base, None)
        return {name: -vectors[name] if name in vectors else -inputs[name].mT @ errors[name] for name in self.base}

    def difference(self, training: bool) -> str | None:
        """What the dual engine computes otherwise than the dense one; `None` if nothing."""
        self.model.train(training)
        try:
            expected, of_weights = self.retrieved(DenseEngine), self.gradients_of_weights()
            if self.is_random():
                return None  # there is nothing to compare
            try:
                broadcasts = torch.allclose(self.retrieved(DualEngine), expected)
            except RuntimeError:
                broadcasts = False
            if not broadcasts:
                return 'its vectors must broadcast over rows, as `vector.unsqueeze(-2)` does'
            for grad_enabled in (True, False):
                with torch.set_grad_enabled(grad_enabled):
                    by_products = self.gradients_by_products()
                if not all(torch.allclose(by_products[name], of_weights[name]) for name in self.base):
                    return 'its gradients by its products are not those by its weights, as with operations in place'
        except Exception as cause:
            return f'it fails there: {_first_line(cause)}'
        return None

    def is_random(self) -> bool:
        """Whether equal rows are treated differently, as by dropout."""
        return not torch.equal(self._answer(self.model), self._answer(self.model))

    def takes_weights(self, model: Module) -> bool:
        """Whether weights that are given take the place of all that the network has."""
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            return True  # there are no others
        other = deepcopy(model).to('cpu', torch.float64)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.copy_(self.base[name][0])
        return torch.allclose(self._answer(self.model), self._answer(other))

    def _answer(self, model: Module) -> Tensor:
        weights = {name: w[0] for name, w in self.base.items()}
        with torch.random.fork_rng(devices=[]), torch.device('cpu'), torch.no_grad():
            return call_with_weights(model, weights, self.chunks.keys[0, 0])


def _first_line(cause: Exception) -> str:
    return [*str(cause).splitlines(), type(cause).__name__][0]


class DenseEngine(Engine):
    """A gradient, a momentum and a weight for every chunk; momentum and decay are scans over them."""

    def store(self, run: Run, base: Weights, last: Weights, last_momentum: Momentum) -> Stored:
        if torch.compiler.is_exporting():
            # whose tracer takes no gradients under `vmap`
            raise ValueError("torch.export needs engine='dual', and this memory is dense")
        chunks = run.chunks
        gradients, losses = self._gradients(chunks, base, run.residual)
        dense, end, momentum = {}, {}, {}

        for index, (name, gradient) in enumerate(gradients.items()):
            if self.max_grad_norm is not None:
                gradient = soft_clamp_norm(gradient, self.max_grad_norm)
            if chunks.modulation is not None:
                gradient = _per_chunk(chunks.modulation[..., index], gradient)

            update = -gradient
            if chunks.momentum is not None:
                orders = self._momentum(update, chunks.momentum, last_momentum[name])
                momentum[name] = [*orders[:, :, -1]]
                update = _combined(orders, update, chunks.momentum_mix)
            if self.spectral_norm and gradient.ndim > 3:
                update = newton_schulz(update)

            # Titans eq. 13: M_t = (1 − α_t) M_{t−1} + S_t
            keep = (-chunks.decay).sigmoid().unsqueeze(-1)
            weights = self.scan(keep, update, prev=last[name], remove_prev=False)
            dense[name], end[name] = weights[:, :-1], weights[:, -1]

        return Stored(Piece(dense, None, None, {}, end), momentum, losses)

    @staticmethod
    def retrieve_with(model: Module, weights: FastWeights, rows: Tensor, first: int) -> Tensor:
        def forward(weights: Weights, group: Tensor) -> Tensor:
            return call_with_weights(model, weights, group)

        steps = {name: weights.steps(name, first, rows.shape[1]) for name in weights}
        over_steps = vmap(forward, randomness='different')
        return transformed(vmap, over_steps, randomness='different')(steps, rows)

    def _gradients(self, chunks: Chunks, base: Weights, residual: Residual | None) -> tuple[Weights, Tensor]:
        """∇ of each chunk's weighted loss: per parameter (bh, n, …); and the unweighted losses (bh, n, m)."""

        def loss(weights: Weights, keys: Tensor, values: Tensor, step_sizes: Tensor) -> tuple[Tensor, Tensor]:
            # Titans eq. 12, the associative memory loss: ‖M(k) − v‖²
            losses = self.loss_fn(call_with_weights(self.model, weights, keys), values)
            return (losses * step_sizes).sum(), losses

        at, per_chunk = base, None
        if residual is not None:
            per_chunk = 0
            at = {name: w.unsqueeze(1) + residual.steps(name) for name, w in base.items()}

        gradient = grad(loss, has_aux=True)
        over_chunks = vmap(gradient, in_dims=(per_chunk, 0, 0, 0), randomness='different')
        every = transformed(vmap, over_chunks, randomness='different')
        return every(at, chunks.keys, chunks.values, chunks.step_sizes)

    def _momentum(self, surprise: Tensor, gates: Tensor, last: list[Tensor]) -> Float[Tensor, 'o bh n ...']:
        """Titans eq. 10, S_t = η_t S_{t−1} + u_t, order upon order: each order's momentum is the next one's input."""
        orders = []
        for gate, before in zip(gates.sigmoid().split(1, dim=-1), last):
            surprise = self.scan(gate, surprise, prev=before)
            orders.append(surprise)
        return torch.stack(orders)


class Mixing(NamedTuple):
    """The two recurrences over a run of n chunks, solved: what is in the state after chunk c of each chunk's update
    u_j, and of each state at the start. Both recurrences are linear, so these are matrices of gates alone."""

    momentum: Float[Tensor, 'bh n n']
    """Of the update j, in the combined momentum after chunk c."""
    momentum_starts: Float[Tensor, 'bh n o']
    """Of the momentum that each order started with."""
    decay: Float[Tensor, 'bh n n']
    """Of the combined momentum j, in the weights after chunk c."""
    steps: Float[Tensor, 'bh n n']
    """Of the update j, in the weights before chunk c: those of step c."""
    step_starts: Float[Tensor, 'bh n k']
    """Of the weights at the start, then of each order's momentum, in the weights before chunk c."""
    end: Float[Tensor, 'bh k n']
    """Of the update j, in the weights and in each order's momentum after the last chunk."""
    end_starts: Float[Tensor, 'bh k k']
    """Of each state at the start, in each state after the last chunk."""

    @classmethod
    def of_runs(cls, chunks: Chunks, num_runs: int) -> Mixing:
        """`chunks` in so many runs of equal length, which become the second axis."""

        def by_run(gates: Tensor) -> Tensor:
            return gates.unflatten(1, (num_runs, -1)).flatten(0, 1)

        momentum, mix = (None if gates is None else by_run(gates) for gates in (chunks.momentum, chunks.momentum_mix))
        with no_autocast(chunks.decay):
            mixing = cls.of(by_run(chunks.decay), momentum, mix)
        return cls(*(t.unflatten(0, (-1, num_runs)) for t in mixing))

    def unbind(self) -> list[Mixing]:
        """Of each run."""
        return [Mixing(*own) for own in zip(*(t.unbind(1) for t in self))]

    @classmethod
    def of(
        cls,
        decay: Float[Tensor, 'bh n'],
        momentum: Float[Tensor, 'bh n o'] | None,
        momentum_mix: Float[Tensor, 'bh n _o'] | None,
    ) -> Mixing:
        """From the logits of α and η, and how the orders combine."""

        # in log space and at least float32: saturated gates stay finite
        def log_gate(logits: Tensor) -> Tensor:
            return F.logsigmoid(at_least_float32(logits))

        log_keep = log_gate(-decay)
        decay, beta = gate_products(log_keep), log_keep.cumsum(dim=-1).exp().unsqueeze(-1)
        identity = torch.eye(log_keep.shape[-1], dtype=decay.dtype, device=decay.device).expand_as(decay)
        if momentum is None:
            return cls._of(identity, beta[..., :0], decay, beta, decay, [], [])

        log_gates = log_gate(momentum)
        num_orders = log_gates.shape[-1]
        matrices: list[Tensor] = []
        starts: list[Tensor] = []
        for order in range(num_orders):
            products = gate_products(log_gates[..., order])
            of_own = F.pad(log_gates[..., order : order + 1].cumsum(dim=1).exp(), (order, num_orders - order - 1))
            matrices.append(products @ matrices[-1] if order else products)
            starts.append(products @ starts[-1] + of_own if order else of_own)

        combined, combined_starts = matrices[-1], starts[-1]
        if momentum_mix is not None:
            mix = momentum_mix.to(decay.dtype)
            zeroth = mix.shape[-1] > num_orders
            none = torch.zeros_like(starts[-1])
            parts = zip(mix.split(1, dim=-1), [identity] * zeroth + matrices, [none] * zeroth + starts)
            weighted = [(share * matrix, share * start) for share, matrix, start in parts]
            combined, combined_starts = (sum(terms[1:], terms[0]) for terms in zip(*weighted))

        weight_starts = torch.cat((beta, decay @ combined_starts), dim=-1)
        return cls._of(combined, combined_starts, decay @ combined, weight_starts, decay, matrices, starts)

    @classmethod
    def _of(
        cls,
        momentum: Tensor,
        momentum_starts: Tensor,
        weight: Tensor,
        weight_starts: Tensor,
        decay: Tensor,
        orders: list[Tensor],
        order_starts: list[Tensor],
    ) -> Mixing:
        # what is in the weights after chunk c is what step c + 1 has; step 0 has the weights at the start
        at_first = F.pad(torch.ones_like(weight_starts[:, :1, :1]), (0, weight_starts.shape[2] - 1))
        # a momentum has nothing of the weights in it
        order_ends = [F.pad(start[:, -1], (1, 0)) for start in order_starts]
        return cls(
            momentum=momentum,
            momentum_starts=momentum_starts,
            decay=decay,
            steps=F.pad(weight[:, :-1], (0, 0, 1, 0)),
            step_starts=torch.cat((at_first, weight_starts[:, :-1]), dim=1),
            end=torch.stack([weight[:, -1], *(order[:, -1] for order in orders)], dim=1),
            end_starts=torch.stack([weight_starts[:, -1], *order_ends], dim=1),
        )


class RunParts(NamedTuple):
    """Of a group of runs, what `retrieval` needs besides queries."""

    mix: Float[Tensor, 'bh r n n']
    shares: Float[Tensor, 'bh r n k']
    first: retrieve_sequence.Matrix | None
    last: retrieve_sequence.Matrix
    gamma: Float[Tensor, 'bh r n d'] | None

    def some_of(self, rows: Float[Tensor, 'bh s c d']) -> Float[Tensor, 'bh 1 n c d']:
        """Rows as many as a run has at most."""
        return rows[:, : self.mix.shape[2]].unsqueeze(1)


class DualEngine(Engine):
    """Rows and errors instead of gradients: a matrix X Δ of a chunk is never formed unless it must be.

    Spectral norm must: Newton–Schulz of a sum of such products has no such form. Vectors are as small as a row.
    So is a matrix that has no more numbers than a chunk's rows: then the product is formed too, as it is the smaller.
    """

    def run_length(self, device: torch.device, rows: int) -> int | None:
        # work inside a run grows with its square, launches with the number of runs: a GPU would rather work.
        # Where chunks are so long that their matrices are formed, the square is that of the chunks
        return max((128 if device.type == 'cpu' else 512) // rows, 8)

    def runs(self, chunks: Chunks, residual: Residual | None, spans: list[Span], weights: Weights) -> list[Run]:
        if self._scans(chunks):
            gates = Gates.of(chunks).split([span.length for span in spans])
            runs = super().runs(chunks, residual, spans, weights)
            return [run._replace(gates=own) for run, own in zip(runs, gates)]

        # the recurrences of neighbours of one length are solved together
        runs = []
        groups = [[*same] for _, same in groupby(spans, key=lambda span: span.length)]
        lengths = [sum(span.length for span in group) for group in groups]
        residuals = [None] * len(groups) if residual is None else residual.split(lengths)
        for group, own, own_residual in zip(groups, chunks.split(lengths), residuals):
            mixing = Mixing.of_runs(own, len(group))
            if all(span.whole for span in group) and own_residual is None and self._takes_batches(own, weights):
                runs.append(Run(own, None, True, batches=mixing))
            else:
                each = super().runs(own, own_residual, group, weights)
                runs += [run._replace(mixing=solved) for run, solved in zip(each, mixing.unbind())]
        return runs

    def store(self, run: Run, base: Weights, last: Weights, last_momentum: Momentum) -> Stored:
        if run.gates is not None:
            return self._scanned_in_order(run, run.gates, base, last, last_momentum)
        if run.batches is not None:
            return self._stored_batches(run.chunks, run.batches, last, last_momentum)
        chunks, has_momentum = run.chunks, run.chunks.momentum is not None
        assert run.mixing is not None
        dtype = next(iter(last.values())).dtype
        mixing = Mixing(*(t.to(dtype) for t in run.mixing))
        inputs, errors, vectors, losses = self._factors(chunks, base, run.residual)
        dense, factors, end, momentum = {}, {}, {}, {}

        for index, name in enumerate(base):
            modulation = None if chunks.modulation is None else chunks.modulation[..., index]
            starts = [last[name], *(last_momentum[name] if has_momentum else ())]

            if name in inputs and not self._materialises(chunks.keys.shape[2], *base[name].shape[1:]):
                update = self._factored_update(inputs[name], errors[name], modulation)
                factors[name] = Factors(starts, inputs[name].flatten(1, 2), update.flatten(1, 2))
                ends = _ends(mixing, starts, inputs[name], update)
            else:
                descent = inputs[name].mT @ errors[name] if name in inputs else vectors[name]
                update = self._dense_update(descent.to(dtype), modulation)
                dense[name], ends = self._dense_run(mixing, starts, update)
            end[name] = ends[0]
            if has_momentum:
                momentum[name] = ends[1:]

        return Stored(Piece(dense, mixing.steps, mixing.step_starts, factors, end), momentum, losses)

    def retrieve(self, weights: FastWeights, rows: Float[Tensor, 'bh n c d'], first: int) -> Float[Tensor, 'bh n c d']:
        parts = self._parts(weights) if is_plain_mlp(self.model, self.loss_fn) else []
        if not parts or not all(retrieve_sequence.kernels_serve(own.some_of(rows), *own) for own in parts):
            return super().retrieve(weights, rows, first)

        _, eps = _norm(self.model)
        out, start, stop = [], 0, first + rows.shape[1]
        for own in parts:
            steps = own.mix.shape[1:3]
            end = start + steps.numel()
            low, high = max(first, start), min(stop, end)
            if low < high:
                within = rows[:, low - first : high - first]
                if (low, high) != (start, end):  # runs are read as a whole
                    within = F.pad(within, (0, 0, 0, 0, low - start, end - high))
                retrieved = retrieve_sequence.retrieve(within.unflatten(1, steps), *own, eps)
                out.append(retrieved.flatten(1, 2)[:, low - start : high - start])
            start = end
        if stop > start:
            out.append(super().retrieve(weights, rows[:, max(start - first, 0) :], max(first, start)))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def _parts(self, weights: FastWeights) -> list[RunParts]:
        """What `retrieval` takes of each run; nothing if not all of their matrices are factored."""
        first_name, last_name = _matrix_names(self.model)
        gamma_name, _ = _norm(self.model)
        if any(name in weights.dense for name in (first_name, last_name)):
            return []
        lengths = [run.num_steps for run in weights.runs]
        gammas: Sequence[Tensor | None] = [None] * len(lengths)
        if gamma_name is not None:
            gammas = weights.dense[gamma_name][:, :-1].split(lengths, dim=1)
        return [
            RunParts(
                run.mix,
                run.shares,
                None if first_name is None else retrieve_sequence.Matrix(*run.matrices[first_name]),
                retrieve_sequence.Matrix(*run.matrices[last_name]),
                None if gamma is None else gamma.unflatten(1, run.mix.shape[1:3]),
            )
            for run, gamma in zip(weights.runs, gammas)
        ]

    @staticmethod
    def retrieve_with(model: Module, weights: FastWeights, rows: Tensor, first: int) -> Tensor:
        names = {id(p): name for name, p in model.named_parameters()}

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            name = names.get(id(weight))  # none for a constant of the network
            return x @ weight if name is None else weights.linear(name, x, first)

        vectors = {name: weights.steps(name, first, rows.shape[1]) for name in _vectors(model)}
        return call_with_weights(model, vectors, rows, linear=linear)

    def _factors(
        self, chunks: Chunks, base: Weights, residual: Residual | None
    ) -> tuple[Weights, Weights, Weights, Tensor]:
        """Per matrix the rows X it saw and their errors Δ = −∂ loss / ∂ (X W), (bh, n, m, ·); per vector minus its
        gradient, (bh, n, d); and the unweighted losses (bh, n, m)."""
        # a frozen memory builds no graph, although the gradient that it stores comes from one
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._needs_graph(chunks, base, residual)):
            if fused_record_serves(self.model, self.loss_fn, chunks, base, residual):
                return recorded(self.model, chunks, base, residual)
            return self._traced_factors(chunks, base, residual)

    def _needs_graph(self, chunks: Chunks, base: Weights, residual: Residual | None) -> bool:
        """Whether anything that factors depend on can have a gradient."""
        if is_traced():
            return True
        tensors = [*chunks, *base.values(), *tree_leaves(residual)]
        if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            return True
        if self.loss_fn is default_loss_fn:
            return False
        row = chunks.keys[0, 0, :1].detach()
        return self.loss_fn(row, row).requires_grad

    def _traced_factors(
        self, chunks: Chunks, base: Weights, residual: Residual | None
    ) -> tuple[Weights, Weights, Weights, Tensor]:
        """`_factors` of any network, by autograd."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        bh, n, m, _ = chunks.keys.shape
        vectors = {name: base[name].unsqueeze(1).expand(-1, n, -1) for name in _vectors(self.model)}
        if residual is not None:
            vectors = {name: v + residual.steps(name) for name, v in vectors.items()}

        inputs: Weights = {}

        def loss(probe: Callable[[str, Tensor], Tensor], vectors: Weights) -> tuple[Tensor, Tensor]:
            def linear(x: Tensor, weight: Tensor) -> Tensor:
                name = names.get(id(weight))
                if name is None:  # a constant of the network
                    return x @ weight
                inputs[name] = x
                out = (x.flatten(1, 2) @ base[name]).unflatten(1, (n, m))
                if residual is not None:
                    out = out + residual.linear(name, x)
                return probe(name, out)

            prediction = call_with_weights(self.model, vectors, chunks.keys, linear=linear)
            losses = batched_loss(self.loss_fn, 2)(prediction, chunks.values)
            # the gradient of minus the loss is the way down
            return -(losses * chunks.step_sizes).sum(), losses

        if torch.is_grad_enabled() and not is_traced():
            errors, descents, losses = _descent(loss, vectors)
        else:
            widths = {name: w.shape[-1] for name, w in base.items() if name not in vectors}
            zeros = {name: chunks.keys.new_zeros(bh, n, m, width) for name, width in widths.items()}
            errors, descents, losses = _traced_descent(loss, vectors, zeros)
        return {name: x.to(errors[name].dtype) for name, x in inputs.items()}, errors, descents, losses

    def _materialises(self, rows: int, dim_in: int, dim_out: int) -> bool:
        """Whether to form a chunk's X Δ: where it must be, and where it is no larger than the rows of X and Δ."""
        return self.spectral_norm or rows * (dim_in + dim_out) >= dim_in * dim_out

    def _factored_update(self, inputs: Tensor, errors: Tensor, modulation: Tensor | None) -> Tensor:
        """Errors of the update: clamped and modulated, chunk by chunk."""
        scales = self._scales(inputs, errors, modulation)
        return errors if scales is None else _per_chunk(scales, errors)

    def _scales(self, inputs: Tensor, errors: Tensor, modulation: Tensor | None) -> Float[Tensor, 'bh n'] | None:
        """By how much the clamp and modulation scale the update of each chunk."""
        if self.max_grad_norm is None:
            return modulation
        # ‖XᵀΔ‖² = Σ (X Xᵀ) ∘ (Δ Δᵀ), without the matrix
        with no_autocast(inputs):
            rows, deltas = at_least_float32(inputs), at_least_float32(errors)
            squared = ((rows @ rows.mT) * (deltas @ deltas.mT)).sum(dim=(-2, -1))
        clamp = _soft_clamp_factor(squared, self.max_grad_norm)
        return clamp if modulation is None else clamp * modulation

    def _dense_update(self, descent: Tensor, modulation: Tensor | None) -> Tensor:
        if self.max_grad_norm is not None:
            descent = soft_clamp_norm(descent, self.max_grad_norm)
        return descent if modulation is None else _per_chunk(modulation, descent)

    def _dense_run(self, mixing: Mixing, starts: list[Tensor], update: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Weights before each chunk (bh, n, …), and each state after the last."""
        combined = self._orthogonal(mixing, starts[1:], update) if self.spectral_norm and update.ndim > 3 else None
        with no_autocast(update):
            flat, flat_starts = update.flatten(2), torch.stack(starts, dim=1).flatten(2)
            steps, of_starts = mixing.steps, mixing.step_starts
            ends = mixing.end @ flat + mixing.end_starts @ flat_starts
            if combined is not None:
                # into the weights goes the orthogonal momentum, which has taken in that at the start
                flat, flat_starts = combined.flatten(2), flat_starts[:, :1]
                steps, of_starts = F.pad(mixing.decay[:, :-1], (0, 0, 1, 0)), of_starts[..., :1]
                end = mixing.decay[:, -1:] @ flat + mixing.end_starts[:, :1, :1] * flat_starts
                ends = torch.cat((end, ends[:, 1:]), dim=1)
            weights = coefficient_product(steps, flat) + of_starts @ flat_starts
            return weights.view_as(update), [*ends.unflatten(2, update.shape[2:]).unbind(1)]

    def _orthogonal(self, mixing: Mixing, momenta: list[Tensor], update: Tensor) -> Tensor:
        """The momentum after each chunk, orthogonalised."""
        with no_autocast(update):
            combined = coefficient_product(mixing.momentum, update.flatten(2))
            if momenta:
                combined = combined + mixing.momentum_starts @ torch.stack(momenta, dim=1).flatten(2)
        return newton_schulz(combined.view_as(update)).to(update.dtype)

    # several memory batches at once, where kernels walk through them

    def _takes_batches(self, chunks: Chunks, weights: Weights) -> bool:
        if self.max_grad_norm is not None or chunks.modulation is not None:
            return False
        rows, states = chunks.keys.shape[2], 1 + (0 if chunks.momentum is None else chunks.momentum.shape[-1])
        forms = any(self._materialises(rows, *w.shape[1:]) for w in weights.values() if w.ndim > 2)
        plain = is_plain_mlp(self.model, self.loss_fn) and not forms
        return plain and memory_batch_scan.kernels_serve(*chunks[:3], [*weights.values()], states)

    def _stored_batches(self, chunks: Chunks, mixing: Mixing, last: Weights, last_momentum: Momentum) -> Stored:
        """Memory batches whose gradients are taken at the newest weights: the first at `last`."""
        first_name, last_name = _matrix_names(self.model)
        gamma_name, eps = _norm(self.model)
        starts = {name: [w, *last_momentum.get(name, [])] for name, w in last.items()}
        first, gamma = (None if name is None else starts[name] for name in (first_name, gamma_name))
        walked = memory_batch_scan.walk(
            *chunks[:3], first, starts[last_name], gamma, mixing.end, mixing.end_starts, eps
        )

        batches, length = mixing.steps.shape[1:3]
        keys = chunks.keys.to(walked.errors.dtype).unflatten(1, (batches, length)).flatten(2, 3)
        matrices = {last_name: (walked.last_starts, keys if first_name is None else walked.hidden, walked.errors)}
        ends, dense = {last_name: walked.last_end}, {}
        if first_name is not None:
            matrices[first_name] = (walked.first_starts, keys, walked.hidden_errors)
            ends[first_name] = walked.first_end
        if gamma_name is not None:
            with no_autocast(walked.descent):
                every = mixing.steps @ walked.descent + mixing.step_starts @ walked.gamma_starts
            dense[gamma_name], ends[gamma_name] = every.flatten(1, 2), walked.gamma_end

        states = {name: [*ends[name].unbind(1)] for name in last}
        end = {name: own[0] for name, own in states.items()}
        momentum = {name: states[name][1:] for name in last_momentum}
        stretch = Stretch(dense, Runs(mixing.steps, mixing.step_starts, matrices), end)
        return Stored(stretch, momentum, walked.losses.flatten(1, 2))

    # with spectral norm, one scan for each recurrence

    def _scans(self, chunks: Chunks) -> bool:
        """True if there is spectral norm, and momentum of one order or none."""
        one_order = chunks.momentum is None or chunks.momentum.shape[-1] == 1
        return self.spectral_norm and chunks.momentum_mix is None and one_order

    def _scanned_in_order(
        self, run: Run, gates: Gates, base: Weights, last: Weights, last_momentum: Momentum
    ) -> Stored:
        chunks = run.chunks
        inputs, errors, vectors, losses = self._factors(chunks, base, run.residual)
        operands = operand_dtype(next(iter(last.values())))
        dense, end, momentum = {}, {}, {}
        ended: Tensor | None

        for index, (name, weight) in enumerate(last.items()):
            modulation = None if chunks.modulation is None else at_least_float32(chunks.modulation[..., index])
            start = None if gates.log_momentum is None else last_momentum[name][0]
            if name in inputs:
                scales = self._scales(inputs[name], errors[name], modulation)
                momenta, ended = momentum_scan(inputs[name], errors[name], scales, gates.log_momentum, start, operands)
                dense[name], end[name] = weight_scan(newton_schulz(momenta), gates.log_retention, weight, operands)
            else:
                update = self._dense_update(vectors[name].to(weight.dtype), None)
                dense[name], end[name], ended = vector_scan(
                    update, modulation, gates.log_momentum, gates.log_retention, start, weight
                )
            if gates.log_momentum is not None and ended is not None:
                momentum[name] = [ended]
        return Stored(Piece(dense, None, None, {}, end), momentum, losses)


def _chunks_first(tensors: Any) -> Any:
    """The first two axes of tensors exchanged."""
    return tree_map(lambda t: t.transpose(0, 1), tensors)


ProbedLoss = Callable[[Callable[[str, Tensor], Tensor], Weights], tuple[Tensor, Tensor]]
"""(probe, vectors) to what is to rise, and losses on the side. `probe(name, product)` returns a product that
the rest is computed from, and with respect to which the gradient is wanted."""


def _descent(fn: ProbedLoss, vectors: Weights) -> tuple[Weights, Weights, Tensor]:
    """Gradients of `fn` by its products and by `vectors`, which can be differentiated again; and the losses."""
    products: Weights = {}

    def probe(name: str, product: Tensor) -> Tensor:
        products[name] = product if product.requires_grad else product.requires_grad_()
        return product

    vectors = {name: v if v.requires_grad else v.detach().requires_grad_() for name, v in vectors.items()}
    total, losses = fn(probe, vectors)
    gradients = iter(torch.autograd.grad(total, [*products.values(), *vectors.values()], create_graph=True))
    return dict(zip(products, gradients)), dict(zip(vectors, gradients)), losses


def _traced_descent(fn: ProbedLoss, vectors: Weights, zeros: Weights) -> tuple[Weights, Weights, Tensor]:
    """The same as a pure function, which is what the compiler can trace and what needs no graph around it: a zero is
    added to every product, and the gradient by it is that by the product."""

    def of_zeros(zeros: Weights, vectors: Weights) -> tuple[Tensor, Tensor]:
        return fn(lambda name, product: product + zeros[name], vectors)

    (errors, descents), losses = transformed(grad, of_zeros, argnums=(0, 1), has_aux=True)(zeros, vectors)
    return errors, descents, losses


def is_plain_mlp(model: Module, loss_fn: LossFn) -> bool:
    """Whether it is what kernels are written for: a memory MLP of one or two matrices, by the default loss."""
    mlp = inner_mlp(model)
    return mlp is not None and len(mlp.weights) <= 2 and loss_fn is default_loss_fn


def fused_record_serves(
    model: Module, loss_fn: LossFn, chunks: Chunks, base: Weights, residual: Residual | None
) -> bool:
    """Whether `inner_gradient.record` computes `_factors`: where it is one operation, and without a gradient, for which
    operations written out are fewer than those of autograd."""
    if not is_plain_mlp(model, loss_fn) or _dispatch.is_transformed():
        return False
    if residual is not None and residual.dense.keys() != base.keys():
        return False
    if not torch.is_grad_enabled():
        # lower ones as autograd has them, whose norm is more precise than its input
        return all(w.dtype in (torch.float32, torch.float64) for w in base.values())
    added = None if residual is None else _added(model, residual)
    return inner_gradient.kernels_serve_record(chunks.keys, chunks.values, chunks.step_sizes, [*base.values()], added)


def recorded(
    model: Module, chunks: Chunks, base: Weights, residual: Residual | None = None
) -> tuple[Weights, Weights, Weights, Tensor]:
    """What `_factors` returns, by one operation."""
    first_name, last_name = _matrix_names(model)
    first = None if first_name is None else base[first_name]
    gamma_name, eps = _norm(model)
    gamma = None if gamma_name is None else base[gamma_name]
    added = None if residual is None else _added(model, residual)
    hidden, hidden_errors, errors, descent, losses = inner_gradient.record(
        chunks.keys, chunks.values, chunks.step_sizes, first, base[last_name], gamma, eps, added
    )
    keys = chunks.keys.to(errors.dtype)
    of_vectors = {} if gamma is None else {'norm.gamma': descent}
    if first_name is None:
        return {last_name: keys}, {last_name: errors}, of_vectors, losses
    inputs = {first_name: keys, last_name: hidden}
    return inputs, {first_name: hidden_errors, last_name: errors}, of_vectors, losses


def _added(model: Module, residual: Residual) -> inner_gradient.Added:
    first_name, last_name = _matrix_names(model)
    dense = residual.dense
    first = None if first_name is None else dense[first_name]
    return inner_gradient.Added(residual.shares, first, dense[last_name], dense.get('norm.gamma'))


def _matrix_names(model: Module) -> tuple[str | None, str]:
    """Of a memory MLP of one matrix or two."""
    *first, last = [name for name, p in model.named_parameters() if p.ndim > 1]
    return first[0] if first else None, last


def _norm(model: Module) -> tuple[str | None, float]:
    """Of a memory MLP: the name of its norm's γ, and its eps."""
    return ('norm.gamma', model.norm.eps) if isinstance(model, ResidualNorm) else (None, 0.0)


def _ends(mixing: Mixing, starts: list[Tensor], inputs: Tensor, errors: Tensor) -> list[Tensor]:
    """Each state of a matrix after the last chunk, (bh, d, e): its weights, then each order's momentum."""
    if inner_gradient.kernels_serve_ends(mixing.end, mixing.end_starts, starts, inputs, errors):
        return inner_gradient.ends(mixing.end, mixing.end_starts, starts, inputs, errors)
    # one product for all states; what a row has in each goes to the shorter rows
    shares = _of_rows(mixing.end, inputs.shape[2]).mT.unsqueeze(3)
    inputs, errors = inputs.flatten(1, 2), errors.flatten(1, 2)
    if inputs.shape[2] <= errors.shape[2]:
        weighted = (shares * inputs.unsqueeze(2)).flatten(2)
        changes = (weighted.mT @ errors).unflatten(1, (len(starts), -1)).unbind(1)
    else:
        weighted = (shares * errors.unsqueeze(2)).flatten(2)
        changes = (inputs.mT @ weighted).unflatten(2, (len(starts), -1)).unbind(2)

    ends, of_starts = [], mixing.end_starts[..., None, None]
    with no_autocast(errors):
        for state, change in enumerate(changes):
            # the weights are in no momentum, and no momentum is in one of an earlier order
            for start in range(len(starts)) if state == 0 else range(1, state + 1):
                change = torch.addcmul(change, of_starts[:, state, start], starts[start])
            ends.append(change)
    return ends


def _of_rows(of_chunks: Float[Tensor, 'bh s n'], rows: int) -> Float[Tensor, 'bh s nm']:
    """What holds for a chunk, for each of its rows."""
    return of_chunks.unsqueeze(-1).expand(-1, -1, -1, rows).flatten(2)


def _vectors(model: Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.ndim == 1]


def _combined(orders: Tensor, surprise: Tensor, mix: Tensor | None) -> Tensor:
    """The last order, or the learned mixture of all, in which the plain surprise may have a share."""
    if mix is None:
        return orders[-1]
    if mix.shape[-1] > len(orders):
        orders = torch.cat((surprise.unsqueeze(0), orders))
    return torch.einsum('bno, obn... -> bn...', mix, orders)


def soft_clamp_norm(gradients: Float[Tensor, 'bh n ...'], max_norm: float) -> Float[Tensor, 'bh n ...']:
    """Each gradient with its norm x moved to (tanh(2x / max) + 1) · max / 2, unless it is a rounding error."""
    squared = at_least_float32(gradients).flatten(2).square().sum(dim=-1)
    return _per_chunk(_soft_clamp_factor(squared, max_norm), gradients).to(gradients.dtype)


def softclamp_grad_norm(t: Float[Tensor, 'bn ...'], max_value: float) -> Float[Tensor, 'bn ...']:
    """`soft_clamp_norm` of gradients along a single axis in front, under the reference's name."""
    return soft_clamp_norm(t[:, None, ..., None], max_value)[:, 0, ..., 0]


def softclamp_max(t: Tensor, max_value: float) -> Tensor:
    """Norms x moved to (tanh(2x / max) + 1) · max / 2, from max / 2 at 0 up to max."""
    half = max_value / 2
    return ((t / half).tanh() + 1) * half


ROUNDING_ERRORS = 64
"""A gradient counts as zero below so many machine epsilons of the maximal norm."""


def _soft_clamp_factor(squared_norm: Float[Tensor, 'bh n'], max_norm: float) -> Float[Tensor, 'bh n']:
    # what is left of terms that cancel has no direction, and must not be raised to max / 2; a norm of 1 in its place
    # keeps value and gradient finite
    floor = ROUNDING_ERRORS * torch.finfo(squared_norm.dtype).eps * max_norm
    negligible = squared_norm <= floor**2
    norm = torch.where(negligible, torch.ones_like(squared_norm), squared_norm).sqrt()
    factor = softclamp_max(norm, max_norm) / norm
    return torch.where(negligible, torch.ones_like(factor), factor)


def _per_chunk(factors: Float[Tensor, 'bh n'], tensors: Float[Tensor, 'bh n ...']) -> Float[Tensor, 'bh n ...']:
    # a plain product: einsum would lower its precision under autocast
    return tensors * beside(factors, tensors)


def beside(factors: Tensor, tensors: Tensor) -> Tensor:
    """Factors for the first axes of `tensors`, with an axis of one for each of the rest."""
    return factors.reshape(*factors.shape, *(1,) * (tensors.ndim - factors.ndim))
