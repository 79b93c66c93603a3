"""The two experimental attentions: cached calls over any split of a sequence equal one pass, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from titans_pytorch.attention.rotary import rotary_causal_attention, rotate
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.nested_attention import NestedAttention
from titans_pytorch.ops.rotation import rotate_features, rotation_at

LENGTH, DIM = 9, 12

ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    'implicit, one layer': lambda: ImplicitMLPAttention(DIM, (4, 6), heads=2),
    'implicit, three layers': lambda: ImplicitMLPAttention(DIM, (6, 8, 4, 10), heads=3),
    'implicit, plain': lambda: ImplicitMLPAttention(
        DIM, (4, 6, 4), heads=2, activation=nn.ReLU(), talking_heads=False, prenorm=False, keys_rmsnorm=False
    ),
    'nested': lambda: NestedAttention(DIM, dim_head=6, heads=2),
    'nested, plain': lambda: NestedAttention(DIM, dim_head=4, heads=3, prenorm=False),
}

SPLITS = {
    'token by token': [1] * LENGTH,
    'prompt, then tokens': [5, 1, 1, 1, 1],
    'several at a time': [2, 3, 4],
    'token, then the rest': [1, LENGTH - 1],
    'rest, then token': [LENGTH - 1, 1],
}

attentions = pytest.mark.parametrize('name', ATTENTIONS)


def build(name: str) -> nn.Module:
    """An attention in float64, with perturbed weights, so that talking heads are not the identity."""
    torch.manual_seed(0)
    attention = ATTENTIONS[name]().double()
    for parameter in attention.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return attention


def random_tokens() -> Tensor:
    return torch.randn(2, LENGTH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def in_calls(attention: nn.Module, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    outputs, cache = [], None
    for piece in tokens.split(lengths, dim=1):
        out, cache = attention(piece, cache=cache, return_kv_cache=True)
        outputs.append(out)
    return torch.cat(outputs, dim=1), tree_leaves(cache)


def gradients(attention: nn.Module, out: Tensor, tokens: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    trained = [parameter for parameter in attention.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((out * weights).sum(), [tokens, *trained]))


@attentions
@pytest.mark.parametrize('split', SPLITS)
def test_calls_equal_one_pass(name: str, split: str) -> None:
    attention, tokens = build(name), random_tokens().requires_grad_()

    expected, expected_cache = attention(tokens, return_kv_cache=True)
    out, cache = in_calls(attention, tokens, SPLITS[split])

    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(cache, tree_leaves(expected_cache), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    for ours, theirs in zip(gradients(attention, out, tokens), gradients(attention, expected, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@attentions
def test_every_parameter_has_a_gradient(name: str) -> None:
    attention, tokens = build(name), random_tokens().requires_grad_()

    for gradient in gradients(attention, attention(tokens), tokens):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-6


@attentions
def test_gradients_are_derivatives(name: str) -> None:
    attention, tokens = build(name), random_tokens()[:1, :4].requires_grad_()
    assert torch.autograd.gradcheck(attention, tokens)


@attentions
def test_no_token_sees_a_later_one(name: str) -> None:
    attention, tokens = build(name), random_tokens()
    expected = attention(tokens)

    for changed in range(LENGTH):
        other = tokens.clone()
        other[:, changed] += 1.0
        difference = (attention(other) - expected).abs().amax(dim=(0, 2))

        assert (difference[:changed] == 0).all()
        assert (difference[changed:] > 1e-6).all()


@attentions
def test_without_return_kv_cache_only_the_output_is_returned(name: str) -> None:
    attention, tokens = build(name), random_tokens()
    out, _ = attention(tokens, return_kv_cache=True)
    assert torch.equal(attention(tokens), out)


def test_implicit_mlp_is_a_chain_of_attentions() -> None:
    """With a single token, each attention returns its value, so that only the last layer matters."""
    torch.manual_seed(0)
    attention = ImplicitMLPAttention(DIM, (4, 6, 8), heads=2)
    token = torch.randn(3, 1, DIM)

    value = attention.values[-1](F.rms_norm(token, (DIM,)))
    torch.testing.assert_close(attention(token), attention.to_out(value))


def test_key_norms_can_be_left_out() -> None:
    with_norms = ImplicitMLPAttention(DIM, (4, 6, 4), heads=2)
    without = ImplicitMLPAttention(DIM, (4, 6, 4), heads=2, keys_rmsnorm=False)

    removed = with_norms.state_dict().keys() - without.state_dict().keys()
    assert removed == {'key_norms.0.weight', 'key_norms.1.weight'}


# rotary positions


def test_rotation_follows_explicit_positions() -> None:
    """Pairs of adjacent features rotate by position × frequency; features beyond the rotary dimension do not."""
    rotary = RotaryEmbedding(4).double()
    t = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    positions = torch.tensor([0, 7, 3, 3, 1000])

    pairs = torch.view_as_complex(t[..., :4].unflatten(-1, (2, 2)).contiguous())
    angles = positions[:, None] * rotary.freqs
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    expected = torch.cat((turned, t[..., 4:]), dim=-1)
    torch.testing.assert_close(rotate(rotary, t, positions), expected, rtol=1e-10, atol=1e-12)


def test_rotation_is_exact_far_from_the_start() -> None:
    t = torch.randn(1, 1, 4, 8)
    positions = torch.arange(4) + 2**24 - 4
    rotary, in_float64 = RotaryEmbedding(8), RotaryEmbedding(8).double()
    in_float64.freqs.data = rotary.freqs.double()
    exact = rotate(in_float64, t.double(), positions)
    torch.testing.assert_close(rotate(rotary, t, positions).double(), exact, rtol=1e-5, atol=1e-5)

    rotation = rotation_at(rotary.freqs, positions[:1])
    one = rotate_features(t[:, :, :1], rotation)
    torch.testing.assert_close(one, rotate(rotary, t[:, :, :1], positions[:1]))


@torch.no_grad()
@pytest.mark.parametrize('width', [2, 4])
def test_rotation_takes_any_place_in_memory(width):
    rotation = rotation_at(torch.tensor([1.0, 0.1][: width // 2]), torch.arange(3).unsqueeze(-1))
    for t in (torch.randn(1 + 6 * width)[1:].view(1, 2, 3, width), torch.randn(1, 2, 3, 11)[..., 5 : 5 + width]):
        with torch.enable_grad():
            expected = rotate_features(t, rotation)
        torch.testing.assert_close(rotate_features(t, rotation), expected)


def test_rotation_is_exact_in_bfloat16_and_after_a_cached_call() -> None:
    rotary = RotaryEmbedding(8)
    t = torch.randn(1, 1, 600, 8)
    positions = torch.arange(600)
    expected = rotate(rotary, t, positions)

    rotary.rotate_queries_or_keys(t.bfloat16())  # fills the library's cache with positions rounded to 8 bits

    assert torch.equal(rotate(rotary, t, positions), expected)

    low = rotate(rotary, t.bfloat16(), positions)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), rotate(rotary, t.bfloat16().float(), positions), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('q_len', [1, 3, 7])
def test_attention_of_the_last_positions(q_len: int) -> None:
    rotary = RotaryEmbedding(4).double()
    q, k, v = torch.randn(3, 2, 2, 7, 4, dtype=torch.float64)

    expected = F.scaled_dot_product_attention(
        rotate(rotary, q, torch.arange(7)), rotate(rotary, k, torch.arange(7)), v, is_causal=True
    )

    out = rotary_causal_attention(rotary, q[:, :, 7 - q_len :], k, v)
    torch.testing.assert_close(out, expected[:, :, 7 - q_len :], rtol=1e-10, atol=1e-12)


def test_attention_refuses_more_queries_than_keys() -> None:
    q, k = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match='q must not be longer than k.*4 and 3'):
        rotary_causal_attention(RotaryEmbedding(4), q, k, k)


# errors


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'dim': 0}, ValueError, 'dim must be a positive integer, got 0'),
        ({'heads': 0}, ValueError, 'heads must be a positive integer, got 0'),
        ({'heads': 1.5}, TypeError, 'heads must be a positive integer, got 1.5'),
        ({'mlp_hiddens': (4,)}, ValueError, 'mlp_hiddens must have two or more widths'),
        ({'mlp_hiddens': '44'}, TypeError, 'mlp_hiddens must be a tuple'),
        ({'mlp_hiddens': (4, 0)}, ValueError, r'mlp_hiddens\[1\] must be a positive integer, got 0'),
        ({'mlp_hiddens': (4, 2)}, ValueError, 'mlp_hiddens must be at least 3'),
    ],
)
def test_implicit_mlp_refuses(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImplicitMLPAttention(**{'dim': DIM, 'mlp_hiddens': (4, 4), **arguments})


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'dim': -1}, ValueError, 'dim must be a positive integer, got -1'),
        ({'dim_head': 2}, ValueError, 'dim_head must be at least 3'),
        ({'heads': '8'}, TypeError, "heads must be a positive integer, got '8'"),
    ],
)
def test_nested_refuses(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NestedAttention(**{'dim': DIM, **arguments})


@attentions
def test_refuses_bad_tokens(name: str) -> None:
    attention = build(name)

    with pytest.raises(ValueError, match=rf'tokens must be \(batch, length, dim={DIM}\).*got \(2, 3, 5\)'):
        attention(torch.randn(2, 3, 5).double())
    with pytest.raises(ValueError, match='tokens must be'):
        attention(torch.randn(2, 0, DIM).double())
    with pytest.raises(TypeError, match='tokens must be a floating-point tensor'):
        attention(torch.zeros(2, 3, DIM, dtype=torch.long))
    with pytest.raises(TypeError, match='tokens must be a tensor, got list'):
        attention([1.0])


@attentions
def test_refuses_a_cache_of_another_attention(name: str) -> None:
    attention, tokens = build(name), random_tokens()
    _, (keys, values) = attention(tokens, return_kv_cache=True)

    with pytest.raises(ValueError, match='cache must hold .* tensors of keys and values'):
        attention(tokens, cache=(keys, values, values))
    with pytest.raises(ValueError, match=r'cache must hold keys and values \(batch=1'):
        attention(tokens[:1], cache=(keys, values))
    shortened = [value[:, :, 1:] for value in tree_leaves(values)]
    with pytest.raises(ValueError, match=r'cache must hold keys and values .*length=9'):
        attention(tokens, cache=(keys, shortened))
    with pytest.raises(TypeError, match='cache must hold tensors of keys and values, got str'):
        attention(tokens, cache=['k'] * len(tree_leaves((keys, values))))
