"""Sequence mixers to compare a memory layer with, and for each a plain loop that computes the same.

All are functions of queries, keys and values (b, n, h, d), of gates (b, n, gates) if they have any, and of their own
learned parameters. Those of flash-linear-attention need its package, `fla-core`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, DIM_HEAD, DIM_HIDDEN = 384, 4, 64, 256
# for the iteration that makes an update orthogonal (Muon)
NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ = 5, (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Peer:
    """A mixer.

    Args:
        mix: the mixer, as fast as it can be.
        by_loop: the same by a loop, in any precision.
        products: number of multiplications per token and head in the forward pass, at a given length: those of the
            recurrence, however it is computed.
        gates: number of gates per token.
        parameters: draws the learned parameters.
        chunk: number of tokens that are stored together.
    """

    mix: Callable[..., Tensor]
    by_loop: Callable[..., Tensor]
    products: Callable[[int], float]
    gates: int = 0
    parameters: Callable[[], Sequence[Tensor]] = tuple
    chunk: int = 1


class Mixer(nn.Module):
    """A norm, projections to heads, a mixer, and a projection back."""

    def __init__(self, peer: Peer, exactly: bool):
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.to_qkv = nn.Linear(DIM, 3 * HEADS * DIM_HEAD, bias=False)
        self.to_gates = nn.Linear(DIM, peer.gates) if peer.gates else None
        self.to_out = nn.Linear(HEADS * DIM_HEAD, DIM, bias=False)
        # not a `ParameterList`, which `torch.compile` of PyTorch 2.11 refuses to unpack
        initial = {f'own_{number}': value for number, value in enumerate(peer.parameters())}
        for name, value in initial.items():
            self.register_parameter(name, nn.Parameter(value))
        self.own = tuple(initial)
        self.mix = peer.by_loop if exactly else peer.mix

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        qkv = (t.unflatten(-1, (HEADS, DIM_HEAD)) for t in self.to_qkv(normed).chunk(3, dim=-1))
        gates = () if self.to_gates is None else (_at_least_float32(self.to_gates(normed)),)
        own = [self.get_parameter(name) for name in self.own]
        return self.to_out(self.mix(*qkv, *gates, *own).flatten(-2).to(x.dtype))


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


# attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def attention_by_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = []
    for t in range(q.shape[1]):
        scores = torch.einsum('b h d, b n h d -> b h n', q[:, t], k[:, : t + 1]) / DIM_HEAD**0.5
        out.append(torch.einsum('b h n, b n h d -> b h d', scores.softmax(dim=-1), v[:, : t + 1]))
    return torch.stack(out, dim=1)


# linear recurrences


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, retention: Tensor, beta: Tensor | None = None, momentum: Tensor | None = None
) -> Tensor:
    """M ← η M + β kᵀ (v − k D), S ← D + M with D = retention ∘ S, read by q / √d. Without β, v is stored as it is."""
    state = q.new_zeros(len(q), HEADS, DIM_HEAD, DIM_HEAD)
    update, out = torch.zeros_like(state), []
    for t in range(q.shape[1]):
        state = state * retention[:, t, :, :, None]
        target = v[:, t]
        if beta is not None:
            target = beta[:, t, :, None] * (target - torch.einsum('b h d, b h d e -> b h e', k[:, t], state))
        of_token = torch.einsum('b h d, b h e -> b h d e', k[:, t], target)
        update = of_token if momentum is None else momentum[:, t, :, None, None] * update + of_token
        state = state + update
        out.append(torch.einsum('b h d, b h d e -> b h e', q[:, t], state) / DIM_HEAD**0.5)
    return torch.stack(out, dim=1)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, F.logsigmoid(gates.unflatten(-1, (HEADS, DIM_HEAD))).to(q.dtype))[0]


def linear_attention_by_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    return recurrence(q, k, v, gates.unflatten(-1, (HEADS, DIM_HEAD)).sigmoid())


def _unit(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [F.normalize(_at_least_float32(t), dim=-1).to(dtype) for t in tensors]


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    retention, beta = gates.chunk(2, dim=-1)
    q, k = _unit(q, k, dtype=v.dtype)
    return chunk_gated_delta_rule(q, k, v, F.logsigmoid(retention), beta.sigmoid().to(v.dtype))[0]


def delta_rule_by_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    retention, beta = gates.sigmoid().chunk(2, dim=-1)
    return recurrence(*_unit(q, k, dtype=v.dtype), v, retention.unsqueeze(-1), beta)


def kimi_delta_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    from fla.ops.kda import chunk_kda

    retention, beta = gates.split((HEADS * DIM_HEAD, HEADS), dim=-1)
    q, k = _unit(q, k, dtype=v.dtype)
    decay = F.logsigmoid(retention.unflatten(-1, (HEADS, DIM_HEAD)))
    return chunk_kda(q, k, v, decay, beta.sigmoid().to(v.dtype))[0]


def kimi_delta_attention_by_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    retention, beta = gates.sigmoid().split((HEADS * DIM_HEAD, HEADS), dim=-1)
    return recurrence(*_unit(q, k, dtype=v.dtype), v, retention.unflatten(-1, (HEADS, DIM_HEAD)), beta)


def momentum_delta_rule(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    from fla.ops.momentum_delta_rule import chunk_momentum_delta_rule

    retention, beta, momentum = gates.chunk(3, dim=-1)
    q, k = _unit(q, k, dtype=v.dtype)
    log_gates = (F.logsigmoid(retention), F.logsigmoid(momentum))
    return chunk_momentum_delta_rule(q, k, v, *log_gates, eta=beta.sigmoid(), use_qk_l2norm_in_kernel=False)[0]


def momentum_delta_rule_by_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    retention, beta, momentum = gates.sigmoid().chunk(3, dim=-1)
    return recurrence(*_unit(q, k, dtype=v.dtype), v, retention.unsqueeze(-1), beta, momentum)


# TTT-linear (arXiv 2407.04620): the memory is LN(x W + b) + x; a chunk's gradients are taken at the weights before it


def norm_parameters() -> tuple[Tensor, Tensor]:
    return torch.ones(HEADS, DIM_HEAD), torch.zeros(HEADS, DIM_HEAD)


def ttt_linear(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> Tensor:
    from fla.ops.ttt import chunk_ttt_linear

    q, k = _unit(q, k, dtype=v.dtype)
    steps = (gates.sigmoid() / DIM_HEAD).unsqueeze(-1).to(v.dtype)
    return chunk_ttt_linear(q, k, v, weight.to(v.dtype), bias.to(v.dtype), steps, chunk_size=chunk)[0]


def ttt_linear_by_loop(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, chunk: int
) -> Tensor:
    """As in fla, a token reads what the tokens up to it have stored with its own step size, and a chunk is stored with
    its last token's step size."""
    q, k, v = (t.transpose(1, 2) for t in (*_unit(q, k, dtype=v.dtype), v))
    steps = (gates.sigmoid() / DIM_HEAD).transpose(1, 2).unsqueeze(-1)

    def normed(x: Tensor) -> Tensor:
        centered = x - x.mean(dim=-1, keepdim=True)
        unit = centered / (centered.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return unit * weight[:, None] + bias[:, None]

    def loss(product: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (key + normed(product) - value).square().sum() / 2

    w, b = q.new_zeros(len(q), HEADS, DIM_HEAD, DIM_HEAD), q.new_zeros(len(q), HEADS, 1, DIM_HEAD)
    out = []
    for queries, keys, values, step in zip(*(t.split(chunk, dim=2) for t in (q / DIM_HEAD**0.5, k, v, steps))):
        gradients = torch.func.grad(loss)(keys @ w + b, keys, values)
        shared = (queries @ keys.mT + 1).tril()
        read = queries @ w + b - step * (shared @ gradients)
        out.append(read + normed(read))
        last = step[:, :, -1:]
        w, b = w - last * (keys.mT @ gradients), b - last * gradients.sum(dim=2, keepdim=True)
    return torch.cat(out, dim=2).transpose(1, 2)


# LaCT (arXiv 2505.23884): a SwiGLU memory; a chunk is read before it is stored, in one orthogonalised step


def swiglu_parameters() -> tuple[Tensor, ...]:
    """Matrices for gate, values and output, which are applied from the right."""
    wide, narrow = (HEADS, DIM_HEAD, DIM_HIDDEN), (HEADS, DIM_HIDDEN, DIM_HEAD)
    return tuple(torch.randn(shape) / shape[1] ** 0.5 for shape in (wide, wide, narrow))


def swiglu(x: Tensor, gate: Tensor, value: Tensor, out: Tensor) -> Tensor:
    return (F.silu(x @ gate) * (x @ value)) @ out


def orthogonal(x: Tensor) -> Tensor:
    """x with all singular values near 1, by Newton–Schulz."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def of_norm_before(after: Tensor, before: Tensor) -> Tensor:
    """Weights, with each output feature scaled to the norm that it had before."""
    norm, wanted = (w.norm(dim=-2, keepdim=True) for w in (after, before))
    return after / (norm + 1e-5) * wanted


Updates = Callable[[Sequence[Tensor], Tensor, Tensor, Tensor], Sequence[Tensor]]


def large_chunks(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *weights: Tensor, chunk: int, updates_of: Updates
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (*_unit(q, k, dtype=v.dtype), v))
    steps = F.softplus(gates).unflatten(-1, (3, HEADS)).permute(2, 0, 3, 1).unsqueeze(-1)
    states, out = [w.expand(len(q), *w.shape) for w in weights], []
    for queries, keys, values, step in zip(*(t.split(chunk, dim=-2) for t in (q, k, v, steps))):
        out.append(swiglu(queries, *states))
        updates = updates_of(states, keys, values, step)
        states = [of_norm_before(w + orthogonal(update), own) for w, update, own in zip(states, updates, weights)]
    return torch.cat(out, dim=2).transpose(1, 2)


def swiglu_updates(states: Sequence[Tensor], keys: Tensor, values: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the products of what is retrieved with the values, each token's by its step size."""
    (gate, value, back), (of_gate, of_value, of_out) = states, steps
    h, x, d = keys @ gate, keys @ value, values @ back.mT
    sigmoid = h.sigmoid()
    silu = h * sigmoid
    return (
        keys.mT @ (of_gate * d * x * (sigmoid + silu * (1 - sigmoid))),
        keys.mT @ (of_value * d * silu),
        (silu * x).mT @ (of_out * values),
    )


def swiglu_updates_by_autograd(states: Sequence[Tensor], keys: Tensor, values: Tensor, steps: Tensor) -> list[Tensor]:
    def stored(*arguments: Tensor) -> Tensor:
        *own, step = arguments
        return (step * values * swiglu(keys, *own)).sum()

    return [torch.func.grad(stored, argnums=number)(*states, step) for number, step in enumerate(steps)]


def _swiglu_products(chunk: int) -> float:
    matrix = DIM_HEAD * DIM_HIDDEN
    of_gram = DIM_HEAD**2 * (2 * DIM_HIDDEN + DIM_HEAD)
    return 9 * matrix + 3 * NEWTON_SCHULZ_STEPS * of_gram / chunk


def _linear(times: int) -> Callable[[int], float]:
    """A number of products with a state of `DIM_HEAD` × `DIM_HEAD`, which does not depend on the length."""
    return lambda length: times * DIM_HEAD**2


PEERS = {
    'causal attention': Peer(attention, attention_by_loop, lambda length: length * DIM_HEAD),
    'gated linear attention (fla)': Peer(
        gated_linear_attention, linear_attention_by_loop, _linear(2), gates=HEADS * DIM_HEAD
    ),
    'gated delta rule (fla)': Peer(gated_delta_rule, delta_rule_by_loop, _linear(3), gates=2 * HEADS),
    'Kimi delta attention (fla)': Peer(
        kimi_delta_attention, kimi_delta_attention_by_loop, _linear(3), gates=HEADS * (DIM_HEAD + 1)
    ),
    'delta rule with momentum (fla)': Peer(
        momentum_delta_rule, momentum_delta_rule_by_loop, _linear(3), gates=3 * HEADS
    ),
    **{
        f'TTT-linear, chunks of {chunk} (fla)': Peer(
            partial(ttt_linear, chunk=chunk),
            partial(ttt_linear_by_loop, chunk=chunk),
            _linear(3),
            HEADS,
            norm_parameters,
            chunk,
        )
        for chunk in (16, 64)
    },
    'LaCT, chunks of 1,024': Peer(
        partial(large_chunks, chunk=1024, updates_of=swiglu_updates),
        partial(large_chunks, chunk=1024, updates_of=swiglu_updates_by_autograd),
        lambda length: _swiglu_products(1024),
        3 * HEADS,
        swiglu_parameters,
        1024,
    ),
}
