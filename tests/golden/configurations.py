"""Configurations compared with the reference, by kind.

Sizes are tiny and as different from each other as the switches allow, so that no two axes can be exchanged unnoticed.
Left out are only the cases in which the reference itself is wrong: unequal retrieve and store chunk sizes, pieces that
do not end on a chunk boundary, the updates of a call that completes no chunk, a store mask with a state that holds a
remainder, a gradient norm of a masked chunk, a gated transition on the last token of a call, caches of the two
experimental attentions, cached decoding over blocks, or with persistent tokens past the first window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Build(NamedTuple):
    """A module to construct anew for each run: the name of a class of the package, or a class of this file."""

    what: str | Callable[..., nn.Module]
    arguments: dict[str, Any]


class Random(NamedTuple):
    """A random input of this shape, whose gradient is compared too."""

    shape: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Configuration:
    kind: str
    """Which function of the harness runs it."""
    init: dict[str, Any]
    """Arguments of the constructor."""
    shape: tuple[int, ...]
    """Shape of the input: (b, n, d), (v, b, n, d) or, of token ids, (b, n)."""
    call: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the call."""
    pieces: tuple[int, ...] | None = None
    """Lengths of the calls into which the sequence is split, each with the state of the one before."""
    single_tokens: int = 0
    """How many of the last tokens then come one by one, without a sequence axis."""
    detach_between: bool = False
    """Whether the state is detached between the calls."""
    previous_memory: bool = False
    """Whether `prev_weights` come from another memory; else, where the memory accepts them, they are random."""
    keep: tuple[str, ...] = ()
    """Parameters, by how their names begin, that stay as the constructor initialises them."""
    sample: dict[str, Any] | None = None
    """Arguments of `sample` (of a transformer)."""


# memories: dim 8, 2 heads of 4, an MLP 4 → 6 → 4, 2 sequences


class TwoLayers(nn.Module):
    """A memory network that the package does not know, with a bias.

    The reference retrieves with batched parameters, (b, d) and (b, d, e), so the network must take these too.
    """

    def __init__(self, dim: int, dim_hidden: int):
        super().__init__()
        self.first = nn.Parameter(torch.randn(dim, dim_hidden))
        self.second = nn.Parameter(torch.randn(dim_hidden, dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.first) @ self.second + self.bias.unsqueeze(-2)


def huber_loss(pred: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(pred, target, reduction='none', beta=0.5).sum(dim=-1)


def bounded_step(adaptive_step: Tensor) -> Tensor:
    return 0.05 + 0.3 * torch.sigmoid(2 * adaptive_step)


def mask(*rows: str) -> Tensor:
    return torch.tensor([[token == '1' for token in row] for row in rows])


def memory(shape: tuple[int, ...] = (2, 9, 8), *, of: dict[str, Any] | None = None, **init: Any) -> Configuration:
    small = dict(dim=8, dim_head=4, heads=2, chunk_size=2, default_model_kwargs=dict(depth=2, expansion_factor=1.5))
    if 'model' in init:
        del small['default_model_kwargs']
    return Configuration('memory', {**small, **init}, shape, **(of or {}))


SURPRISES = dict(call=dict(return_surprises=True))
VIEWS = (3, 2, 9, 8)  # queries, keys, values

MEMORY = {
    # heads, chunks, memory batches
    'defaults': Configuration('memory', dict(dim=8), (1, 5, 8)),
    'heads': memory(),
    'one_head': memory(dim=4, dim_head=None, heads=1, shape=(2, 9, 4)),
    'three_heads': memory(heads=3, dim_head=3),
    'chunk_1': memory(chunk_size=1, shape=(2, 7, 8)),
    'chunk_4': memory(chunk_size=4, shape=(2, 13, 8)),
    'chunk_tuple': memory(chunk_size=(2, 2)),
    'one_chunk_of_all': memory(chunk_size=9),
    'shorter_than_a_chunk': memory(chunk_size=4, shape=(2, 3, 8)),
    'batch_4': memory(batch_size=4, shape=(2, 11, 8)),
    'batch_ends_with_sequence': memory(batch_size=4, shape=(2, 12, 8)),
    'batch_of_one_chunk': memory(batch_size=2),
    'batch_3_chunk_1': memory(batch_size=3, chunk_size=1, shape=(2, 8, 8)),
    'batch_8_chunk_4': memory(batch_size=8, chunk_size=4, shape=(1, 14, 8)),
    'ttt_batch_size': memory(of=dict(call=dict(ttt_batch_size=4)), shape=(2, 11, 8)),
    'ttt_batch_size_over_batch_size': memory(batch_size=8, of=dict(call=dict(ttt_batch_size=2))),
    # memory networks
    'mlp_depth_1': memory(default_model_kwargs=dict(depth=1)),
    'mlp_depth_3': memory(default_model_kwargs=dict(depth=3, expansion_factor=1.5), batch_size=4),
    'mlp_depth_4': memory(model=Build('MemoryMLP', dict(dim=4, depth=4, expansion_factor=1.0))),
    'gated_residual': memory(model=Build('GatedResidualMemoryMLP', dict(dim=4, depth=1, expansion_factor=1.5))),
    'gated_residual_depth_2': memory(
        model=Build('GatedResidualMemoryMLP', dict(dim=4, depth=2, expansion_factor=1.0)), batch_size=4
    ),
    'factorized': memory(model=Build('FactorizedMemoryMLP', dict(dim=4, depth=2, k=2))),
    'factorized_depth_3': memory(model=Build('FactorizedMemoryMLP', dict(dim=4, depth=3, k=3)), batch_size=4),
    'swiglu': memory(model=Build('MemorySwiGluMLP', dict(dim=4, depth=1, expansion_factor=2.0))),
    'swiglu_depth_2': memory(model=Build('MemorySwiGluMLP', dict(dim=4, depth=2, expansion_factor=1.5)), batch_size=4),
    'attention': memory(model=Build('MemoryAttention', dict(dim=4, scale=2.0, expansion_factor=1.5))),
    'attention_chunk_4': memory(
        model=Build('MemoryAttention', dict(dim=4)), chunk_size=4, batch_size=8, shape=(1, 14, 8)
    ),
    'attention_chunk_1': memory(model=Build('MemoryAttention', dict(dim=4)), chunk_size=1, shape=(1, 6, 8)),
    'external_model': memory(model=Build(TwoLayers, dict(dim=4, dim_hidden=6))),
    'external_model_no_residual': memory(
        model=Build(TwoLayers, dict(dim=4, dim_hidden=3)), mem_model_norm_add_residual=False, batch_size=4
    ),
    'no_norm_residual': memory(mem_model_norm_add_residual=False),
    'no_norm_residual_depth_3': memory(
        mem_model_norm_add_residual=False, default_model_kwargs=dict(depth=3, expansion_factor=1.5), batch_size=4
    ),
    'shared_between_heads': memory(per_head_learned_parameters=False),
    'shared_between_heads_batched': memory(per_head_learned_parameters=False, batch_size=4, momentum_order=2),
    # momentum
    'no_momentum': memory(momentum=False),
    'no_momentum_batched': memory(momentum=False, batch_size=4),
    'momentum_order_2': memory(momentum_order=2),
    'momentum_order_3': memory(momentum_order=3, batch_size=4),
    'momentum_combine': memory(momentum_order=2, learned_momentum_combine=True),
    'momentum_combine_order_3': memory(momentum_order=3, learned_momentum_combine=True, batch_size=4),
    'momentum_combine_zeroth': memory(
        momentum_order=2, learned_momentum_combine=True, learned_combine_include_zeroth=True, batch_size=4
    ),
    # step sizes, gates and their inits
    'lr_modulation': memory(per_parameter_lr_modulation=True),
    'lr_modulation_max': memory(per_parameter_lr_modulation=True, max_mem_layer_modulation=4.0, batch_size=4),
    'attn_pool': memory(attn_pool_chunks=True),
    'attn_pool_chunk_4': memory(attn_pool_chunks=True, chunk_size=4, shape=(2, 10, 8)),
    'init_biases': memory(
        init_adaptive_step_bias=-1.5,
        init_momentum_bias=0.5,
        init_decay_bias=-2.0,
        of=dict(keep=('to_adaptive_step.', 'to_momentum.', 'to_decay_factor.'), **SURPRISES),
    ),
    'max_lr': memory(default_step_transform_max_lr=0.3, of=SURPRISES),
    'step_transform': memory(adaptive_step_transform=bounded_step, of=SURPRISES),
    'loss_fn': memory(store_memory_loss_fn=huber_loss, of=SURPRISES),
    # keys, values, queries
    'two_keys_per_token': memory(num_kv_per_token=2, of=SURPRISES),
    'three_keys_per_token': memory(num_kv_per_token=3, chunk_size=1, shape=(1, 6, 8), batch_size=2),
    'views': memory(VIEWS, qkv_receives_diff_views=True, of=SURPRISES),
    'views_batched': memory(VIEWS, qkv_receives_diff_views=True, batch_size=4, num_kv_per_token=2),
    'no_pre_norm': memory(pre_rmsnorm=False),
    'post_norm': memory(post_rmsnorm=True),
    'qk_norm': memory(qk_rmsnorm=True),
    'max_grad_norm': memory(max_grad_norm=0.4),
    'max_grad_norm_batched': memory(max_grad_norm=2.0, batch_size=4, model=Build(TwoLayers, dict(dim=4, dim_hidden=3))),
    'activation': memory(activation=nn.SiLU()),
    'activation_one_head': memory(dim=4, dim_head=4, heads=1, activation=nn.SiLU(), shape=(2, 9, 4)),
    'lookahead': memory(store_with_lookahead_value=True, of=SURPRISES),
    'lookahead_two_keys': memory(store_with_lookahead_value=True, num_kv_per_token=2, of=SURPRISES),
    'lookahead_chunk_4': memory(
        store_with_lookahead_value=True, chunk_size=4, batch_size=4, shape=(1, 14, 8), of=SURPRISES
    ),
    # options that change the update
    'spectral': memory(spectral_norm_surprises=True),
    'spectral_batched': memory(spectral_norm_surprises=True, batch_size=4, momentum_order=2),
    'spectral_no_momentum': memory(spectral_norm_surprises=True, momentum=False, chunk_size=4, shape=(1, 10, 8)),
    'spectral_combine': memory(spectral_norm_surprises=True, momentum_order=2, learned_momentum_combine=True),
    'gated_transition': memory(gated_transition=True, batch_size=4, shape=(2, 11, 8)),
    'gated_transition_many': memory(gated_transition=True, batch_size=2, chunk_size=1),
    'weight_residual': memory(accept_weight_residual=True, of=dict(previous_memory=True)),
    'weight_residual_batched': memory(
        accept_weight_residual=True, batch_size=4, shape=(2, 11, 8), of=dict(previous_memory=True)
    ),
    'weight_residual_spectral': memory(
        accept_weight_residual=True, spectral_norm_surprises=True, batch_size=4, of=dict(previous_memory=True)
    ),
    'weight_residual_shared': memory(
        accept_weight_residual=True, per_head_learned_parameters=False, of=dict(previous_memory=True)
    ),
    'weight_residual_gated_model': memory(
        accept_weight_residual=True,
        model=Build('GatedResidualMemoryMLP', dict(dim=4, depth=1, expansion_factor=1.0)),
        of=dict(previous_memory=True),
    ),
    'weight_residual_random': memory(accept_weight_residual=True),
    'weight_residual_external': memory(accept_weight_residual=True, model=Build(TwoLayers, dict(dim=4, dim_hidden=3))),
    # arguments of the call
    'surprises': memory(of=SURPRISES),
    'surprises_batched': memory(batch_size=4, of=SURPRISES, shape=(2, 11, 8)),
    'store_mask': memory(
        of=dict(call=dict(store_mask=mask('110110011', '100011110'), return_surprises=True)),
    ),
    'store_mask_batched': memory(
        of=dict(call=dict(store_mask=mask('11100111001', '10001110111'))), batch_size=4, shape=(2, 11, 8)
    ),
    'store_mask_two_keys': memory(of=dict(call=dict(store_mask=mask('110110011', '100011110'))), num_kv_per_token=2),
    'store_seq': memory(of=dict(call=dict(store_seq=Random((2, 9, 8))))),
    'store_seq_views': memory(VIEWS, qkv_receives_diff_views=True, of=dict(call=dict(store_seq=Random((2, 2, 9, 8))))),
    'detached_state': memory(of=dict(call=dict(detach_mem_state=True))),
    # state across calls
    'two_calls': memory(of=dict(pieces=(4, 5))),
    'two_calls_chunk_4': memory(chunk_size=4, shape=(2, 13, 8), of=dict(pieces=(8, 5))),
    'two_calls_batched': memory(batch_size=4, shape=(2, 11, 8), of=dict(pieces=(6, 5))),
    'two_calls_at_batch_boundary': memory(batch_size=4, shape=(2, 11, 8), of=dict(pieces=(8, 3))),
    'three_calls_batched_order_2': memory(
        batch_size=4, momentum_order=2, shape=(1, 13, 8), of=dict(pieces=(2, 8, 3), call=dict(return_surprises=True))
    ),
    'three_calls_detached_between': memory(of=dict(pieces=(2, 4, 3), detach_between=True)),
    'two_calls_no_momentum': memory(momentum=False, of=dict(pieces=(4, 5))),
    'two_calls_gated_transition': memory(gated_transition=True, batch_size=4, shape=(2, 11, 8), of=dict(pieces=(6, 5))),
    'two_calls_spectral': memory(spectral_norm_surprises=True, batch_size=4, of=dict(pieces=(4, 5))),
    'two_calls_views': memory(VIEWS, qkv_receives_diff_views=True, of=dict(pieces=(4, 5))),
    'single_tokens': memory(of=dict(pieces=(5,), single_tokens=4), batch_size=4),
    'single_tokens_only': memory(of=dict(pieces=(), single_tokens=6), shape=(2, 6, 8)),
    'single_tokens_chunk_4': memory(of=dict(pieces=(6,), single_tokens=6), chunk_size=4, shape=(1, 12, 8)),
    'single_tokens_views': memory(
        VIEWS, qkv_receives_diff_views=True, of=dict(pieces=(4,), single_tokens=5), batch_size=4
    ),
    # many at once
    'everything': memory(
        VIEWS,
        qkv_receives_diff_views=True,
        batch_size=4,
        momentum_order=2,
        learned_momentum_combine=True,
        learned_combine_include_zeroth=True,
        per_parameter_lr_modulation=True,
        max_mem_layer_modulation=2.0,
        attn_pool_chunks=True,
        num_kv_per_token=2,
        post_rmsnorm=True,
        qk_rmsnorm=True,
        max_grad_norm=1.0,
        activation=nn.SiLU(),
        gated_transition=True,
        store_with_lookahead_value=True,
        accept_weight_residual=True,
        of=dict(
            previous_memory=True,
            call=dict(store_mask=mask('110110111', '101011011'), return_surprises=True),
        ),
    ),
    'everything_spectral': memory(
        batch_size=8,
        chunk_size=4,
        shape=(1, 14, 8),
        momentum_order=3,
        learned_momentum_combine=True,
        per_parameter_lr_modulation=True,
        attn_pool_chunks=True,
        pre_rmsnorm=False,
        post_rmsnorm=True,
        spectral_norm_surprises=True,
        gated_transition=True,
        per_head_learned_parameters=False,
        model=Build('GatedResidualMemoryMLP', dict(dim=4, depth=1, expansion_factor=1.5)),
        of=dict(pieces=(4, 10), call=dict(return_surprises=True)),
    ),
    'as_in_the_training_script': memory(
        VIEWS,
        qkv_receives_diff_views=True,
        batch_size=4,
        attn_pool_chunks=True,
        qk_rmsnorm=True,
        momentum=True,
        momentum_order=1,
        default_step_transform_max_lr=1e-1,
        per_parameter_lr_modulation=True,
        spectral_norm_surprises=True,
        accept_weight_residual=True,
        of=dict(previous_memory=True),
    ),
}

# `store_memories` and `retrieve_memories` by themselves, from given weights and momentum

PARTS = {
    'parts': Configuration('parts', memory().init, (2, 9, 8)),
    'parts_order_2_shared': Configuration(
        'parts', memory(momentum_order=2, per_head_learned_parameters=False).init, (2, 9, 8)
    ),
    'parts_masked': Configuration(
        'parts',
        memory(accept_weight_residual=True).init,
        (2, 9, 8),
        call=dict(mask=mask('110110011', '100011110'), return_surprises=False),
    ),
}

# memory networks by themselves

MODELS = {
    'model_mlp': Configuration('model', dict(what='MemoryMLP', dim=4, depth=3, expansion_factor=1.5), (2, 3, 4)),
    'model_gated_residual': Configuration(
        'model', dict(what='GatedResidualMemoryMLP', dim=4, depth=2, expansion_factor=1.5), (2, 3, 4)
    ),
    'model_factorized': Configuration('model', dict(what='FactorizedMemoryMLP', dim=4, depth=2, k=3), (2, 3, 4)),
    'model_swiglu': Configuration(
        'model', dict(what='MemorySwiGluMLP', dim=4, depth=2, expansion_factor=2.0), (2, 3, 4)
    ),
    'model_attention': Configuration(
        'model', dict(what='MemoryAttention', dim=4, scale=3.0, expansion_factor=1.5), (2, 3, 4)
    ),
}

# attention


def never_called(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError('flex attention is not for the CPU')


def attention(shape: tuple[int, ...] = (2, 8, 8), *, call: dict[str, Any] | None = None, **init: Any) -> Configuration:
    return Configuration('attention', dict(dim=8, dim_head=4, heads=2, segment_len=4) | init, shape, call or {})


VALUE_AND_GATE = dict(value_residual=Random((2, 2, 8, 4)), output_gating=Random((2, 8, 8)))

ATTENTION = {
    'attention_dim_head_64': Configuration('attention', dict(dim=4, segment_len=3, heads=1), (1, 5, 4)),
    'attention_blocks': attention(),
    'attention_blocks_ragged': attention((2, 10, 8), num_persist_mem_tokens=2),
    'attention_blocks_residual': attention(num_persist_mem_tokens=1, accept_value_residual=True, call=VALUE_AND_GATE),
    'attention_blocks_longterm': attention((2, 11, 8), num_longterm_mem_tokens=1, num_persist_mem_tokens=2),
    'attention_sliding': attention(sliding=True),
    'attention_sliding_ragged': attention((2, 11, 8), sliding=True, num_persist_mem_tokens=2),
    'attention_sliding_residual': attention(
        sliding=True,
        num_longterm_mem_tokens=0,
        num_persist_mem_tokens=1,
        accept_value_residual=True,
        call=VALUE_AND_GATE,
    ),
    'attention_sliding_longterm': attention((2, 13, 8), sliding=True, num_longterm_mem_tokens=2),
    'attention_scaled': attention(
        attend_kwargs=dict(scale=0.2),
        use_flex_attn=True,
        call=dict(disable_flex_attn=True, flex_attn_fn=never_called),
    ),
    'attention_cached': attention(
        (2, 1, 8), num_persist_mem_tokens=2, call=dict(cache=(Random((2, 2, 3, 4)), Random((2, 2, 3, 4))))
    ),
    'attention_cached_sliding': attention(
        (2, 1, 8), sliding=True, call=dict(cache=(Random((2, 2, 4, 4)), Random((2, 2, 4, 4))))
    ),
    'attention_cached_residual': attention(
        (2, 1, 8),
        accept_value_residual=True,
        call=dict(
            cache=(Random((2, 2, 3, 4)), Random((2, 2, 3, 4))),
            value_residual=Random((2, 2, 1, 4)),
            output_gating=Random((2, 1, 8)),
        ),
    ),
}

# the two experimental attentions


def implicit(hiddens: tuple[int, ...], shape: tuple[int, ...] = (2, 7, 6), **init: Any) -> Configuration:
    return Configuration('implicit', dict(dim=6, mlp_hiddens=hiddens, heads=2) | init, shape)


def nested(shape: tuple[int, ...] = (2, 7, 6), **init: Any) -> Configuration:
    return Configuration('nested', dict(dim=6, dim_head=4, heads=2) | init, shape)


EXPERIMENTS = {
    'implicit_defaults': Configuration('implicit', dict(dim=4, mlp_hiddens=(4, 6, 4)), (1, 5, 4)),
    'implicit_one_layer': implicit((4, 6)),
    'implicit_two_layers': implicit((4, 8, 6)),
    'implicit_three_layers': implicit((6, 10, 8, 4), heads=3),
    'implicit_relu': implicit((4, 6, 4), activation=nn.ReLU()),
    'implicit_no_talking_heads': implicit((4, 6, 4), talking_heads=False),
    'implicit_no_norms': implicit((4, 6, 4), prenorm=False, keys_rmsnorm=False),
    'nested_dim_head_64': Configuration('nested', dict(dim=3, heads=1), (1, 5, 3)),
    'nested_small': nested(),
    'nested_no_prenorm': nested(prenorm=False, heads=3),
    # the reference's constructor takes `keys_rmsnorm` and norms the keys all the same
    'nested_keys_rmsnorm_off': nested(keys_rmsnorm=False),
}

# transformers: two layers of width 8


class ProjectedEmbedding(nn.Module):
    """A token embedding other than the usual one."""

    def __init__(self, num_tokens: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, 5)
        self.projection = nn.Linear(5, dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.projection(self.embedding(ids))


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, float('-inf'))


def transformer(shape: tuple[int, ...] = (2, 11), *, of: dict[str, Any] | None = None, **init: Any) -> Configuration:
    small = dict(
        num_tokens=17,
        dim=8,
        depth=2,
        segment_len=4,
        dim_head=4,
        heads=2,
        ff_mult=2,
        num_residual_streams=1,
        neural_memory_layers=(2,),
        neural_memory_kwargs=MEMORY_KWARGS,
    )
    return Configuration('transformer', small | init, shape, **(of or {}))


MEMORY_KWARGS = dict(dim_head=4, heads=2, default_model_kwargs=dict(depth=2, expansion_factor=1.5))
SCRIPT_MEMORY_KWARGS = dict(
    dim_head=4,
    heads=2,
    attn_pool_chunks=True,
    qk_rmsnorm=True,
    momentum=True,
    momentum_order=1,
    default_step_transform_max_lr=1e-1,
    use_accelerated_scan=False,
    per_parameter_lr_modulation=True,
    spectral_norm_surprises=True,
)
GREEDY = dict(seq_len=14, temperature=0.0, show_progress=False)
LOSS = dict(call=dict(return_loss=True))

TRANSFORMERS = {
    'mac': transformer(),
    'mac_defaults': Configuration(
        'transformer', dict(num_tokens=7, dim=4, depth=1, segment_len=4, dim_head=4, heads=2), (1, 6)
    ),
    'mac_loss': transformer(of=dict(call=dict(return_loss=True, return_loss_breakdown=True))),
    'mac_streams': transformer(num_residual_streams=4, of=dict(sample=GREEDY)),
    'mac_two_streams_sliding': transformer(num_residual_streams=2, sliding_window_attn=True, of=LOSS),
    'mac_no_memory': transformer(neural_memory_layers=(), num_residual_streams=2),
    'mac_every_layer': transformer(neural_memory_layers=None, of=dict(sample=GREEDY)),
    'mac_longterm': transformer(num_longterm_mem_tokens=2, of=dict(sample=GREEDY)),
    'mac_persistent': transformer(num_persist_mem_tokens=2),
    'mac_longterm_persistent_sliding': transformer(
        num_longterm_mem_tokens=1, num_persist_mem_tokens=2, sliding_window_attn=True, of=dict(sample=GREEDY)
    ),
    'mac_sliding': transformer(
        sliding_window_attn=True,
        of=dict(
            call=dict(disable_flex_attn=True),
            sample=dict(prompt_len=3, use_cache=True, filter_fn=top_k_filter, filter_kwargs=dict(k=3), **GREEDY),
        ),
        use_flex_attn=True,
    ),
    'mac_gated_output': transformer(neural_mem_gate_attn_output=True, num_residual_streams=2),
    'mac_views': transformer(
        neural_memory_qkv_receives_diff_views=True, neural_memory_layers=(1, 2), of=dict(sample=GREEDY)
    ),
    'mac_views_streams': transformer(
        neural_memory_qkv_receives_diff_views=True, num_residual_streams=4, num_longterm_mem_tokens=1
    ),
    'mac_weight_residual': transformer(
        neural_mem_weight_residual=True,
        neural_memory_layers=(1, 2),
        neural_memory_segment_len=2,
        of=dict(sample=GREEDY),
    ),
    'mac_memory_segments': transformer(neural_memory_segment_len=2, neural_memory_batch_size=4),
    'mac_memory_model': transformer(
        neural_memory_model=Build('MemoryMLP', dict(dim=4, depth=3, expansion_factor=1.0)),
        neural_memory_kwargs=dict(dim_head=4, heads=2, momentum_order=2),
        neural_memory_add_value_residual=True,
    ),
    'mac_token_emb': transformer(token_emb=Build(ProjectedEmbedding, dict(num_tokens=17, dim=8)), dim_head=6, heads=1),
    'mac_cached': transformer(
        sliding_window_attn=True,
        neural_memory_segment_len=2,
        neural_memory_batch_size=4,
        of=dict(single_tokens=5),
    ),
    'mac_script': transformer(
        depth=3,
        neural_memory_layers=(2, 3),
        num_persist_mem_tokens=2,
        num_longterm_mem_tokens=2,
        neural_memory_segment_len=2,
        neural_memory_batch_size=4,
        neural_mem_weight_residual=True,
        neural_memory_qkv_receives_diff_views=True,
        num_residual_streams=4,
        sliding_window_attn=True,
        neural_memory_model=Build('MemoryMLP', dict(dim=4, depth=2, expansion_factor=2.0)),
        neural_memory_kwargs=SCRIPT_MEMORY_KWARGS,
        of=dict(call=dict(return_loss=True), sample=GREEDY),
    ),
}

# by file of stored figures

GROUPS: dict[str, dict[str, Configuration]] = dict(
    memory=MEMORY | PARTS | MODELS,
    attention=ATTENTION | EXPERIMENTS,
    transformer=TRANSFORMERS,
)
CONFIGURATIONS: dict[str, Configuration] = {name: one for group in GROUPS.values() for name, one in group.items()}

# whose state dicts are compared

CHECKPOINTS = (
    'defaults',
    'heads',
    'shared_between_heads',
    'gated_residual_depth_2',
    'swiglu',
    'external_model_no_residual',
    'everything',
    'everything_spectral',
    'attention_blocks_residual',
    'implicit_three_layers',
    'nested_small',
    'mac',
    'mac_every_layer',
    'mac_gated_output',
    'mac_memory_model',
    'mac_script',
)

# largest relative difference per tensor. The reference computes its attention weights and hyper-connections in float32

TOLERANCE = dict(memory=1e-8, parts=1e-8, model=1e-8, implicit=1e-8, nested=1e-8, attention=1e-5, transformer=1e-5)
