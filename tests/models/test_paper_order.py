"""MAC in the order of the paper: gradients from segment to segment."""

from __future__ import annotations

import pytest
import torch
from architectures import build, ids
from compare import all_in_float64, assert_same, gradients, randomised

from titans_pytorch import MemoryAsContextTransformer, MemoryMLP
from titans_pytorch.attention.context import ContextAttention


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


def test_what_is_stored_has_no_gradient_for_the_context():
    """In pieces too, whose caches hold keys and values of earlier contexts."""
    seq, context = (torch.randn(2, 6, 16).double().requires_grad_() for _ in range(2))
    attention = randomised(ContextAttention(16, 6, dim_head=8, heads=2, num_persist_mem_tokens=1), 0.3).double()
    whole, _ = attention(seq, context)
    expected = torch.autograd.grad(whole.sin().sum(), [seq, context], retain_graph=True)
    for lengths in ([6], [2, 3, 1]):
        outs, stored, cache, position = [], [], None, 0
        for pieces in zip(seq.split(lengths, dim=1), context.split(lengths, dim=1)):
            kwargs = {'cache': cache, 'position': position}
            stored.append(attention(*pieces, detach_context=True, **kwargs)[0])
            out, (_, cache) = attention(*pieces, **kwargs)
            position += pieces[0].shape[1]
            outs.append(out)
        out, to_store = torch.cat(outs, dim=1), torch.cat(stored, dim=1)
        assert_same((out, to_store), (whole, whole), 1e-12)
        assert_same(torch.autograd.grad(out.sin().sum(), [seq, context], retain_graph=True), expected, 1e-12)
        of_seq, of_context = torch.autograd.grad(to_store.sin().sum(), [seq, context])
        assert_same(of_seq, expected[0], 1e-12)
        assert not of_context.any()


def test_a_detached_context_changes_gradients_alone():
    model, other, tokens = build('MAC, paper order', detach_context=True), build('MAC, paper order'), ids(20)
    other.load_state_dict(model.state_dict())
    logits, expected = model(tokens), other(tokens)
    assert_same(logits, expected, 1e-12)
    own, full = gradients(model, logits.sin().sum()), gradients(other, expected.sin().sum())
    assert own.keys() == full.keys()
    assert any((own[name] - full[name]).abs().max() > 1e-3 * full[name].abs().max() for name in own)

    first, state = model(tokens[:, :8], return_state=True)
    second = model(tokens[:, 8:], state=state)
    assert_same(gradients(model, torch.cat((first, second), dim=1).sin().sum()), own, 1e-9)


def test_gradients_of_long_windows_stay_small_with_a_detached_context():
    """In deep memories with large steps, where a change grows from segment to segment."""
    memory = {
        'proximal_steps': True,
        'momentum': False,
        'default_step_transform_max_lr': 16.0,
        'qk_l2norm': True,
        'post_rmsnorm': True,
        'mem_model_norm_add_residual': False,
    }
    norms = {}
    for detach in (False, True):
        torch.manual_seed(0)
        model = MemoryAsContextTransformer(
            num_tokens=16, dim=16, depth=1, heads=1, dim_head=16, segment_len=4, num_residual_streams=1,
            neural_memory_model=MemoryMLP(16, depth=2), neural_memory_kwargs=memory,
            paper_order=True, detach_context=detach,
        ).double()  # fmt: skip
        tokens = torch.randint(0, 16, (1, 400), generator=torch.Generator().manual_seed(0))
        grads = gradients(model, model(tokens, return_loss=True)).values()
        norms[detach] = torch.stack([g.norm() for g in grads]).norm()
    assert norms[True] < 100
    assert norms[False] > 1e6


def test_a_detached_context_needs_the_order_of_the_paper():
    with pytest.raises(ValueError, match='detach_context=True needs paper_order=True'):
        build('MAC', detach_context=True)
