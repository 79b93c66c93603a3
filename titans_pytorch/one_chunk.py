"""Storing a single chunk, as decoding does: the equations as they stand, with no axis of time.

The engines store many chunks at once; for one chunk there is no recurrence to solve and nothing to be kept of weights
in between, so that its gradient is taken and applied (Titans eq. 10, 12, 13).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import Module

from titans_pytorch.engines import Chunks, LossFn, beside, soft_clamp_norm
from titans_pytorch.fast_weights import Weights
from titans_pytorch.orthogonalize import newton_schulz
from titans_pytorch.shapes import Float

Predict = Callable[[Weights, Float[Tensor, 'bh m d']], Float[Tensor, 'bh m d']]
"""Rows through the memory network, with weights (bh, …)."""


def predict(model: Module, weights: Weights, rows: Tensor, broadcasts: bool) -> Tensor:
    """A `Predict`; `broadcasts` says that `model` takes weights with axes in front as it is."""

    def forward(weights: Weights, rows: Tensor) -> Tensor:
        return functional_call(model, weights, (rows,))

    return forward(weights, rows) if broadcasts else vmap(forward, randomness='different')(weights, rows)


def store_one_chunk(
    predict: Predict,
    loss_fn: LossFn,
    chunk: Chunks,
    at: Weights,
    last: Weights,
    last_momentum: Weights,
    max_grad_norm: float | None,
    spectral_norm: bool,
) -> tuple[Weights, Weights]:
    """Weights and momentum after a chunk, going on from `last` and `last_momentum`, its gradient taken at `at`.

    `loss_fn` takes (bh, m, d); a momentum mix that has a share more than orders includes the surprise itself.
    """
    dtype = next(iter(last.values())).dtype
    keep = (-chunk.decay[:, 0]).to(dtype).sigmoid()
    etas = () if chunk.momentum is None else chunk.momentum[:, 0].to(dtype).sigmoid().unbind(-1)
    shares = None if chunk.momentum_mix is None else chunk.momentum_mix[:, 0].to(dtype).unbind(-1)
    scales = None if chunk.modulation is None else chunk.modulation[:, 0].to(dtype).unbind(-1)

    updates, momentum = {}, {}
    for index, (name, descent) in enumerate(_descents(predict, loss_fn, chunk, at).items()):
        if max_grad_norm is not None:
            descent = soft_clamp_norm(descent.unsqueeze(1), max_grad_norm).squeeze(1)
        # Titans eq. 10: S_t = η_t S_{t−1} + u_t, each order's momentum the next one's input
        surprises = [descent if scales is None else descent * beside(scales[index], descent)]
        for eta, before in zip(etas, last_momentum.get(name, ())):
            surprises.append(torch.addcmul(surprises[-1], beside(eta, before), before))
        if etas:
            momentum[name] = torch.stack(surprises[1:]) if len(etas) > 1 else surprises[1].unsqueeze(0)
        updates[name] = surprises[-1] if shares is None else _mixed(surprises[-len(shares) :], shares)
    if spectral_norm:
        updates |= _orthogonal({name: update for name, update in updates.items() if update.ndim > 2})

    # Titans eq. 13: M_t = (1 − α_t) M_{t−1} + S_t
    return {name: torch.addcmul(updates[name], beside(keep, w), w) for name, w in last.items()}, momentum


@torch.enable_grad()
def _descents(predict: Predict, loss_fn: LossFn, chunk: Chunks, at: Weights) -> Weights:
    """Minus the gradient of the chunk's loss at `at`."""
    at = {name: w.detach().requires_grad_() for name, w in at.items()}
    # Titans eq. 12: ‖M(k) − v‖²
    losses = loss_fn(predict(at, chunk.keys[:, 0]), chunk.values[:, 0])
    return dict(zip(at, torch.autograd.grad(losses, [*at.values()], -chunk.step_sizes[:, 0].to(losses.dtype))))


def _mixed(orders: list[Tensor], shares: Sequence[Float[Tensor, ' bh']]) -> Tensor:
    terms = [beside(share, order) * order for share, order in zip(shares, orders)]
    return sum(terms[1:], terms[0])


def _orthogonal(matrices: Weights) -> Weights:
    """Each orthogonalised; those of one shape, or of its transpose, together."""
    same: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    wide = {name: m if m.shape[-2] <= m.shape[-1] else m.mT for name, m in matrices.items()}
    for name, m in wide.items():
        same[tuple(m.shape)].append(name)
    done: Weights = {}
    for names in same.values():
        stacked = torch.stack([wide[name] for name in names])
        done |= zip(names, newton_schulz(stacked).to(stacked.dtype).unbind(0))
    return {name: done[name] if wide[name] is m else done[name].mT for name, m in matrices.items()}
