"""Scan kernels of h_t = g_t · h_{t−1} + x_t for vectors h, with one gate per step or one per feature.

Each program owns a strip of features and passes over the steps in order, so every input is read once and every output
written once, all of it coalesced.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel

# features owned by a program: 8 per thread
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

    # a gate shared by all features is read by each of them
    gate = tl.where(gate_features == 1, 0, feature)
    gates += batch * steps * gate_features
    inputs += batch * steps * features
    states += batch * (steps + 1) * features

    state = tl.load(prev + batch * features + feature, mask=inside, other=0.0).to(ACC)
    tl.store(states + feature, state, mask=inside)
    # advance the pointers, because offsets from the first step may exceed 32 bits
    for _ in range(steps):
        states += features
        x = tl.load(inputs + feature, mask=inside, other=0.0).to(ACC)
        g = tl.load(gates + gate, mask=inside, other=0.0).to(ACC)
        state = g * state + x
        tl.store(states + feature, state, mask=inside)
        inputs += features
        gates += gate_features


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
    parts = tl.where(gate_features == 1, strips, features)
    # start at the last step, from which this pass goes back
    gates += (batch * steps + steps - 1) * gate_features
    d_gates += (batch * steps + steps - 1) * parts
    d_inputs += (batch * steps + steps - 1) * features
    states += (batch * (steps + 1) + steps - 1) * features
    d_states += (batch * (steps + 1) + steps) * features

    # the gradient of a step's state: that of its own output plus that of the next step, through that step's gate
    d_state = tl.load(d_states + feature, mask=inside, other=0.0).to(ACC)
    for _ in range(steps):
        tl.store(d_inputs + feature, d_state, mask=inside)
        before = tl.load(states + feature, mask=inside, other=0.0).to(ACC)
        d_gate = d_state * before
        if gate_features == 1:
            # this strip's part; the launcher adds the parts up, so that the result does not depend on timing
            tl.store(d_gates + strip, tl.sum(d_gate, axis=0))
        else:
            tl.store(d_gates + feature, d_gate, mask=inside)
        d_states -= features
        own = tl.load(d_states + feature, mask=inside, other=0.0).to(ACC)
        g = tl.load(gates + gate, mask=inside, other=0.0).to(ACC)
        d_state = g * d_state + own
        d_inputs -= features
        states -= features
        gates -= gate_features
        d_gates -= parts
    tl.store(d_prev + batch * features + feature, d_state, mask=inside)


def _outputs(gates: Tensor, inputs: Tensor, prev: Tensor) -> Tensor:
    batch, steps, features = inputs.shape
    return inputs.new_empty(batch, steps + 1, features)


def _forward(
    gates: Tensor,  # b n d, or b n 1
    inputs: Tensor,  # b n d
    prev: Tensor,  # b d
) -> Tensor:  # b n+1 d
    """The states h_0 = `prev`, h_1, …, h_n."""
    states = _outputs(gates, inputs, prev)
    sizes = _sizes(gates, inputs)
    _forward_kernel[(len(inputs) * sizes['strips'],)](
        gates=gates.contiguous(), inputs=inputs.contiguous(), prev=prev.contiguous(), states=states,
        ACC=_accumulator(inputs.dtype)[1], **sizes,
    )  # fmt: skip
    return states


def _backward(
    d_states: Tensor,  # b n+1 d
    states: Tensor,  # b n+1 d
    gates: Tensor,
    inputs: Tensor,
    prev: Tensor,
) -> list[Tensor]:
    sizes, shared_gate = _sizes(gates, inputs), gates.shape[2] == 1
    accumulator, ACC = _accumulator(inputs.dtype)
    d_inputs, d_prev = inputs.new_empty(inputs.shape), prev.new_empty(prev.shape)
    # the gradient of a shared gate comes in parts, one per strip
    d_gates = gates.new_empty(*inputs.shape[:2], sizes['strips'] if shared_gate else inputs.shape[2], dtype=accumulator)
    _backward_kernel[(len(inputs) * sizes['strips'],)](
        gates=gates.contiguous(), states=states, d_states=d_states.contiguous(),
        d_inputs=d_inputs, d_prev=d_prev, d_gates=d_gates, ACC=ACC, **sizes,
    )  # fmt: skip
    d_gates = d_gates.sum(dim=-1, keepdim=True) if shared_gate else d_gates
    return [d_gates.to(gates.dtype), d_inputs, d_prev]


associative_scan = register_kernel('associative_scan', _forward, _backward, outputs=_outputs, saved=(0,))


def _sizes(gates: Tensor, inputs: Tensor) -> dict[str, int]:
    _, steps, features = inputs.shape
    return dict(
        steps=steps, features=features, gate_features=gates.shape[2], strips=triton.cdiv(features, BLOCK),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)
