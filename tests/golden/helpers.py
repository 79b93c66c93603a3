"""Helpers of the reference's modules, the public names in them, and the random draws of a seed.

As `harness`, it runs on whichever `titans_pytorch` is imported.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

MODULES = ('neural_memory', 'memory_models', 'mac_transformer', 'implicit_mlp_attention', 'nested_attention')


def module(name: str) -> Any:
    return import_module(f'titans_pytorch.{name}')


def names() -> dict[str, list[str]]:
    """Per module the public names that are defined in the package, not imported from another one."""
    found = {}
    for name in MODULES:
        origins = {key: getattr(value, '__module__', '') for key, value in vars(module(name)).items() if key[0] != '_'}
        found[name] = sorted(key for key, origin in origins.items() if origin.startswith('titans_pytorch'))
    return found


# figures


def counted(*shape: int) -> Tensor:
    """Numbers that are easy to make and of no particular order."""
    numbers = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64)
    return (numbers * 0.7).sin().view(shape)


def filled(made: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(counted(*parameter.shape))
    return made.double()


def masked(sliding: bool) -> Tensor:
    """Which of 9 positions and of 2 persistent keys each of them may see, in windows of 4."""
    block_mask = module('mac_transformer').create_mac_block_mask(9, 4, 2, sliding)
    return create_mask(block_mask.mask_mod, None, None, 9, 11, device='cpu')[0, 0].int()


def drawn(name: str, *args: Any) -> Tensor:
    torch.manual_seed(0)
    return getattr(module('mac_transformer'), name)(*args)


HELPERS: dict[str, Callable[[], Tensor]] = {
    'newtonschulz5 wide': lambda: module('neural_memory').newtonschulz5(counted(1, 2, 2, 3)),
    'newtonschulz5 tall, 2 steps': lambda: module('neural_memory').newtonschulz5(
        counted(1, 1, 4, 2), 2, 1e-3, (2, -1.5, 0.5)
    ),
    'newtonschulz5 of vectors': lambda: module('neural_memory').newtonschulz5(counted(1, 2, 3)),
    'softclamp_max': lambda: module('neural_memory').softclamp_max(counted(6).abs() * 4, 1.5),
    'softclamp_grad_norm': lambda: module('neural_memory').softclamp_grad_norm(counted(2, 2, 3), 1.5),
    'softclamp_grad_norm of vectors': lambda: module('neural_memory').softclamp_grad_norm(counted(3), 0.5),
    'default_adaptive_step_transform': lambda: module('neural_memory').default_adaptive_step_transform(counted(4)),
    'default_loss_fn': lambda: module('neural_memory').default_loss_fn(counted(2, 3), counted(3, 2).mT),
    'MultiheadRMSNorm': lambda: filled(module('neural_memory').MultiheadRMSNorm(3, 2))(counted(1, 2, 2, 3)),
    'AveragePool': lambda: module('neural_memory').AveragePool(2)(counted(1, 4, 2)),
    'AveragePool, 4 by the call': lambda: module('neural_memory').AveragePool(2)(counted(1, 4, 2), chunk_size=4),
    'AttentionPool': lambda: filled(module('neural_memory').AttentionPool(2, chunk_size=2))(counted(1, 4, 2)),
    'AttentionPool, 4 by the call': lambda: filled(module('neural_memory').AttentionPool(2, 2))(counted(1, 4, 2), 4),
    'GEGLU': lambda: module('mac_transformer').GEGLU()(counted(2, 6)),
    'FeedForward': lambda: filled(module('mac_transformer').FeedForward(3, mult=2))(counted(2, 3)),
    'min_p_filter': lambda: module('mac_transformer').min_p_filter(counted(2, 4), 0.4).nan_to_num(neginf=-1e9),
    'gumbel_noise': lambda: drawn('gumbel_noise', counted(4)),
    'gumbel_sample': lambda: drawn('gumbel_sample', counted(5, 4), 0.7),
    'gumbel_sample, the likeliest': lambda: drawn('gumbel_sample', counted(5, 4), 0.0),
    'create_mac_block_mask': lambda: masked(False),
    'create_mac_block_mask, sliding': lambda: masked(True),
}


def figures() -> dict[str, list[Any]]:
    return {name: helper().tolist() for name, helper in HELPERS.items()}


# random draws of a seed

SMALL = dict(dim=8, dim_head=4, heads=2)
MAC = dict(num_tokens=8, depth=2, segment_len=4, num_longterm_mem_tokens=1, **SMALL)

SEEDED: dict[str, tuple[str, dict[str, Any]]] = {
    'SegmentedAttention': ('mac_transformer', dict(segment_len=4, accept_value_residual=True, **SMALL)),
    'FeedForward': ('mac_transformer', dict(dim=8)),
    'ImplicitMLPAttention': ('implicit_mlp_attention', dict(dim=8, mlp_hiddens=(4, 6, 4), heads=2)),
    'NestedAttention': ('nested_attention', SMALL),
    'MemoryAsContextTransformer': ('mac_transformer', dict(neural_memory_layers=(), **MAC)),
}


def initial(name: str) -> dict[str, list[float]]:
    """After seeding, per parameter: mean, mean square and first value."""
    torch.manual_seed(0)
    random.seed(0)
    where, arguments = SEEDED[name]
    parameters = getattr(module(where), name)(**arguments).named_parameters()
    held = {key: p.detach().double().flatten() for key, p in parameters if p.numel() > 0}
    return {key: [p.mean().item(), p.square().mean().item(), p[0].item()] for key, p in held.items()}


def record() -> dict[str, Any]:
    return {'names': names(), 'figures': figures(), 'initial': {name: initial(name) for name in SEEDED}}
