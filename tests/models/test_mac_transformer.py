"""`MemoryAsContextTransformer`: cached equals uncached for every configuration; causality; gradients; positions."""

from __future__ import annotations

import pytest
import torch
from compare import all_in_float64, assert_same, gradients
from mac_configurations import CONFIGURATIONS, TOKENS, every_configuration, ids, transformer
from torch import nn

from titans_pytorch import MemoryAsContextTransformer
from titans_pytorch.generation.logits import gumbel_sample, min_p_filter


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


@every_configuration
@torch.no_grad()
def test_cached_logits_equal_one_pass(index):
    model, tokens = transformer(index), ids(26)
    whole = model(tokens)
    for lengths in ([12, 13, 14, 17, 18, 24, 26], range(1, 20)):
        cache, logits = None, []
        for length in lengths:
            piece, cache = model(tokens[:, :length], cache=cache, return_cache=True)
            logits.append(piece)
        assert_same(torch.cat(logits, dim=1), whole[:, : lengths[-1]], 1e-9)


@every_configuration
def test_keys_and_values_in_a_cache_may_be_one_tensor_as_in_the_reference(index):
    model, tokens = transformer(index), ids(15)
    position, key_values, memories = model(tokens[:, :9], return_cache=True)[1]
    stacked = torch.stack([torch.stack(pair) for pair in key_values])
    expected = model(tokens[:, 9:], state=(position, key_values, memories))
    assert_same(model(tokens[:, 9:], state=(position, stacked, memories)), expected, 0.0)


@pytest.mark.parametrize('index', range(0, len(CONFIGURATIONS), 2))  # the logits of all are compared above
def test_cached_samples_equal_uncached(index):
    model, prompt = transformer(index), ids(7)
    kwargs = {'temperature': 0.0, 'show_progress': False}
    cached = model.sample(prompt, 20, use_cache=True, **kwargs)
    assert cached.shape == (2, 13)
    assert torch.equal(cached, model.sample(prompt, 20, use_cache=False, **kwargs))


@every_configuration
def test_cached_pieces_have_the_gradients_of_one_pass(index):
    model, tokens = transformer(index), ids(14)
    first, cache = model(tokens[:, :8], return_cache=True)
    second, _ = model(tokens, cache=cache, return_cache=True)
    whole = model(tokens)
    weights = torch.randn_like(whole)
    of_pieces = gradients(model, (torch.cat((first, second), dim=1) * weights).sum())
    assert_same(of_pieces, gradients(model, (whole * weights).sum()), 1e-7)


@every_configuration
def test_is_causal_and_every_parameter_has_a_gradient(index):
    model, tokens = transformer(index), ids(22)
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % TOKENS
    before, after = model(tokens), model(changed)
    assert_same(after[:, :13], before[:, :13], 1e-12)
    assert (after[:, 13] - before[:, 13]).abs().max() > 1e-6

    came = gradients(model, model(ids(40), return_loss=True))
    assert came.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_memory_reaches_past_the_attention_window():
    with_memory = transformer(0, sliding_window_attn=False, num_longterm_mem_tokens=0, neural_memory_segment_len=None)
    without = transformer(0, neural_memory_layers=(), sliding_window_attn=False, num_longterm_mem_tokens=0)
    for model, reaches in ((with_memory, True), (without, False)):
        tokens = ids(30)
        changed = tokens.clone()
        changed[:, 1] = (changed[:, 1] + 1) % TOKENS
        difference = (model(tokens) - model(changed))[:, 10:].abs().max()
        assert (difference > 1e-9) == reaches


def test_loss_is_the_cross_entropy_of_the_next_token():
    model, tokens = transformer(5), ids(20)
    log_probs = model(tokens[:, :-1]).log_softmax(dim=-1)
    expected = -log_probs.gather(-1, tokens[:, 1:].unsqueeze(-1)).mean()
    assert_same(model(tokens, return_loss=True), expected, 1e-12)


def test_positions_of_longterm_memory_tokens():
    model = transformer(0, num_longterm_mem_tokens=3)
    is_memory = [model.seq_index_is_longterm(i) for i in range(16)]
    assert is_memory == [False] * 5 + [True] * 3 + [False] * 5 + [True] * 3
    assert [model.seq_len_with_longterm_mem(n) for n in (1, 5, 6, 10, 11)] == [1, 5, 9, 13, 17]


def test_custom_token_embedding():
    model = transformer(3)
    own = transformer(3, token_emb=nn.Sequential(nn.Embedding(TOKENS, 16)))
    state = {name.replace('token_emb.', 'token_emb.0.'): p for name, p in model.state_dict().items()}
    own.load_state_dict(state)
    tokens = ids(12)
    assert_same(own(tokens), model(tokens), 1e-12)


@torch.no_grad()
def test_later_chunks_share_the_position_of_the_last_that_was_trained():
    sizes = {'segment_len': 4, 'neural_memory_segment_len': 2, 'num_longterm_mem_tokens': 1, 'num_tokens': TOKENS}
    plain, limited = (
        MemoryAsContextTransformer(dim=16, depth=1, heads=2, dim_head=8, position_length=length, **sizes)
        for length in (None, 8)
    )
    limited.load_state_dict(plain.state_dict())
    tokens = ids(21)
    # eight tokens are two segments of five positions, which are five chunks
    assert_same(limited(tokens[:, :8]), plain(tokens[:, :8]), 1e-6)
    embedded = [model._embedded(tokens, 0) for model in (plain, limited)]
    assert_same(embedded[1][:, :10], embedded[0][:, :10], 1e-6)
    last = limited.axial_pos_emb.axis(0, torch.tensor([4]))
    assert_same(limited.axial_pos_emb.axis(0, torch.arange(5, 12)), last.expand(7, -1), 1e-6)
    assert not torch.equal(embedded[1][:, 10:], embedded[0][:, 10:])

    cached, state = [], None
    for token in tokens.split(1, dim=1):
        logits, state = limited(token, state=state, return_state=True)
        cached.append(logits)
    assert_same(torch.cat(cached, dim=1), limited(tokens), 1e-6)
    assert_same(
        limited.sample(tokens[:, :7], 24, use_cache=True, temperature=0.0),
        limited.sample(tokens[:, :7], 24, use_cache=False, temperature=0.0),
        0.0,
    )


def test_factorized_positions_do_not_change_results():
    model, tokens = transformer(2), ids(17)
    length = model.seq_len_with_longterm_mem(40)
    outer = model.axial_pos_emb.maybe_derive_outer_dim(length, (model.neural_memory_segment_len,))
    factorized = model.axial_pos_emb(outer, return_factorized=True)
    expected, cache = model(tokens[:, :9], return_cache=True)
    assert_same(model(tokens[:, :9], factorized_pos_emb=factorized), expected, 1e-12)
    following = {'cache': cache, 'return_cache': True}
    assert_same(model(tokens, factorized_pos_emb=factorized, **following)[0], model(tokens, **following)[0], 1e-12)


def test_the_loss_compiles_once_without_graph_breaks():
    torch.compiler.reset()
    model = transformer(3, depth=2, neural_memory_layers=(2,))
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for attempt in range(2):
        tokens = ids(7)
        expected = model(tokens, return_loss=True)  # before the compiled call, as einops fills a table at its first
        of_eager = gradients(model, expected)
        with torch.compiler.set_stance('fail_on_recompile' if attempt else 'default'):
            came = compiled(tokens, return_loss=True)
            assert_same((came, gradients(model, came)), (expected, of_eager), 1e-7)


# sampling


def test_sampling_restores_the_mode_and_does_not_modify_the_prompt():
    model, prompt = transformer(0), ids(4)
    kept = prompt.clone()
    model.train()
    model.sample(prompt, 6, show_progress=False)
    assert model.training and torch.equal(prompt, kept)
    assert model.sample(prompt, 4, show_progress=False).shape == (2, 0)

    def failing(logits):
        raise RuntimeError('on purpose')

    with pytest.raises(RuntimeError, match='on purpose'):
        model.sample(prompt, 6, filter_fn=failing, filter_kwargs={}, show_progress=False)
    assert model.training


def test_a_filter_decides_what_can_be_sampled():
    model = transformer(0)

    def only(logits, allowed):
        return logits.masked_fill(torch.arange(TOKENS) != allowed, float('-inf'))

    out = model.sample(ids(3), 12, filter_fn=only, filter_kwargs={'allowed': 5}, use_cache=True, show_progress=False)
    assert (out == 5).all()


def test_min_p_and_gumbel_sampling():
    logits = torch.tensor([0.6, 0.3, 0.05, 0.05]).log()
    assert torch.equal(min_p_filter(logits, min_p=0.4).isinf(), torch.tensor([False, False, True, True]))

    drawn = torch.cat([gumbel_sample(logits.expand(4000, 4)) for _ in range(5)]).flatten()
    shares = drawn.bincount(minlength=4) / drawn.numel()
    assert_same(shares, logits.exp(), 0.02)
    assert gumbel_sample(logits, temperature=0.0).item() == 0


def test_positions_of_chunks_stay_apart_in_half_precision():
    model = MemoryAsContextTransformer(num_tokens=16, dim=32, depth=1, segment_len=4, heads=2, dim_head=16).float()
    numbers = torch.arange(1000, 1012)
    expected = model.axial_pos_emb.axis(0, numbers)
    came = model.bfloat16().axial_pos_emb.axis(0, numbers)
    assert came.dtype == torch.bfloat16 and len(came.unique(dim=0)) == len(numbers)
    assert_same(came.float(), expected, 0.01)
    whole, (outer, inner) = (model.axial_pos_emb((1012, 4), return_factorized=two) for two in (False, True))
    assert torch.equal(outer[1000:], came) and torch.equal(whole, outer.unsqueeze(1) + inner)


@pytest.mark.parametrize('position_length', [None, 8])
def test_positions_computed_before(position_length):
    model = transformer(0, position_length=position_length)
    x, size = ids(32), model.neural_memory_segment_len
    positions = model.axial_pos_emb((-(-model.num_positions(32) // size), size), return_factorized=True)
    assert_same(model(x, factorized_pos_emb=positions), model(x), 1e-12)
