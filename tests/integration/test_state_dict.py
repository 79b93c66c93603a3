"""Registered tensors: each trained tensor once, none empty, no scalars, no buffers; and their initialisation."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from compare import assert_same, randomised
from hyper_connections.manifold_constrained_hyper_connections import ManifoldConstrainedHyperConnections
from memories import DIM, HEAD, SWITCHES
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
)
from titans_pytorch.attention.rotary import Rotary
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.models.residual_streams import HyperConnection
from titans_pytorch.nested_attention import NestedAttention
from titans_pytorch.training import load_optimizer
from titans_pytorch.utils.parameters import ParameterSequence

SIZES = {'num_tokens': 11, 'dim': 8, 'depth': 2, 'segment_len': 4}
MAC_EXTRAS = {
    'heads': 2,
    'dim_head': 4,
    'num_longterm_mem_tokens': 2,
    'num_persist_mem_tokens': 2,
    'neural_memory_qkv_receives_diff_views': True,
    'neural_mem_weight_residual': True,
    'neural_memory_kwargs': {'heads': 2, 'dim_head': 4, 'gated_transition': True, 'init_decay_bias': -3.0},
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    'MAC': lambda: MemoryAsContextTransformer(**SIZES),
    'MAC, more': lambda: MemoryAsContextTransformer(**SIZES, **MAC_EXTRAS),
    'MAC, paper order': lambda: MemoryAsContextTransformer(**SIZES, paper_order=True),
    'MAG': lambda: MemoryAsGateTransformer(**SIZES),
    'MAL': lambda: MemoryAsLayerTransformer(**SIZES, num_residual_streams=2),
    'LMM': lambda: LongTermMemoryModel(**SIZES),
}


def memory(switch: str) -> NeuralMemory:
    """A memory of two heads with one of `SWITCHES`, as its constructor leaves it."""
    kwargs = dict(SWITCHES[switch])
    if 'model' in kwargs:
        kwargs['model'] = kwargs['model']()
    return NeuralMemory(DIM, heads=2, dim_head=HEAD, chunk_size=4, batch_size=8, **kwargs)


MODULES: dict[str, Callable[[], nn.Module]] = {
    **MODELS,
    **{f'memory, {switch}': lambda switch=switch: memory(switch) for switch in SWITCHES},
    'attention': lambda: SegmentedAttention(8, 4, accept_value_residual=True),
    'attention, persistent': lambda: SegmentedAttention(8, 4, num_persist_mem_tokens=2, heads=2, dim_head=4),
    'implicit MLP attention': lambda: ImplicitMLPAttention(8, (4, 6, 4), heads=2),
    'nested attention': lambda: NestedAttention(8, heads=2, dim_head=4),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'MLP': lambda: MemoryMLP(8, 3),
    'gated residual': lambda: GatedResidualMemoryMLP(8, 2),
    'factorized': lambda: FactorizedMemoryMLP(8, 2, k=2),
    'SwiGLU': lambda: MemorySwiGluMLP(8, 2),
    'attention': lambda: MemoryAttention(8),
}
MODULES |= {f'network, {name}': make for name, make in NETWORKS.items()}
every_module = pytest.mark.parametrize('name', MODULES)
every_model = pytest.mark.parametrize('name', MODELS)


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    seed()
    return make()


def spoil(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.constant_(parameter, float('nan'))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


IDS = torch.randint(0, 11, (2, 14), generator=torch.Generator().manual_seed(0))


def out_of(module: nn.Module) -> Tensor:
    """Of a fixed input."""
    if hasattr(module, 'num_tokens'):
        return module(IDS)
    seq = torch.randn(2, 14, 8, generator=torch.Generator().manual_seed(0))
    if getattr(module, 'qkv_receives_diff_views', False):
        seq = seq.expand(3, -1, -1, -1)
    kwargs = {}
    if getattr(module, 'to_learned_v_mix', None) is not None:
        kwargs['value_residual'] = torch.ones(2, 8, 14, 64)
    out = module(seq, **kwargs)
    return out[0] if isinstance(out, tuple) else out


# registered tensors


@every_module
def test_a_state_dict_holds_each_parameter_once_and_nothing_else(name: str) -> None:
    module = MODULES[name]()
    assert not [*module.named_buffers()]
    written, parameters = module.state_dict(), dict(module.named_parameters(remove_duplicate=False))
    assert written.keys() == parameters.keys()
    for key, value in written.items():
        assert value.data_ptr() == parameters[key].data_ptr()
        assert value.ndim and value.numel() and value.is_contiguous(), key
        assert value.untyped_storage().nbytes() == value.nbytes, key
    assert len({value.untyped_storage().data_ptr() for value in written.values()}) == len(written)


@every_model
def test_averaging_in_place_averages(name: str) -> None:
    """Federated averaging, and an exponential moving average, over the tensors of state dicts."""
    models = [MODELS[name]() for _ in range(3)]
    for value, model in enumerate(models, 1):
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
    mean = copy.deepcopy(models[0]).state_dict()
    with torch.no_grad():
        for key, tensor in mean.items():
            tensor.add_(models[1].state_dict()[key]).add_(models[2].state_dict()[key]).div_(3)
        average = models[0].state_dict()
        for key, tensor in average.items():
            tensor.lerp_(models[2].state_dict()[key], 0.25)
    assert all((tensor == 2.0).all() for tensor in mean.values())
    assert all((p == 1.5).all() for p in models[0].parameters())


def test_averaging_in_place_averages_what_a_memory_starts_from() -> None:
    memories = [NeuralMemory(8, heads=2, dim_head=4) for _ in range(3)]
    for value, one in enumerate(memories, 1):
        for parameter in one.memory_model_parameters:
            nn.init.constant_(parameter, value)
    mean = memories[0].state_dict()
    for other in memories[1:]:
        for key, tensor in other.state_dict().items():
            mean[key] += tensor
    for tensor in mean.values():
        tensor /= 3
    assert all((weight == 2.0).all() for weight in memories[0].init_weights(1).values())


@every_model
def test_safetensors_keep_a_model(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip('safetensors.torch')
    model, by_dict, by_model = randomised(MODELS[name]()), MODELS[name](), MODELS[name]()
    safetensors.save_file(model.state_dict(), tmp_path / 'dict')
    by_dict.load_state_dict(safetensors.load_file(tmp_path / 'dict'))
    safetensors.save_model(model, tmp_path / 'model')
    assert safetensors.load_model(by_model, tmp_path / 'model') == (set(), [])
    for loaded in (by_dict, by_model):
        assert_same(loaded.state_dict(), model.state_dict(), 0.0)
        assert_same(out_of(loaded), out_of(model), 0.0)


@every_model
def test_optimizers_and_clipping_take_every_parameter(name: str) -> None:
    model = MODELS[name]()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, return_loss=True).backward()
        largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=float('inf')) == largest
        optimizer.step()
    assert optimizer.state.keys() == {p for p in model.parameters() if p.grad is not None}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('shared', [False, True])
def test_a_state_does_not_change_with_the_parameters(batch: int, shared: bool) -> None:
    memory = NeuralMemory(8, heads=2, dim_head=4, chunk_size=4, batch_size=8, per_head_learned_parameters=not shared)
    with torch.no_grad():
        _, state = memory(torch.randn(batch, 6, 8))
        before = copy.deepcopy(state)
        for parameter in memory.parameters():
            parameter.add_(1.0)
    assert_same((state.weights, state.states), (before.weights, before.states), 0.0)


def test_optimizer_states_of_earlier_versions_load(tmp_path: Path) -> None:
    """They list parameters without elements, and scalars without a dimension."""
    model = seeded(MODELS['MAC'])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(IDS, return_loss=True).backward()
    optimizer.step()
    now = optimizer.state_dict()

    earlier = copy.deepcopy(now)
    names = [name for name, _ in model.named_parameters()]
    for index, state in earlier['state'].items():
        if names[index].endswith('h_post_scale'):
            state.update({key: value.reshape(()) for key, value in state.items()})
    empty = {'step': torch.tensor(1.0), 'exp_avg': torch.zeros(0, 8), 'exp_avg_sq': torch.zeros(0, 8)}
    earlier['state'] = {0: empty, **{index + 1: state for index, state in earlier['state'].items()}}
    earlier['param_groups'][0]['params'].append(len(names))

    resumed = torch.optim.AdamW(model.parameters(), lr=1e-3)
    load_optimizer(resumed, earlier)
    assert_same(resumed.state_dict(), now, 0.0)
    resumed.step()


# from the meta device


@every_module
def test_a_module_on_meta_is_whole_after_loading(name: str) -> None:
    module = randomised(seeded(MODULES[name]))
    with torch.device('meta'):
        empty = MODULES[name]()
    empty.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in module.parameters()]
    if not getattr(module, 'to_learned_weight_residual_mix', None):
        assert_same(out_of(empty), out_of(module), 0.0)


@every_model
def test_a_loaded_model_samples_and_goes_on(name: str) -> None:
    model = MODELS[name]()
    with torch.device('meta'):
        empty = MODELS[name]()
    empty.load_state_dict(model.state_dict(), assign=True)
    sampled = [m.sample(IDS[:, :3], 12, temperature=0.0, use_cache=True, show_progress=False) for m in (empty, model)]
    assert torch.equal(*sampled)
    _, state = model(IDS[:, :6], return_state=True)
    assert_same(empty(IDS[:, 6:], state=state), model(IDS[:, 6:], state=state), 0.0)


# initial values


@every_module
def test_reset_parameters_repeats_the_constructor(name: str) -> None:
    module = seeded(MODULES[name])
    expected, drawn = values(module), (torch.rand(1), random.random())
    randomised(module)

    seed()
    module.reset_parameters()
    assert_same(values(module), expected, 0.0)
    assert (torch.rand(1), random.random()) == drawn


@every_module
def test_reset_from_meta_gives_what_the_constructor_does(name: str) -> None:
    expected = values(seeded(MODULES[name]))
    with torch.device('meta'):
        module = MODULES[name]()
    module = module.to_empty(device='cpu')
    spoil(module)
    seed()
    module.reset_parameters()
    assert_same(values(module), expected, 0.0)


@every_module
def test_each_module_resets_its_own_parameters(name: str) -> None:
    """As code that iterates over `modules()` expects; in any order, gates that start constant stay so."""
    module = seeded(MODULES[name])
    constant = {key: p for key, p in values(module).items() if p.numel() > 1 and (p == p.flatten()[0]).all()}
    spoil(module)
    for part in module.modules():
        if [*part.parameters(recurse=False)]:
            part.reset_parameters()
    after = values(module)
    assert all(p.isfinite().all() for p in after.values())
    assert_same({key: after[key] for key in constant}, constant, 0.0)


def test_a_network_that_cannot_be_reset_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    with pytest.raises(TypeError, match='Bare.*reset_parameters'):
        NeuralMemory(8, model=Bare()).reset_parameters()
    with pytest.raises(TypeError, match='Bare.*reset_parameters'):
        MemoryAsGateTransformer(**SIZES, token_emb=nn.Sequential(nn.Linear(3, 8), Bare())).reset_parameters()

    class Whole(Bare):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.scale, 2.0)

    mem = NeuralMemory(8, model=Whole())
    inner = mem.memory_model_parameter_dict['model.inner.weight'].clone()
    mem.reset_parameters()
    assert (mem.memory_model_parameter_dict['model.scale'] == 2.0).all()
    assert (mem.memory_model_parameter_dict['model.inner.weight'] - inner).abs().max() > 1e-3


def test_third_party_parts_start_as_they_would_alone() -> None:
    for streams in (2, 4):
        theirs = seeded(lambda streams=streams: ManifoldConstrainedHyperConnections(streams, dim=6))
        drawn = random.random()
        ours = seeded(lambda streams=streams: HyperConnection(streams, 6))
        assert random.random() == drawn
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value.reshape(ours.state_dict()[key].shape)), key
    for dim in (3, 4, 7, 64):
        assert torch.equal(Rotary(dim).freqs, RotaryEmbedding(dim).freqs)
    q = torch.randn(1, 2, 5, 8)
    assert_same(Rotary(8).rotate_queries_or_keys(q), RotaryEmbedding(8).rotate_queries_or_keys(q), 1e-6)


# replicas


def test_a_sequence_of_parameters_is_like_a_list() -> None:
    parameters = [torch.full((2,), float(i)) for i in range(3)]
    held = ParameterSequence(parameters)
    assert len(held) == 3 and [p[0].item() for p in held] == [0.0, 1.0, 2.0] == [held[i][0].item() for i in range(3)]
    assert held[-1] is held[2] and isinstance(held[0], nn.Parameter)
    assert [*held.state_dict()] == ['0', '1', '2'] == [*nn.ParameterList(parameters).state_dict()]
    with pytest.raises(IndexError):
        held[3]


def replicas_of(module: nn.Module, count: int) -> list[nn.Module]:
    """Those of `torch.nn.parallel.replicate`, with copies in place of its broadcast to devices."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.clone() for t in tensors] for _ in devices]

    with patch('torch.nn.parallel.replicate._broadcast_coalesced_reshape', copies):
        return nn.parallel.replicate(module, [*range(count)])


def learned(modules: list[nn.Module], holder: nn.Module) -> dict[str, Tensor]:
    holder.zero_grad()
    sum(out_of(module).square().sum() for module in modules).backward()
    return {key: p.grad.clone() for key, p in holder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    'name', [*MODELS, 'memory, plain', 'memory, shared heads', 'attention, persistent', 'implicit MLP attention']
)
def test_replicas_compute_and_learn_as_the_module(name: str) -> None:
    module = seeded(MODULES[name])
    replicas = replicas_of(module, 2)
    for replica in replicas:
        assert_same(out_of(replica), out_of(module), 0.0)
    assert_same(learned(replicas, module), learned([module, module], module), 1e-5)


@pytest.mark.parametrize('make', [factory for name, factory in NETWORKS.items()], ids=[*NETWORKS])
def test_replicas_of_memory_networks_compute_as_they_do(make: Callable[[], nn.Module]) -> None:
    network, x = make(), torch.randn(2, 3, 8)
    (replica,) = replicas_of(network, 1)
    assert_same(replica(x), network(x), 0.0)
