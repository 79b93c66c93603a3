"""Documents that stay in their rows are read as if each had a row of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import build
from compare import all_in_float64, assert_same, gradients, randomised
from memories import DIM, HEAD, SWITCHES

from titans_pytorch import LongTermMemoryModel, MemoryMLP, NeuralMemory
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.models.documents import Documents
from titans_pytorch.presets import delta_rule_settings, memory_settings

TOKENS = 16
ALONE = {
    'spectral norm',
    'gated transition',
    'look-ahead gradients',
    'look-ahead gradients of a linear memory, momentum of order 2',
    'look-ahead gradients, proximal steps of three matrices',
    'convolution, attention memory',
    'attention memory',
    "a user's module",
    "a user's module that mixes tokens",
}
"""Switches with which documents get rows of their own."""


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


def packed_ids(*lengths: list[int]) -> torch.Tensor:
    return torch.tensor([[number for number, length in enumerate(row) for _ in range(length)] for row in lengths])


# of lengths below, at, and above a chunk and a memory batch; rows of 40 tokens
DOCUMENTS = packed_ids([7, 1, 12, 20], [40], [6, 6, 5, 23], [1, 2, 37])
PADDED = torch.ones(4, 40, dtype=torch.bool)
PADDED[0, 36:], PADDED[2, :3] = False, False


def read(model, tokens, in_rows: bool, monkeypatch, **given):
    """Loss and gradients, and how many rows were read at once."""
    sizes, read = [], model._read
    monkeypatch.setattr(NeuralMemory, 'is_linear', True)  # all can, but deep ones are faster with rows of their own
    monkeypatch.setattr(model, '_read', lambda x, *args, **kwargs: sizes.append(len(x)) or read(x, *args, **kwargs))
    if not in_rows:
        monkeypatch.setattr(model, '_packed', lambda *_: None)
    logits = model(tokens, **given)
    loss = model(tokens, return_loss=True, **given)
    monkeypatch.undo()
    return sizes, (logits, loss, gradients(model, loss))


def assert_packed(model, monkeypatch, **given):
    tokens = torch.randint(0, TOKENS, (4, 40))
    sizes, came = read(model, tokens, True, monkeypatch, **given)
    assert sizes == [4, 4]
    sizes, expected = read(model, tokens, False, monkeypatch, **given)
    assert max(sizes) > 1 and len(sizes) > 2
    assert_same(came, expected, 1e-9)


@pytest.mark.parametrize('batch_size', [None, 3, 6])
@pytest.mark.parametrize('switch', [switch for switch in SWITCHES if switch not in ('different views', 'everything')])
def test_of_memories_with_every_option(switch, batch_size, monkeypatch):
    kwargs = {'dim_head': HEAD, 'heads': 2, 'default_step_transform_max_lr': 0.3, **SWITCHES[switch]}
    if batch_size is None and any(kwargs.get(name) for name in ('proximal_steps', 'lookahead_gradients')):
        pytest.skip('needs memory batches')
    make = kwargs.pop('model', None)
    torch.manual_seed(len(switch))
    model = LongTermMemoryModel(
        num_tokens=TOKENS,
        dim=DIM,
        depth=2,
        neural_memory_segment_len=3,
        neural_memory_batch_size=batch_size,
        neural_memory_model=None if make is None else make(),
        neural_memory_kwargs=kwargs,
    )
    model = randomised(model, 0.1).double()
    memory = model.layers[0].memory
    in_rows = switch not in ALONE
    assert memory.reads_documents == in_rows
    if in_rows:
        assert_packed(model, monkeypatch, document_ids=DOCUMENTS, mask=PADDED)


@pytest.mark.parametrize('variant', ['plain', 'as in the paper', 'memory batches', 'streams, some layers'])
@pytest.mark.parametrize('name', ['LMM', 'MAG', 'MAL'])
def test_of_models(name, variant, monkeypatch):
    model = build(name, variant)
    assert_packed(model, monkeypatch, document_ids=DOCUMENTS)
    assert_packed(model, monkeypatch, document_ids=DOCUMENTS, mask=PADDED)


@pytest.mark.parametrize('chunk_size', [1, 4])
@pytest.mark.parametrize('depth', [1, 2])
def test_of_memories_that_solve_several_memory_batches_at_once(chunk_size, depth, monkeypatch):
    torch.manual_seed(chunk_size + depth)
    model = LongTermMemoryModel(
        num_tokens=TOKENS,
        dim=DIM,
        depth=1,
        neural_memory_segment_len=chunk_size,
        neural_memory_batch_size=chunk_size,
        neural_memory_model=MemoryMLP(HEAD, depth=depth),
        neural_memory_kwargs={
            'dim_head': HEAD,
            'heads': 2,
            'conv_kernel': 3,
            'proximal_steps': True,
            'normalized_momentum': True,
            'mem_model_norm_add_residual': depth == 2,
        },
    )
    assert_packed(randomised(model, 0.1).double(), monkeypatch, document_ids=DOCUMENTS)


def test_checkpointed_layers(monkeypatch):
    model = build('MAG', 'memory batches', checkpoint_layers=True)
    assert_packed(model, monkeypatch, document_ids=DOCUMENTS)


@pytest.mark.gpu
@pytest.mark.parametrize('chunk_size', [1, 4])
def test_on_a_gpu(chunk_size, monkeypatch):
    """By kernels, whose recurrences have one more state."""
    settings = (
        delta_rule_settings(2, 32) if chunk_size == 1 else memory_settings(2, 32, 4, default_model_kwargs={'depth': 1})
    )
    sizes = {'dim': 64, 'dim_head': 32, 'segment_len': 16, 'neural_memory_kwargs': settings}
    model = build('MAG', neural_memory_segment_len=chunk_size, neural_memory_batch_size=chunk_size, **sizes)
    model = model.float().cuda()
    tokens, given = torch.randint(0, TOKENS, (4, 40), device='cuda'), {'document_ids': DOCUMENTS.cuda()}
    _, expected = read(copy.deepcopy(model).double(), tokens, False, monkeypatch, **given)
    sizes, came = read(model, tokens, True, monkeypatch, **given)
    assert sizes == [4, 4]
    assert_same(came, expected, 1e-3)


def test_deep_memories_get_rows_of_their_own():
    documents = Documents.of(None, DOCUMENTS, (4, 40), torch.device('cpu'))
    for depth in (1, 2):
        model = build('MAG', neural_memory_model=MemoryMLP(8, depth=depth))
        assert (model._packed(documents) is not None) == (depth == 1)


def test_short_documents_in_long_memory_batches_get_rows_of_their_own(monkeypatch):
    monkeypatch.setattr(NeuralMemory, 'is_linear', True)
    model = build('MAG', 'memory batches', neural_memory_batch_size=20)
    documents = Documents.of(None, packed_ids([2] * 20), (1, 40), torch.device('cpu'))
    assert model._packed(documents) is None
    documents = Documents.of(None, packed_ids([19, 21]), (1, 40), torch.device('cpu'))
    assert model._packed(documents) is not None


def test_layers_that_cannot_refuse_documents():
    packed = Documents.of(None, packed_ids([4, 4]), (1, 8), torch.device('cpu')).packed(2, 4, 1).documents
    seq = torch.randn(1, 16, DIM)
    layer, attention = NeuralMemory(dim=DIM, chunk_size=2), SegmentedAttention(DIM, 4, dim_head=8, heads=1)
    with pytest.raises(ValueError, match='a memory that reads_documents'):
        NeuralMemory(dim=DIM, chunk_size=2, engine='dense')(seq, documents=packed)
    with pytest.raises(ValueError, match='without state'):
        layer(seq, state=layer(seq)[1], documents=packed)
    with pytest.raises(TypeError, match='documents must be PackedDocuments, got'):
        layer(seq, documents=packed.ids)
    with pytest.raises(ValueError, match=r'documents.resets must be \(batch=1, chunks=8\)'):
        layer(seq, documents=packed._replace(resets=packed.resets[:, :3]))
    with pytest.raises(ValueError, match='documents need sliding windows'):
        attention(seq, documents=packed)
