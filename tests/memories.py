"""Configurations of `NeuralMemory` that between them turn on every switch, small enough for float64 everywhere."""

from __future__ import annotations

from typing import Any

import torch
from compare import leaves, randomised
from torch import Tensor, nn

from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
    NeuralMemState,
)

DIM, HEAD = 8, 8


class CausalMean(nn.Module):
    """A user's module that mixes tokens, causally, and knows nothing of the protocol."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HEAD, HEAD)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
        return self.linear(x.cumsum(dim=-2) / counts).tanh()


SWITCHES: dict[str, dict[str, Any]] = {
    'plain': {},
    'no momentum': {'momentum': False},
    'momentum of order 2': {'momentum_order': 2},
    'momentum of order 3, combined': {'momentum_order': 3, 'learned_momentum_combine': True},
    'momentum of order 2, combined with the surprise': {
        'momentum_order': 2,
        'learned_momentum_combine': True,
        'learned_combine_include_zeroth': True,
    },
    'step size per parameter': {'per_parameter_lr_modulation': True, 'max_mem_layer_modulation': 3.0},
    'shared heads': {'per_head_learned_parameters': False},
    'attention pool': {'attn_pool_chunks': True},
    'two keys per token': {'num_kv_per_token': 2},
    'norms': {'post_rmsnorm': True, 'qk_rmsnorm': True, 'pre_rmsnorm': False},
    'soft clamp': {'max_grad_norm': 0.5},
    'spectral norm': {'spectral_norm_surprises': True},
    'gated transition': {'gated_transition': True},
    'lookahead values': {'store_with_lookahead_value': True},
    'lookahead values, two keys per token': {'store_with_lookahead_value': True, 'num_kv_per_token': 2},
    'no residual norm': {'mem_model_norm_add_residual': False},
    'proximal steps': {'proximal_steps': True},
    'proximal steps of a swiglu memory, normalized momentum of order 2, combined': {
        'proximal_steps': True,
        'model': lambda: MemorySwiGluMLP(HEAD, depth=2),
        'normalized_momentum': True,
        'momentum_order': 2,
        'learned_momentum_combine': True,
        'learned_combine_include_zeroth': True,
    },
    'proximal steps of three matrices': {
        'proximal_steps': True,
        'mem_model_norm_add_residual': False,
        'model': lambda: MemoryMLP(HEAD, depth=3),
        'normalized_momentum': True,
        'default_step_transform_max_lr': 100.0,
    },
    'normalized momentum': {'normalized_momentum': True},
    'look-ahead gradients': {'normalized_momentum': True, 'lookahead_gradients': True},
    'look-ahead gradients of a linear memory, momentum of order 2': {
        'normalized_momentum': True,
        'lookahead_gradients': True,
        'momentum_order': 2,
        'mem_model_norm_add_residual': False,
        'model': lambda: MemoryMLP(HEAD, depth=1),
    },
    'look-ahead gradients, proximal steps of three matrices': {
        'proximal_steps': True,
        'normalized_momentum': True,
        'lookahead_gradients': True,
        'model': lambda: MemoryMLP(HEAD, depth=3),
        'default_step_transform_max_lr': 100.0,
    },
    'activation': {'activation': nn.SiLU()},
    'biases': {'init_adaptive_step_bias': -2.0, 'init_momentum_bias': 1.0, 'init_decay_bias': -3.0},
    'l2 norm': {'qk_l2norm': True},
    'convolution': {'conv_kernel': 4, 'activation': nn.SiLU()},
    'convolution, attention memory': {'conv_kernel': 3, 'model': lambda: MemoryAttention(HEAD)},
    'gate per channel': {'channel_gate': True},
    'different views': {'qkv_receives_diff_views': True},
    'linear memory': {'model': lambda: MemoryMLP(HEAD, depth=1)},
    'deep memory': {'model': lambda: MemoryMLP(HEAD, depth=4)},
    'gated residual memory': {'model': lambda: GatedResidualMemoryMLP(HEAD, depth=2)},
    'factorized memory': {'model': lambda: FactorizedMemoryMLP(HEAD, depth=2, k=2)},
    'swiglu memory': {'model': lambda: MemorySwiGluMLP(HEAD, depth=2)},
    'attention memory': {'model': lambda: MemoryAttention(HEAD)},
    "a user's module": {'model': lambda: nn.Sequential(nn.Linear(HEAD, 6), nn.GELU(), nn.Linear(6, HEAD))},
    "a user's module that mixes tokens": {'model': CausalMean},
    'everything': {
        'momentum_order': 2,
        'learned_momentum_combine': True,
        'per_parameter_lr_modulation': True,
        'num_kv_per_token': 2,
        'attn_pool_chunks': True,
        'qk_rmsnorm': True,
        'post_rmsnorm': True,
        'max_grad_norm': 1.0,
        'spectral_norm_surprises': True,
        'gated_transition': True,
        'qkv_receives_diff_views': True,
        'conv_kernel': 3,
        'channel_gate': True,
    },
}


def memory(switch: str = 'plain', chunk_size: int = 4, batch_size: int | None = 8, **kwargs: Any) -> NeuralMemory:
    """A float64 memory of two heads with one of `SWITCHES`, nothing in it at its initial value."""
    torch.manual_seed(len(switch))
    switches = dict(SWITCHES[switch])
    if 'model' in switches:
        switches['model'] = switches['model']()
    if chunk_size == 1:
        switches.pop('attn_pool_chunks', None)
        if switches.get('num_kv_per_token', 1) == 1:
            switches.pop('store_with_lookahead_value', None)
    made = NeuralMemory(
        DIM,
        heads=2,
        dim_head=HEAD,
        chunk_size=chunk_size,
        batch_size=batch_size,
        **{'default_step_transform_max_lr': 0.5, **switches, **kwargs},
    )
    return randomised(made.double(), 0.2)


def inputs(mem: NeuralMemory, length: int, batch: int = 2) -> Tensor:
    views = (3,) if mem.qkv_receives_diff_views else ()
    return torch.randn(*views, batch, length, DIM, dtype=torch.float64)


def carried(state: NeuralMemState) -> NeuralMemState:
    """The part of a state that the next call depends on."""
    return state._replace(updates=None)


def scalar(out: Tensor, state: NeuralMemState) -> Tensor:
    """A number that depends on every entry of the output and of the state, with a weight of its own."""
    tensors = [out, *leaves(carried(state)).values()]
    generator = torch.Generator().manual_seed(1)
    floating = [t for t in tensors if t.dtype.is_floating_point]
    return sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in floating)
