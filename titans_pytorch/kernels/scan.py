"""h_t = g_t · h_{t−1} + x_t for vectors h and one scalar gate a step: the recurrence of momentum and of decay.

Each program owns a strip of features and walks the steps in order, so every input is read once, every output is
written once, and all of it coalesced. The plain twin is `recurrence.AssocScan` without acceleration.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256


@triton.jit
def _forward_kernel(gates, inputs, prev, states, steps, features, strips, BLOCK: tl.constexpr, ACC: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    batch, strip = program // strips, program % strips
    feature = strip * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features

    state = tl.load(prev + batch * features + feature, mask=inside, other=0.0).to(ACC)
    for step in range(steps):
        row = batch * steps + step
        gate = tl.load(gates + row).to(ACC)
        x = tl.load(inputs + row * features + feature, mask=inside, other=0.0).to(ACC)
        state = gate * state + x
        tl.store(states + row * features + feature, state, mask=inside)


@triton.jit
def _backward_kernel(
    gates, prev, states, d_states, d_inputs, d_prev, d_gates,
    steps, features, strips, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, strip = program // strips, program % strips
    feature = strip * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features

    # the gradient of a step's state: its own output's, and the next step's through that step's gate
    carried = tl.zeros((BLOCK,), dtype=ACC)
    for back in range(steps):
        step = steps - 1 - back
        row = batch * steps + step
        d_state = tl.load(d_states + row * features + feature, mask=inside, other=0.0).to(ACC) + carried
        tl.store(d_inputs + row * features + feature, d_state, mask=inside)

        before = tl.load(prev + batch * features + feature, mask=inside & (step == 0), other=0.0).to(ACC)
        before += tl.load(states + (row - 1) * features + feature, mask=inside & (step > 0), other=0.0).to(ACC)
        tl.store(d_gates + row * strips + strip, tl.sum(d_state * before, axis=0))

        carried = d_state * tl.load(gates + row).to(ACC)
    tl.store(d_prev + batch * features + feature, carried, mask=inside)


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates: Tensor, inputs: Tensor, prev: Tensor) -> Tensor:
        batch, steps, features = inputs.shape
        strips = triton.cdiv(features, BLOCK)
        states = torch.empty_like(inputs)
        _forward_kernel[(batch * strips,)](
            gates, inputs, prev, states, steps, features, strips, BLOCK, _accumulator(inputs)
        )
        ctx.save_for_backward(gates, prev, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates, prev, states = ctx.saved_tensors
        batch, steps, features = states.shape
        strips = triton.cdiv(features, BLOCK)
        d_inputs, d_prev = torch.empty_like(states), torch.empty_like(prev)
        accumulator = torch.float64 if states.dtype == torch.float64 else torch.float32
        # a strip's share of each gate's gradient; summed here so that the result does not depend on timing
        d_gates = torch.empty(batch, steps, strips, dtype=accumulator, device=states.device)
        _backward_kernel[(batch * strips,)](
            gates, prev, states, d_states.contiguous(), d_inputs, d_prev, d_gates,
            steps, features, strips, BLOCK, _accumulator(states),
        )  # fmt: skip
        return d_gates.sum(dim=-1).to(gates.dtype), d_inputs, d_prev


def _accumulator(t: Tensor) -> tl.dtype:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def gated_scan(gates: Tensor, inputs: Tensor, prev: Tensor) -> Tensor:
    """All states h_1 … h_n of h_t = gates_t · h_{t−1} + inputs_t from h_0 = `prev`; once differentiable."""
    return _GatedScan.apply(gates.contiguous(), inputs.contiguous(), prev.contiguous())
