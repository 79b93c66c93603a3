"""Forward hooks take effect in cached and uncached sampling, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from architectures import CLASSES, build, ids
from compare import all_in_float64, assert_same
from einops.layers.torch import Reduce
from memories import inputs, memory
from torch import nn

from titans_pytorch import MemoryAsGateTransformer, MemoryMLP, NeuralMemory
from titans_pytorch.attention.rotary import Rotary
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.memory.modules import SplitHeads
from titans_pytorch.models.residual_streams import ExpandStreams, HyperConnection

MODELS = [name for name in CLASSES if name != 'LMM']


def silence_memory(module, args, out):
    retrieved, state = out
    return torch.zeros_like(retrieved), state


def negate_attention(module, args, out):
    attended, intermediates = out
    return -attended, intermediates


def hooked(name: str, which: str) -> nn.Module:
    model = build(name).eval()
    for block in model.layers:
        module, hook = {
            'memory': (block.memory, silence_memory),
            'attention': (block.attention, negate_attention),
            'feedforward': (block.feedforward, lambda module, args, out: -out),
        }[which]
        module.register_forward_hook(hook)
    return model


@pytest.mark.parametrize('which', ['memory', 'attention', 'feedforward'])
@pytest.mark.parametrize('name', MODELS)
def test_cached_sampling_sees_hooks(name: str, which: str):
    with all_in_float64():
        model, plain, prompt = hooked(name, which), build(name).eval(), ids(7)
        kwargs = {'temperature': 0.0, 'show_progress': False}
        cached = model.sample(prompt, 19, use_cache=True, **kwargs)
        assert torch.equal(cached, model.sample(prompt, 19, **kwargs))
        assert not torch.equal(cached, plain.sample(prompt, 19, use_cache=True, **kwargs))


class Interpolated(Rotary):
    def forward(self, t, *args, **kwargs):
        return super().forward(t / 4, *args, **kwargs)


class Longer(ExpandStreams):
    def forward(self, residuals):
        return 1.3 * super().forward(residuals)


class Shifted(HyperConnection):
    def forward(self, *args, **kwargs):
        branch_in, add_residual = super().forward(*args, **kwargs)
        return branch_in + 1, add_residual


def of_class(path: str, replacement: type[nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(path).__class__ = replacement

    return change


def constrain_otherwise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.residual_mix_constraint_fn = partial(torch.softmax, dim=-1)
            nn.init.normal_(module.dynamic_alpha_fn)


def add_bias_to_the_gate(model: nn.Module) -> None:
    for block in model.layers:
        weight = block.memory.retrieve_gate[0].weight
        block.memory.retrieve_gate[0] = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)


def remember_in_other_lengths(model: nn.Module) -> None:
    for block in model.layers:
        settings = {'dim_head': block.memory.init_weight_shape[0][-2], 'heads': block.memory.heads}
        block.memory = NeuralMemory(block.memory.dim, chunk_size=1, batch_size=1, **settings).double().eval()


def clamp_attention(model: nn.Module) -> None:
    for block in model.layers:
        old = block.attention
        sizes = old.dim, old.segment_len, old.num_persist_mem_tokens, old.num_longterm_mem_tokens, old.dim_head
        options = {'sliding': old.sliding, 'accept_value_residual': old.to_learned_v_mix is not None}
        clamp = {'softclamp_logits': True, 'logit_softclamp_value': 0.1}
        block.attention = SegmentedAttention(*sizes, old.heads, **options, attend_kwargs=clamp).double().eval()
        block.attention.load_state_dict(old.state_dict())


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def drop_attention_out_otherwise(model: nn.Module) -> None:
    for block in model.layers:
        block.attention.attend.flash, block.attention.attend.attn_dropout = False, Half()


def triple_hidden_states(model: nn.Module) -> None:
    model.norm = nn.Identity()
    model.norm.register_forward_hook(lambda module, inputs, output: 3 * output)


class Reversed(nn.Module):
    def forward(self, x):
        return x.flip(1).transpose(1, 2).flatten(2)


def clamp_attention_later(model: nn.Module) -> None:
    for block in model.layers:
        block.attention.attend.softclamp_logits, block.attention.attend.logit_softclamp_value = True, 0.1


def merge_heads_otherwise(model: nn.Module) -> None:
    for block in model.layers:
        block.attention.merge_heads = Reversed()


class SplitReversed(SplitHeads):
    def forward(self, x):
        return super().forward(x).flip(-1)


def split_heads_otherwise(model: nn.Module) -> None:
    for block in model.layers:
        block.memory.split_heads = SplitReversed(2)


def reduce_streams_otherwise(model: nn.Module) -> None:
    model.reduce_streams = Reduce('(b s) ... -> b ...', 'max', s=2)


CHANGES = {
    'memories with other chunks': remember_in_other_lengths,
    'options of attention': clamp_attention,
    'options of attention, set later': clamp_attention_later,
    'hook on an identity': triple_hidden_states,
    'merging of heads': merge_heads_otherwise,
    'splitting of heads': split_heads_otherwise,
    'reduction of streams': reduce_streams_otherwise,
    'rotary embedding': of_class('layers.0.attention.rotary_emb', Interpolated),
    'streams': of_class('expand_streams', Longer),
    'connection': of_class('layers.0.branches.feedforward', Shifted),
    'constraint of connections': constrain_otherwise,
    'gate with a bias': add_bias_to_the_gate,
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_cached_sampling_sees_modules_that_compute_otherwise(change: Callable[[nn.Module], None]):
    check_cached_sampling('MAG', change)


def test_cached_sampling_sees_another_mix_of_values():
    def change(model: nn.Module) -> None:
        model.layers[1].attention.to_learned_v_mix[2] = nn.Tanh()

    check_cached_sampling('MAC', change)


def test_cached_sampling_sees_another_dropout_of_attention():
    check_cached_sampling('MAC', drop_attention_out_otherwise)


def check_cached_sampling(name: str, change: Callable[[nn.Module], None]) -> None:
    """A change has an effect, which is the same with and without a cache."""
    with all_in_float64():
        model, prompt = build(name, num_residual_streams=2).eval(), ids(7)
        kwargs = {'max_new_tokens': 9, 'temperature': 0.0, 'return_logprobs': True, 'show_progress': False}
        plain = model.sample(prompt, use_cache=True, **kwargs)
        change(model)
        cached, uncached = (model.sample(prompt, use_cache=use_cache, **kwargs) for use_cache in (True, False))
        assert torch.equal(cached.tokens, uncached.tokens)
        assert_same(cached.logprobs, uncached.logprobs)
        assert (cached.logprobs - plain.logprobs).abs().max() > 1e-3


def test_cached_sampling_sees_a_forward_of_a_subclass():
    class Certain(MemoryAsGateTransformer):
        def forward(self, *args, **kwargs):
            logits, *rest = super().forward(*args, **kwargs)
            return torch.zeros_like(logits).index_fill_(-1, torch.tensor([3]), 9.0), *rest

    model = build('MAG').eval()
    model.__class__ = Certain
    assert (model.sample(ids(7), 12, temperature=0.0, use_cache=True, show_progress=False) == 3).all()


def test_global_hooks_are_called():
    with all_in_float64():
        model, prompt, seen = build('MAG').eval(), ids(7), set()
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(type(module)))
        try:
            model.sample(prompt, 9, use_cache=True, show_progress=False)
        finally:
            handle.remove()
    assert NeuralMemory in seen


def test_a_forward_set_on_an_instance_is_called():
    with all_in_float64():
        model, prompt = build('MAG').eval(), ids(7)
        attention = model.layers[0].attention
        forward = attention.forward
        attention.forward = lambda *args, **kwargs: negate_attention(attention, args, forward(*args, **kwargs))
        kwargs = {'temperature': 0.0, 'show_progress': False}
        assert torch.equal(model.sample(prompt, 30, use_cache=True, **kwargs), model.sample(prompt, 30, **kwargs))


def test_compiled_steps_are_refused_with_hooks():
    model = hooked('MAG', 'memory')
    with pytest.raises(ValueError, match='compiled=True .* hooks'):
        model.sample(ids(7), 12, use_cache=True, compiled=True, show_progress=False)


@pytest.mark.parametrize('engine', ['dual', 'dense'])
def test_hooks_on_a_memory_network_act_with_and_without_gradients(engine: str):
    mem = NeuralMemory(8, chunk_size=4, batch_size=8, model=MemoryMLP(8, 2), engine=engine).double()
    seq = inputs(mem, 17)
    plain = mem(seq)[0]
    calls = []

    def halve(module, args, out):
        calls.append(module)
        return out / 2

    mem.memory_model.model.register_forward_hook(halve)
    with_gradients = mem(seq)[0]
    with torch.no_grad():
        without = mem(seq)[0]
    assert_same(without, with_gradients.detach())
    assert (with_gradients - plain).abs().max() > 1e-3
    assert all(type(module) is MemoryMLP for module in calls)

    # and token by token
    state, pieces = None, []
    for piece in seq.split(1, dim=1):
        retrieved, state = mem(piece, state=state)
        pieces.append(retrieved)
    assert_same(torch.cat(pieces, dim=1), with_gradients)


def test_frozen_memories_build_no_graph():
    for engine in ('dual', 'dense'):
        mem = memory('plain', engine=engine).requires_grad_(False)
        state = None
        for _ in range(2):
            retrieved, state = mem(inputs(mem, 7), state=state)
        tensors = [retrieved, *state.weights.values(), *state.states[0].values(), *state.states[1].values()]
        assert not any(t.requires_grad for t in tensors), engine
        assert not state.cache_store_segment.requires_grad


def test_a_trained_loss_has_gradients_with_a_frozen_memory():
    weight = torch.full((8,), 0.5, dtype=torch.float64, requires_grad=True)

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((prediction - target).square() * weight).mean(dim=-1)

    came = {}
    for engine in ('dual', 'dense'):
        torch.manual_seed(0)
        mem = NeuralMemory(8, chunk_size=4, store_memory_loss_fn=loss, engine=engine).double().requires_grad_(False)
        torch.manual_seed(1)
        came[engine] = torch.autograd.grad(mem(inputs(mem, 17))[0].square().sum(), weight)[0]
    assert came['dual'].abs().min() > 1e-6
    assert_same(came['dual'], came['dense'])


def test_compiled_steps_see_a_changed_hook(steps_compiled_eagerly: list):
    with all_in_float64():
        model, prompt = build('LMM', depth=1, num_residual_streams=1).eval(), ids(5)
        kwargs = {'temperature': 0.0, 'show_progress': False}
        for factor in (0.0, -9.0):
            handle = model.layers[0].feedforward.register_forward_hook(lambda module, args, out, by=factor: out * by)
            compiled = model.sample(prompt, 14, use_cache=True, compiled=True, **kwargs)
            assert torch.equal(compiled, model.sample(prompt, 14, **kwargs))
            handle.remove()
