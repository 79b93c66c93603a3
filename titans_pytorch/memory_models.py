"""Memory networks: small modules whose weights become the memory of `NeuralMemory`.

Each network maps (..., tokens, dim) to the same shape and can be called like any module. Two further conventions make
faster implementations possible:

- `forward(x, linear=torch.matmul)` computes every product of a row with a weight matrix as `linear(row, weight)`, so
  that a caller can record the inputs of a matrix, or apply a matrix that changes over time without materialising it;
- `rowwise` is true if each output row depends only on the same input row. Otherwise the network is assumed to mix the
  tokens of a chunk, which it must do causally, and the state keeps the queries of the open chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module, ModuleList, Parameter

from titans_pytorch.ops.norms import l2_norm, layer_norm
from titans_pytorch.utils.checks import check_hidden_width, check_number, check_positive
from titans_pytorch.utils.parameters import ParameterSequence, Resettable
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Float

Product = Callable[[Tensor, Tensor], Tensor]
"""A function that multiplies rows by a matrix, such as `torch.matmul`."""
Matrix = TypeVar('Matrix')


class Matrices(ParameterSequence):
    """Matrices of shapes (dim_in, dim_out) for `x @ matrix`, with Xavier-uniform initial values."""

    def __init__(self, *shapes: tuple[int, int]):
        super().__init__(torch.empty(shape) for shape in shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for matrix in self:
            nn.init.xavier_uniform_(matrix)


class Layers(ModuleList):
    """`depth` layers, each with `Matrices` of the same shapes."""

    def __init__(self, depth: int, *shapes: tuple[int, int]):
        super().__init__(Matrices(*shapes) for _ in range(depth))

    def __iter__(self) -> Iterator[Matrices]:  # type: ignore[override]
        return iter(self._modules.values())  # type: ignore[arg-type]


class LayerNorm(Module):
    """Layer norm with a gain of `1 + gamma`, initially 1, and no bias."""

    def __init__(self, dim: int):
        super().__init__()
        self.eps = 1e-5
        self.gamma = Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Float[Tensor, '... n d']) -> Float[Tensor, '... n d']:
        gain = at_least_float32(self.gamma).unsqueeze(-2) + 1.0
        return (layer_norm(x, self.eps) * gain).to(torch.promote_types(x.dtype, self.gamma.dtype))


class ResidualNorm(Resettable):
    """LN(f(x)) + x: the normalised output of `model` plus its input (TTT, arXiv 2407.04620)."""

    def __init__(self, dim: int, model: Module):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.model = model

    @property
    def rowwise(self) -> bool:
        return getattr(self.model, 'rowwise', False)

    def forward(self, x: Float[Tensor, '... n d'], **kwargs: Product) -> Float[Tensor, '... n d']:
        return self.norm(self.model(x, **kwargs)) + x


class MemoryMLP(Resettable):
    """`depth` matrices with GELU in between; hidden width `dim * expansion_factor`. `depth=1` is a linear memory."""

    rowwise = True

    def __init__(self, dim: int, depth: int, expansion_factor: float = 2.0):
        super().__init__()
        dim, depth = check_positive(dim=dim, depth=depth)
        dim_hidden = check_hidden_width('expansion_factor', dim, expansion_factor)

        dims = (dim, *(dim_hidden,) * (depth - 1), dim)
        self.weights = Matrices(*zip(dims[:-1], dims[1:]))

    def forward(self, x: Float[Tensor, '... d'], linear: Product = torch.matmul) -> Float[Tensor, '... d']:
        return self.through(self.weights, x, linear)

    @staticmethod
    def through(
        matrices: Iterable[Matrix], x: Float[Tensor, '... d'], linear: Callable[[Tensor, Matrix], Tensor]
    ) -> Float[Tensor, '... d']:
        """Apply `matrices` to rows; they are whatever `linear` accepts as a matrix, such as tensors or names."""
        for layer, matrix in enumerate(matrices):
            x = linear(F.gelu(x) if layer > 0 else x, matrix)
        return x


class PlainMLP(NamedTuple):
    """A `MemoryMLP`, bare or in a `ResidualNorm`, as a function of weights by parameter name. It calls no hooks."""

    matrices: tuple[str, ...]
    gamma: str | None
    """Name of the gain of the norm around the network, which is stored less 1; `None` without a norm."""
    eps: float

    @classmethod
    def of(cls, network: Module) -> PlainMLP | None:
        """The network in this form; `None` if it is any other network, or has frozen parts."""
        has_buffers = next(network.buffers(), None) is not None
        if type(without_norm(network)) is not MemoryMLP or not is_unmodified(network) or has_buffers:
            return None
        matrices = tuple(name for name, parameter in network.named_parameters() if parameter.ndim == 2)
        norm = network.norm if isinstance(network, ResidualNorm) else None
        return cls(matrices, None, 0.0) if norm is None else cls(matrices, 'norm.gamma', norm.eps)

    def of_weights(self, weights: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """The matrices in order, and the gain, which is `None` without a norm."""
        return [weights[name] for name in self.matrices], None if self.gamma is None else weights[self.gamma]

    def __call__(self, weights: Mapping[str, Tensor], rows: Float[Tensor, 'bh m d']) -> Float[Tensor, 'bh m d']:
        """Apply the network, with weights (bh, …), to rows."""
        gamma = None if self.gamma is None else weights[self.gamma]
        return self.through(rows, lambda x, name: torch.bmm(x, weights[name]), gamma)

    def through(
        self,
        rows: Float[Tensor, '... m d'],
        linear: Callable[[Tensor, str], Tensor],
        gamma: Float[Tensor, '... d'] | None,
    ) -> Float[Tensor, '... m d']:
        """Apply the network to rows; `linear` multiplies rows by the matrix with a given name."""
        out = MemoryMLP.through(self.matrices, rows, linear)
        return out if gamma is None else torch.addcmul(rows, layer_norm(out, self.eps), gamma.unsqueeze(-2) + 1.0)


class GatedResidualMemoryMLP(Resettable):
    """`depth` feedforwards, each blended into the residual stream by a gate per feature, then a final projection."""

    rowwise = True

    def __init__(self, dim: int, depth: int, expansion_factor: float = 4.0):
        super().__init__()
        dim, depth = check_positive(dim=dim, depth=depth)
        dim_hidden = check_hidden_width('expansion_factor', dim, expansion_factor)

        self.weights = Layers(depth, (dim, dim_hidden), (dim_hidden, dim), (dim * 2, dim))
        self.final_proj = Parameter(torch.empty(dim, dim))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.xavier_uniform_(self.final_proj)

    def forward(self, x: Float[Tensor, '... d'], linear: Product = torch.matmul) -> Float[Tensor, '... d']:
        for to_hidden, to_branch, to_gates in self.weights:
            branch = linear(F.gelu(linear(x, to_hidden)), to_branch)
            gates = linear(torch.cat((branch, x), dim=-1), to_gates).sigmoid()
            x = x + (branch - x) * gates  # not `lerp`, which does not accept the mixed dtypes of autocast
        return linear(x, self.final_proj)


class FactorizedMemoryMLP(Resettable):
    """`depth` square matrices, each a product of rank `k`: with fewer weights per chunk, chunks can be smaller."""

    rowwise = True

    def __init__(self, dim: int, depth: int, k: int = 32):
        super().__init__()
        dim, depth, k = check_positive(dim=dim, depth=depth, k=k)
        self.weights = Layers(depth, (dim, k), (k, dim))

    def forward(self, x: Float[Tensor, '... d'], linear: Product = torch.matmul) -> Float[Tensor, '... d']:
        for layer, (to_rank, from_rank) in enumerate(self.weights):
            x = linear(linear(F.gelu(x) if layer > 0 else x, to_rank), from_rank)
        return x


class MemorySwiGluMLP(Resettable):
    """`depth` gated feedforwards (GELU gate), each with a residual connection, then a layer norm.

    A gated feedforward is two matrices deep, so `depth=1` corresponds to the two-layer memory of TTT. Its hidden width
    is 2/3 that of an ungated feedforward with the same `expansion_factor`, which makes the number of weights equal.
    """

    rowwise = True

    def __init__(self, dim: int, depth: int = 1, expansion_factor: float = 4.0):
        super().__init__()
        dim, depth = check_positive(dim=dim, depth=depth)
        dim_hidden = check_hidden_width('expansion_factor', dim, expansion_factor, gated=True)

        self.weights = Layers(depth, (dim, dim_hidden * 2), (dim_hidden, dim))
        self.norm = LayerNorm(dim)

    def forward(self, x: Float[Tensor, '... n d'], linear: Product = torch.matmul) -> Float[Tensor, '... n d']:
        for to_hidden_and_gate, from_hidden in self.weights:
            hidden, gate = linear(x, to_hidden_and_gate).chunk(2, dim=-1)
            x = x + linear(hidden * F.gelu(gate), from_hidden)
        return self.norm(x)


class MemoryAttention(Resettable):
    """Causal attention over the tokens of a chunk, in parallel with a feedforward (as in PaLM).

    Queries and keys are l2-normalised, so that their similarity is a cosine; `scale` is the inverse temperature.
    """

    rowwise = False

    def __init__(self, dim: int, scale: float = 8.0, expansion_factor: float = 2.0):
        super().__init__()
        (dim,) = check_positive(dim=dim)
        dim_hidden = check_hidden_width('expansion_factor', dim, expansion_factor)

        self.scale = check_number('scale', scale, above=0)
        # for queries, keys and values; then for the feedforward
        self.weights = Matrices((dim, dim), (dim, dim), (dim, dim), (dim, dim_hidden), (dim_hidden, dim))

    def forward(self, x: Float[Tensor, '... n d'], linear: Product = torch.matmul) -> Float[Tensor, '... n d']:
        to_queries, to_keys, to_values, to_hidden, from_hidden = self.weights

        queries = l2_norm(linear(x, to_queries))
        keys = l2_norm(linear(x, to_keys))

        # no fused kernel: the inner gradient is differentiated again, which fused attention does not support
        similarity = queries @ keys.mT * self.scale
        length = x.shape[-2]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        attention = similarity.masked_fill(future, float('-inf')).softmax(dim=-1)
        attended = attention @ linear(x, to_values)

        return attended + linear(F.gelu(linear(x, to_hidden)), from_hidden)


NETWORKS = (MemoryMLP, GatedResidualMemoryMLP, FactorizedMemoryMLP, MemorySwiGluMLP, MemoryAttention)
"""The networks of this module, all of which the dual engine supports."""

_PARTS = (*NETWORKS, ResidualNorm, LayerNorm, Layers, Matrices)
_OWN_PARAMETERS = {GatedResidualMemoryMLP: {'final_proj'}, LayerNorm: {'gamma'}}


def without_norm(network: Module) -> Module:
    """The network inside a `ResidualNorm`, or the network itself."""
    # exact types here and below: subclasses, which is what parametrizations turn parts into, may compute otherwise
    return network.model if type(network) is ResidualNorm else network


def is_unmodified(network: Module) -> bool:
    """True for one of `NETWORKS`, possibly in a `ResidualNorm`, if no part of it has been replaced, extended,
    parametrized or tied."""
    weights = [*network.named_parameters(remove_duplicate=False)]
    is_tied = len({id(weight) for _, weight in weights}) < len(weights)
    return type(without_norm(network)) in NETWORKS and all(map(_is_own_part, network.modules())) and not is_tied


def _is_own_part(part: Module) -> bool:
    names = {*map(str, range(len(part)))} if isinstance(part, Matrices) else _OWN_PARAMETERS.get(type(part), set())
    return type(part) in _PARTS and part._parameters.keys() <= names
