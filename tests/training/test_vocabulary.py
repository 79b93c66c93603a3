"""Vocabularies: exact round trips, JSON, and refusals of what cannot be reproduced."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from titans_pytorch.training.vocabulary import (
    BPEVocabulary,
    ByteVocabulary,
    load_bpe,
    train_bpe,
    vocabulary_from_dict,
)

TEXT = 'the cat sat on the mat; the cathedral of the catalogue\r\n\tÄpfel, 中文, 😀 — e\u0301\n'.encode()
BPE = train_bpe([TEXT * 4], 300)


def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(json.dumps(BPE.to_dict()['tokenizer']))


def test_a_tokenizer_of_the_caller_keeps_its_settings() -> None:
    given = tokenizer()
    given.enable_truncation(4)
    given.enable_padding(length=8)
    assert BPEVocabulary(given).encode(TEXT).tolist() == BPE.encode(TEXT).tolist()
    assert given.truncation is not None and given.padding is not None


@given(st.binary())
def test_bytes_round_trip(text: bytes) -> None:
    tokens = ByteVocabulary().encode(text)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [*text]
    assert ByteVocabulary().decode(tokens) == text


@settings(deadline=None)
@given(st.text())
def test_bpe_round_trips_every_utf_8_text(text: str) -> None:
    tokens = BPE.encode(text.encode())
    assert tokens.dtype == torch.long
    assert BPE.decode(tokens) == text.encode()
    assert b''.join(BPE.decode([token]) for token in tokens.tolist()) == text.encode()


def test_bpe_learns_the_frequent_strings() -> None:
    assert BPE.size == 300
    assert BPE.decode(BPE.encode(b'the cat')[:1]) == b'the'
    assert len(BPE.encode(TEXT)) < len(TEXT) / 2


@pytest.mark.parametrize('vocabulary', [ByteVocabulary(), BPE])
def test_a_vocabulary_is_restored_from_json(vocabulary: ByteVocabulary | BPEVocabulary) -> None:
    restored = vocabulary_from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert type(restored) is type(vocabulary)
    assert restored.size == vocabulary.size
    assert restored.encode(TEXT).equal(vocabulary.encode(TEXT))
    assert restored.to_dict() == vocabulary.to_dict()


def test_a_tokenizer_file_is_loaded_with_its_special_tokens(tmp_path: Path) -> None:
    ours = tokenizer()
    ours.add_special_tokens(['<｜end of text｜>'])
    ours.enable_truncation(3)
    ours.enable_padding(length=64)
    ours.save(str(tmp_path / 'tokenizer.json'))
    loaded = load_bpe(tmp_path / 'tokenizer.json')
    text = TEXT + '<｜end of text｜>'.encode() + TEXT
    assert loaded.size == BPE.size + 1
    assert loaded.encode(text).tolist() == [*BPE.encode(TEXT).tolist(), BPE.size, *BPE.encode(TEXT).tolist()]
    assert loaded.decode(loaded.encode(text)) == text


def normalising() -> Tokenizer:
    ours = tokenizer()
    ours.normalizer = normalizers.NFC()
    return ours


def with_prefix_space() -> Tokenizer:
    ours = tokenizer()
    ours.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return ours


def stripping() -> Tokenizer:
    ours = tokenizer()
    ours.add_special_tokens([AddedToken('<mask>', lstrip=True)])
    return ours


@pytest.mark.parametrize('changed', [normalising, with_prefix_space, stripping])
def test_a_tokenizer_that_changes_text_is_refused(changed) -> None:
    with pytest.raises(ValueError, match='reproduce every text'):
        BPEVocabulary(changed())


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = Tokenizer(models.WordLevel({'a': 0, '?': 1}, unk_token='?'))
    other.decoder = decoders.WordPiece()
    other.save(str(tmp_path / 'words.json'))
    with pytest.raises(ValueError, match=r'words\.json: tokenizer must be byte-level BPE'):
        load_bpe(tmp_path / 'words.json')
    (tmp_path / 'damaged.json').write_bytes(b'{"version": ')
    with pytest.raises(ValueError, match=r'damaged\.json: tokenizer must be the content of a tokenizer\.json'):
        load_bpe(tmp_path / 'damaged.json')
    (tmp_path / 'binary.json').write_bytes(b'\xff\x00')
    with pytest.raises(ValueError, match=r'binary\.json: '):
        load_bpe(tmp_path / 'binary.json')
    with pytest.raises(FileNotFoundError, match='none'):
        load_bpe(tmp_path / 'none.json')


def test_text_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(ValueError, match=r'UTF-8 for a BPE vocabulary \(byte 2 is 0xff\)'):
        BPE.encode(b'ab\xff')
    with pytest.raises(ValueError, match='UTF-8 for a BPE vocabulary'):
        train_bpe([b'\xff'], 300)


@pytest.mark.parametrize('vocabulary', [ByteVocabulary(), BPE])
def test_malformed_calls_are_refused(vocabulary: ByteVocabulary | BPEVocabulary) -> None:
    with pytest.raises(TypeError, match="text must be bytes, got 'text'"):
        vocabulary.encode('text')  # type: ignore[arg-type]
    for tokens in ([0, vocabulary.size], [-1]):
        with pytest.raises(ValueError, match=f'tokens must be from 0 to {vocabulary.size - 1}'):
            vocabulary.decode(tokens)
    with pytest.raises(TypeError, match='tokens must be integers'):
        vocabulary.decode(torch.zeros(2, 2, dtype=torch.long))


def test_malformed_requests_are_refused() -> None:
    with pytest.raises(ValueError, match='size must be an integer of at least 256'):
        train_bpe([TEXT], 255)
    with pytest.raises(ValueError, match=r"stored\['kind'\] must be 'bytes' or 'bpe', got 'words'"):
        vocabulary_from_dict({'kind': 'words'})
    with pytest.raises(ValueError, match=r'content of a tokenizer\.json'):
        vocabulary_from_dict({'kind': 'bpe'})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = BPE.to_dict()
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(ModuleNotFoundError, match='pip install tokenizers'):
        vocabulary_from_dict(stored)
