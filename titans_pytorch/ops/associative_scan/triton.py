"""h_t = g_t · h_{t−1} + x_t for vectors h, with one gate a step (as in momentum and decay) or one for each feature.

Each program owns a strip of features and walks the steps in order, so every input is read once, every output is
written once, and all of it coalesced. The plain twin is `recurrence.AssocScan` without acceleration.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import refuse_second_derivatives

# features a program owns: 8 a thread
BLOCK = 256
WARPS = 1


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    gates, inputs, prev, states,
    steps, features, gate_features, strips, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, strip = program // strips, program % strips
    feature = strip * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features

    # one gate for all features is read by each of them
    gate = tl.where(gate_features == 1, 0, feature)
    gates += batch * steps * gate_features
    inputs += batch * steps * features
    states += batch * (steps + 1) * features

    state = tl.load(prev + batch * features + feature, mask=inside, other=0.0).to(ACC)
    tl.store(states + feature, state, mask=inside)
    for step in range(steps):
        x = tl.load(inputs + step * features + feature, mask=inside, other=0.0).to(ACC)
        g = tl.load(gates + step * gate_features + gate, mask=inside, other=0.0).to(ACC)
        state = g * state + x
        tl.store(states + (step + 1) * features + feature, state, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    gates, states, d_states, d_inputs, d_prev, d_gates,
    steps, features, gate_features, strips, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, strip = program // strips, program % strips
    feature = strip * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features

    gate = tl.where(gate_features == 1, 0, feature)
    gates += batch * steps * gate_features
    d_gates += batch * steps * tl.where(gate_features == 1, strips, features)
    d_inputs += batch * steps * features
    states += batch * (steps + 1) * features
    d_states += batch * (steps + 1) * features

    # the gradient of a step's state: its own output's, and the next step's through that step's gate
    d_state = tl.load(d_states + steps * features + feature, mask=inside, other=0.0).to(ACC)
    for back in range(steps):
        step = steps - 1 - back
        tl.store(d_inputs + step * features + feature, d_state, mask=inside)
        before = tl.load(states + step * features + feature, mask=inside, other=0.0).to(ACC)
        d_gate = d_state * before
        if gate_features == 1:
            # this strip's share; the launcher adds the shares up, so that the sum does not depend on timing
            tl.store(d_gates + step * strips + strip, tl.sum(d_gate, axis=0))
        else:
            tl.store(d_gates + step * features + feature, d_gate, mask=inside)
        own = tl.load(d_states + step * features + feature, mask=inside, other=0.0).to(ACC)
        g = tl.load(gates + step * gate_features + gate, mask=inside, other=0.0).to(ACC)
        d_state = g * d_state + own
    tl.store(d_prev + batch * features + feature, d_state, mask=inside)


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, inputs: Tensor, prev: Tensor) -> Tensor:
        batch, steps, features = inputs.shape
        strips = triton.cdiv(features, BLOCK)
        states = inputs.new_empty(batch, steps + 1, features)
        _forward_kernel[(batch * strips,)](
            gates, inputs, prev, states,
            steps, features, gates.shape[2], strips,
            BLOCK=BLOCK, ACC=_accumulator(inputs.dtype)[1], num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(gates, states)
        return states

    @staticmethod
    def backward(ctx: Any, d_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates, states = ctx.saved_tensors
        return _GatedScanBackward.apply(gates, states, d_states)


class _GatedScanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, states: Tensor, d_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, (steps, features) = states.shape[0], (states.shape[1] - 1, states.shape[2])
        strips = triton.cdiv(features, BLOCK)
        accumulator, ACC = _accumulator(states.dtype)
        d_inputs = states.new_empty(batch, steps, features)
        d_prev = states.new_empty(batch, features)
        shared = gates.shape[2] == 1
        d_gates = states.new_empty(batch, steps, strips if shared else features, dtype=accumulator)
        _backward_kernel[(batch * strips,)](
            gates, states, d_states.contiguous(), d_inputs, d_prev, d_gates,
            steps, features, gates.shape[2], strips, BLOCK=BLOCK, ACC=ACC, num_warps=WARPS,
        )  # fmt: skip
        d_gates = d_gates.sum(dim=-1, keepdim=True) if shared else d_gates
        return d_gates.to(gates.dtype), d_inputs, d_prev

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        refuse_second_derivatives('the accelerated scan')(ctx)


def _accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def gated_scan(
    gates: Tensor,  # b n d, or b n 1
    inputs: Tensor,  # b n d
    prev: Tensor,  # b d
) -> Tensor:  # b n+1 d
    """The states h_0 = `prev`, h_1, …, h_n of h_t = gates_t · h_{t−1} + inputs_t; differentiable once."""
    return _GatedScan.apply(gates.contiguous(), inputs.contiguous(), prev.contiguous())
