"""`TitansCache`: pieces and steps equal one pass, in padded batches too, and rows can be chosen and repeated."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from compare import all_in_float64, assert_same, leaves
from hf_models import architectures, batch, model, rows

from titans_pytorch.generation.stepper import Stepper
from titans_pytorch.hf import TitansCache
from titans_pytorch.hf.modeling import CACHE


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


def steps_of(own, cache, tokens):
    """Logits of tokens read one by one."""
    with torch.no_grad():
        return torch.cat([own(token, **{CACHE: cache}).logits for token in tokens.split(1, dim=1)], dim=1)


@architectures
def test_pieces_and_steps_equal_one_pass(name, monkeypatch):
    own, (x, mask) = model(name), batch()
    later = torch.randint(1, 13, (3, 8))
    stepped = []
    step = Stepper.__call__
    monkeypatch.setattr(Stepper, '__call__', lambda self, tokens: stepped.append(len(tokens)) or step(self, tokens))
    # the shortest row begins in the second call
    cache = own(x[:, :6], attention_mask=mask[:, :6])[CACHE]
    logits = [own(x[:, 6:], attention_mask=mask, **{CACHE: cache}).logits[:, -1:]]
    logits += [steps_of(own, cache, later[:, :5])]
    logits += [own(later[:, 5:], **{CACHE: cache}).logits]
    for index, row in enumerate(rows(x, mask)):
        whole = own(torch.cat((row, later[index : index + 1]), dim=1), use_cache=False).logits
        assert_same(torch.cat(logits, dim=1)[index], whole[0, -9:])
    assert stepped == [1, 1, 1] * 5
    assert cache.get_seq_length() == 17 and cache.get_max_length() == -1 and cache.batch_size == 3


def test_rows_are_chosen_repeated_and_reordered():
    own, (x, mask) = model('MAL'), batch()
    later = torch.randint(1, 13, (6, 4))

    def prefilled():
        cache = own(x, attention_mask=mask)[CACHE]
        steps_of(own, cache, later[:3, :2])  # the states are in buffers then
        return cache

    expected = steps_of(own, prefilled(), later[:3])
    for change, source in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = prefilled()
        change(cache)
        assert cache.batch_size == len(source)
        assert_same(steps_of(own, cache, later[source]), expected[source])


def test_a_copy_can_be_returned_to():
    own, (x, _) = model(), batch()
    cache = own(x)[CACHE]
    steps_of(own, cache, x[:, :2])
    kept = deepcopy(cache)
    expected = steps_of(own, cache, x[:, :5])
    assert kept.get_seq_length() == 11
    assert_same(steps_of(own, kept, x[:, :5]), expected, 0)


def test_what_was_read_cannot_become_padding():
    own, tokens = model(), torch.randint(1, 13, (2, 9))
    cache = own(tokens[:, :5], use_cache=True)[CACHE]
    for t in range(5, 7):
        own(tokens[:, t : t + 1], **{CACHE: cache})
    copy = deepcopy(cache)
    mask = torch.ones_like(tokens)
    mask[1, 5:7] = 0
    with pytest.raises(ValueError, match='which are 7 in row 1, got 5'):
        own(tokens[:, 7:], attention_mask=mask, **{CACHE: cache})
    with pytest.raises(ValueError, match='which are 7 in row 1, got 5'):
        own(tokens[:, 7:], attention_mask=mask, **{CACHE: copy})
    own(tokens[:, 7:], attention_mask=torch.ones_like(tokens), **{CACHE: cache})


@pytest.mark.parametrize('name', ['MAC', 'LMM'])
def test_padding_has_the_logits_of_the_step_before(name):
    own, tokens = model(name), torch.randint(1, 13, (3, 8))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = mask[2, 6:] = 0
    cache = own(tokens[:, :3])[CACHE]
    steps_of(own, cache, tokens[:, 3:5])
    cache = deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    for kept in (1, 0, torch.tensor([2, 0])):
        later = own(tokens[:, 5:], attention_mask=mask, logits_to_keep=kept, **{CACHE: deepcopy(cache)}).logits
        for index, row in enumerate(rows(tokens, mask)):
            column = 0 if isinstance(kept, torch.Tensor) else -1
            assert_same(later[index, column], own(row, use_cache=False).logits[0, -1])
    given = {'attention_mask': mask, 'do_sample': False, 'max_new_tokens': 4}
    assert torch.equal(own.generate(tokens, **{CACHE: cache}, **given), own.generate(tokens, **given))


def test_the_size_is_constant():
    own, (x, _) = model('MAG'), batch()
    cache = own(torch.cat((x, x), dim=1))[CACHE]

    def elements():
        (group,) = cache.groups
        return sum(t.numel() for t in leaves([*group.state[1:]]).values())

    before = elements()
    steps_of(own, cache, torch.randint(1, 13, (3, 40)))
    assert elements() == before


def test_steppers_are_released_with_their_cache(monkeypatch):
    own, (x, mask) = model('LMM'), batch()
    released = []
    monkeypatch.setattr(Stepper, 'release', lambda self: released.append(self))
    cache = own(x, attention_mask=mask)[CACHE]
    steps_of(own, cache, x[:, :2])
    cache.reorder_cache(torch.tensor([0, 1, 2]))
    assert not released
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert len(released) == 3
    steps_of(own, cache, x[:, :2])
    del cache
    assert len(released) == 6


def test_the_graph_reaches_into_the_cache():
    own, (x, _) = model(), batch()
    cache = own(x)[CACHE]
    own(x[:, :1], **{CACHE: cache}).logits.sum().backward()
    assert own.get_input_embeddings().weight.grad[x[0, 0]].abs().sum() > 0


def test_reset_forgets_everything():
    own, (x, _) = model(), batch()
    cache = own(x)[CACHE]
    cache.reset()
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 0 and cache.batch_size == -1
    assert_same(own(x, **{CACHE: cache}).logits, own(x).logits, 0)


@pytest.mark.parametrize('call', [lambda cache: cache.crop(-1), lambda cache: cache.activate_past_recording()])
def test_tokens_cannot_be_taken_back(call):
    assert not TitansCache().is_croppable
    with pytest.raises(NotImplementedError, match='stored in the weights of the memories'):
        call(TitansCache())
