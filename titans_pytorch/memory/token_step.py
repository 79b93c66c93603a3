"""Storing a single chunk, as decoding does: the equations as they stand, with no axis of time.

The engines store many chunks at once; for one chunk there is no recurrence to solve and nothing to be kept of weights
in between, so that its gradient is taken and applied (Titans eq. 10, 12, 13).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import Module

from titans_pytorch.memory.engines import (
    Chunks,
    LossFn,
    batched_loss,
    beside,
    fused_record_serves,
    recorded,
    soft_clamp_norm,
)
from titans_pytorch.memory.fast_weights import Weights
from titans_pytorch.memory.state import outside_inference
from titans_pytorch.memory_models import ResidualNorm, inner_mlp, mlp_matrices
from titans_pytorch.ops.newton_schulz import newton_schulz
from titans_pytorch.ops.norms import layer_norm
from titans_pytorch.utils.functional import call_with_weights, transformed
from titans_pytorch.utils.shapes import Float


def predict(model: Module, weights: Weights, rows: Tensor, broadcasts: bool) -> Float[Tensor, 'bh m d']:
    """Rows (bh, m, d) through the memory network, with weights (bh, …).

    `broadcasts` says that `model` takes weights with axes in front as it is.
    """
    mlp = inner_mlp(model)
    if broadcasts and mlp is not None:
        # a call of the module takes longer than these few rows
        answers = mlp.through(mlp_matrices(model, weights), rows, torch.bmm)
        if model is mlp:
            return answers
        assert isinstance(model, ResidualNorm)
        normed = layer_norm(answers, model.norm.eps)
        return torch.addcmul(rows, normed, weights['norm.gamma'].unsqueeze(-2) + 1.0)

    def forward(weights: Weights, rows: Tensor) -> Tensor:
        return call_with_weights(model, weights, rows)

    return forward(weights, rows) if broadcasts else transformed(vmap, forward, randomness='different')(weights, rows)


def descents(model: Module, loss_fn: LossFn, chunk: Chunks, at: Weights, broadcasts: bool) -> Weights:
    """Minus the gradient of the chunk's loss at `at`. `loss_fn` takes (m, d)."""
    if broadcasts and fused_record_serves(model, loss_fn, chunk, at, None):
        inputs, errors, of_vectors, _ = recorded(model, chunk, at)
        # of a product of rows X that has the error Δ: Xᵀ Δ
        of_matrices = {name: torch.bmm(x[:, 0].mT, errors[name][:, 0]) for name, x in inputs.items()}
        of_all = of_matrices | {name: descent[:, 0] for name, descent in of_vectors.items()}
        return {name: of_all[name].to(w.dtype) for name, w in at.items()}

    with torch.inference_mode(False):
        keys, values, step_sizes = (outside_inference(t[:, 0]) for t in chunk[:3])

        def rise(at: Weights) -> Tensor:
            # Titans eq. 12: ‖M(k) − v‖²
            losses = batched_loss(loss_fn, 1)(predict(model, at, keys, broadcasts), values)
            return -(losses * step_sizes.to(losses.dtype)).sum()

        return transformed(grad, rise)({name: outside_inference(w) for name, w in at.items()})


@torch.no_grad()
def store_one_chunk(
    descents: Weights,
    chunk: Chunks,
    last: Weights,
    last_momentum: Weights,
    max_grad_norm: float | None,
    spectral_norm: bool,
) -> tuple[Weights, Weights]:
    """Weights and momentum after a chunk, going on from `last` and `last_momentum`.

    A momentum mix that has a share more than orders includes the surprise itself.
    """
    dtype = next(iter(last.values())).dtype
    keep = (-chunk.decay[:, 0]).to(dtype).sigmoid()
    etas = () if chunk.momentum is None else chunk.momentum[:, 0].to(dtype).sigmoid().unbind(-1)
    shares = None if chunk.momentum_mix is None else chunk.momentum_mix[:, 0].to(dtype).unbind(-1)
    scales = None if chunk.modulation is None else chunk.modulation[:, 0].to(dtype).unbind(-1)

    updates, momentum = {}, {}
    for index, (name, descent) in enumerate(descents.items()):
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

    # Titans eq. 13: M_t = (1 − α_t) M_{t−1} + S_t, laid out as M is, whose buffer is to take it over
    return {
        name: torch.addcmul(updates[name], beside(keep, w), w, out=torch.empty_like(w)) for name, w in last.items()
    }, momentum


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
