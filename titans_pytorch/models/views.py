"""Selection of the three views that a memory reads, for queries, keys and values, from its input and earlier layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import Linear, Module

from titans_pytorch.ops.grouped_linear import grouped_linear
from titans_pytorch.ops.token_mixture import token_mixture
from titans_pytorch.utils.plain import is_plain_linear, plain_parts
from titans_pytorch.utils.shapes import Float

NUM_VIEWS = 3


def view_selector(dim: int, layer: int) -> nn.Sequential:
    """A module for the logits of three views over the memory's own input and four tensors of each earlier layer."""
    choices = (layer - 1) * 4 + 1
    return nn.Sequential(nn.RMSNorm(dim), Linear(dim, NUM_VIEWS * choices))


def selected_views(
    selector: Module, own: Float[Tensor, 'b n d'], choices: Float[Tensor, 'b n c d']
) -> Float[Tensor, '3 b n d']:
    """Mixtures of `choices`; `selector` computes the mixing weights from the memory's own input."""
    weights = selector(own).unflatten(-1, (NUM_VIEWS, -1)).softmax(dim=-1)
    return grouped_linear(weights, choices).movedim(2, 0)


def selected_views_of_token(
    selector: Module, own: Float[Tensor, 'b 1 d'], choices: Float[Tensor, 'b 1 c d']
) -> Float[Tensor, '3 b 1 d']:
    """`selected_views` for a single token; a `view_selector` without hooks takes one operation."""
    parts = plain_parts(selector, None, None)
    if parts is None or not is_plain_linear(parts[1], parts[0]) or parts[1].bias is None:
        return selected_views(selector, own, choices)
    norm, to_logits = parts
    return token_mixture(own, choices, (norm.weight, norm.eps), to_logits.weight, to_logits.bias)
