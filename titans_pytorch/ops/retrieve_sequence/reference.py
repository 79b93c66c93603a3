"""Reference implementation of retrieval over a sequence, and of the linear map of a factored matrix that it uses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from titans_pytorch.ops.norms import layer_norm
from titans_pytorch.utils.precision import autocast_dtype
from titans_pytorch.utils.shapes import Float

ROWS_IN_CACHE = 2048
"""Number of stored rows in the blocks that a CPU reads at once."""


def retrieve_sequence(
    queries: Float[Tensor, 'bh r n c d'],
    coefficients: Float[Tensor, 'bh r n n'],
    initial_coefficients: Float[Tensor, 'bh r n k'],
    matrices: Sequence[tuple[Tensor, Tensor, Tensor]],
    gamma: Float[Tensor, 'bh r n d'] | None,
    eps: float,
) -> Float[Tensor, 'bh r n c d']:
    given: tuple[Any, ...] = (queries, coefficients.tril(-1), initial_coefficients, [*map(tuple, matrices)], gamma)
    (heads, num_blocks), stored = queries.shape[:2], matrices[0][1].shape[2]
    at_once = blocks_at_once(num_blocks, heads * stored, queries.device)
    if at_once == num_blocks:
        return _retrieve(eps, *given)
    # not by slices: each slice's gradient would be as long as the whole tensor
    leaves, spec = tree_flatten(given)
    parts = zip(*(repeat(None) if t is None else t.split(at_once, dim=1) for t in leaves))
    return torch.cat([_retrieve(eps, *tree_unflatten(part, spec)) for part in parts], dim=1)


def blocks_at_once(num_blocks: int, rows_of_block: int, device: torch.device) -> int:
    """Number of blocks to read together: on a CPU, as many as stay in its cache, given their stored rows."""
    return num_blocks if device.type == 'cuda' else min(num_blocks, max(1, ROWS_IN_CACHE // max(1, rows_of_block)))


def _retrieve(
    eps: float,
    queries: Tensor,
    coefficients: Tensor,
    initial_coefficients: Tensor,
    matrices: list[tuple[Tensor, Tensor, Tensor]],
    gamma: Tensor | None,
) -> Tensor:
    """Retrieve from all blocks at once."""

    def linear(x: Tensor, matrix: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        given = (t.flatten(0, 1) for t in (x, coefficients, initial_coefficients, *matrix))
        return factored_linear(*given).unflatten(0, queries.shape[:2])

    y = linear(queries, matrices[0])
    for matrix in matrices[1:]:
        y = linear(F.gelu(y), matrix)
    return y if gamma is None else layer_norm(y, eps) * (gamma.unsqueeze(3) + 1) + queries


def factored_linear(
    x: Float[Tensor, 'b n c d'],
    coefficients: Float[Tensor, 'b n n'],
    initial_coefficients: Float[Tensor, 'b n k'],
    initial_states: Float[Tensor, 'b k d e'],
    inputs: Float[Tensor, 'b t d'],
    deltas: Float[Tensor, 'b t e'],
) -> Float[Tensor, 'b n c e']:
    """Multiply the rows of every step by the matrix of that step, x W_i."""
    if autocast_dtype(x.device) is None:  # the weights may have been stored under autocast
        initial_states, inputs, deltas = (t.to(x.dtype) for t in (initial_states, inputs, deltas))
    n = x.shape[1]
    out = _combined_linear(x, initial_coefficients, initial_states)
    if n > 1:  # nothing is stored before step 0
        # the same for all rows of a chunk; expanded, because products over so short an axis are slow on a CPU
        of_rows = coefficients.unsqueeze(-1).expand(-1, -1, -1, inputs.shape[1] // n).flatten(2)
        scores = (x.flatten(1, 2) @ inputs.mT).unflatten(1, x.shape[1:3]) * of_rows.unsqueeze(2)
        out = torch.baddbmm(out, scores.flatten(1, 2), deltas)
    return out.view(*x.shape[:3], deltas.shape[-1])


def _combined_linear(
    x: Float[Tensor, 'b n c d'], coefficients: Float[Tensor, 'b n k'], states: Float[Tensor, 'b k d e']
) -> Float[Tensor, 'b nc e']:
    """Multiply rows by Σ_k coefficient_k · state_k without forming it: the shorter of rows and products are scaled."""
    coefficients = coefficients.to(x.dtype)
    if states.shape[2] <= states.shape[3]:
        scaled = x.unsqueeze(3) * coefficients[:, :, None, :, None]
        return scaled.flatten(3).flatten(1, 2) @ states.flatten(1, 2)

    rows = x.flatten(1, 2)
    products = ((rows @ state).view(*x.shape[:3], -1) for state in states.unbind(1))
    parts = [product * share[:, :, None, None] for product, share in zip(products, coefficients.unbind(2))]
    return sum(parts[1:], parts[0]).flatten(1, 2)
