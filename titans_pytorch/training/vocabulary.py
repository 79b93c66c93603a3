"""Vocabularies: text to token ids and back. Text is `bytes`, which for the vocabulary of bytes need not be UTF-8."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from titans_pytorch.utils.checks import check_integer, check_integers, check_keywords, described
from titans_pytorch.utils.shapes import Int

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@runtime_checkable
class Vocabulary(Protocol):
    """A mapping of text to token ids from 0 to `size` − 1, and back."""

    size: int

    def encode(self, text: bytes) -> Int[Tensor, ' n']:
        """Token ids of `text`, int64 on the CPU. `decode` turns them back into exactly `text`."""

    def decode(self, tokens: Int[Tensor, ' n'] | Iterable[int]) -> bytes:
        """The bytes that `tokens` stand for: those of each token in turn, so that a stream can be decoded token by
        token. A character of several bytes may be spread over several tokens."""

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary as JSON values, for `vocabulary_from_dict`."""


class ByteVocabulary:
    """One token for each of the 256 bytes."""

    size = 256

    def encode(self, text: bytes) -> Int[Tensor, ' n']:
        _check_bytes('text', text)
        return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))

    def decode(self, tokens: Int[Tensor, ' n'] | Iterable[int]) -> bytes:
        return bytes(_checked_tokens(tokens, self.size))

    def to_dict(self) -> dict[str, Any]:
        return {'kind': 'bytes'}


class BPEVocabulary:
    """Byte-level byte-pair encoding with the package `tokenizers`, built by `train_bpe` or `load_bpe`.

    Any UTF-8 text can be encoded. Text in another encoding cannot, because `tokenizers` splits characters, not bytes.

    Args:
        tokenizer: a byte-level BPE model: its vocabulary holds a symbol for each byte, and it does not normalise text.
            Its truncation and padding, and what it adds at the ends of a text, are not used.

    Raises:
        ValueError: for a tokenizer that cannot reproduce every text.
    """

    def __init__(self, tokenizer: Tokenizer):
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # a copy, so that the caller's own keeps its settings
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab()
        added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
        byte_of = byte_of_symbol()
        if not byte_of.keys() <= vocabulary.keys():
            raise ValueError('tokenizer must be byte-level BPE, whose vocabulary holds a symbol for each byte')
        self.size = max(vocabulary.values()) + 1
        self._tokenizer = tokenizer
        self._bytes = [b''] * self.size  # ids may be skipped
        for symbols, index in vocabulary.items():
            own = index not in added
            self._bytes[index] = bytes(byte_of[s] for s in symbols) if own else symbols.encode()

        # refuse a tokenizer that normalises text, adds a space in front, or strips spaces around a special token
        probe = f'e\u0301 \u00e9\ufb01 \u212b\r\n\t  A {" ".join(added.values())} \u4e2d\U0001f600'.encode()
        if self.decode(self.encode(probe)) != probe:
            raise ValueError('tokenizer must reproduce every text, and this one changes spaces or characters')

    def encode(self, text: bytes) -> Int[Tensor, ' n']:
        """Token ids of `text`, int64.

        Raises:
            ValueError: for text that is not UTF-8.
        """
        ids = self._tokenizer.encode(_as_utf8(text), add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.long)

    def decode(self, tokens: Int[Tensor, ' n'] | Iterable[int]) -> bytes:
        return b''.join(self._bytes[token] for token in _checked_tokens(tokens, self.size))

    def to_dict(self) -> dict[str, Any]:
        return {'kind': 'bpe', 'tokenizer': json.loads(self._tokenizer.to_str())}


def vocabulary_from_dict(stored: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary whose `to_dict` returned `stored`.

    Raises:
        ValueError: for an unknown kind, or a damaged tokenizer.
        ModuleNotFoundError: for BPE without the package `tokenizers`.
    """
    check_keywords(stored=stored)
    if stored.get('kind') == 'bytes':
        return ByteVocabulary()
    if stored.get('kind') == 'bpe':
        return _bpe_from_json(json.dumps(stored.get('tokenizer')))
    raise ValueError(f"stored['kind'] must be 'bytes' or 'bpe', got {described(stored.get('kind'))}")


def train_bpe(chunks: Iterable[bytes], size: int) -> BPEVocabulary:
    """Train a BPE vocabulary of at most `size` tokens on `chunks` of UTF-8 text; less text may yield fewer tokens.

    Words do not span chunks, and a chunk must not end within a character.

    Raises:
        ValueError: for a size below 256, the number of bytes, and for text that is not UTF-8.
        ModuleNotFoundError: without the package `tokenizers`.
    """
    size = check_integer('size', size, 256)
    tokenizers = _tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # for other programs that open the file
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(byte_of_symbol()), show_progress=False
    )
    tokenizer.train_from_iterator((_as_utf8(chunk) for chunk in chunks), trainer)
    return BPEVocabulary(tokenizer)


def load_bpe(path: str | Path) -> BPEVocabulary:
    """Load the BPE vocabulary in a `tokenizer.json`, as stored by `tokenizers` and Hugging Face's models.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for a file of another kind, and for a tokenizer that is not byte-level.
        ModuleNotFoundError: without the package `tokenizers`.
    """
    try:
        return _bpe_from_json(Path(path).read_bytes().decode())
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'a BPE vocabulary needs the package tokenizers: pip install tokenizers', name='tokenizers'
        ) from None
    return tokenizers


def _bpe_from_json(text: str) -> BPEVocabulary:
    tokenizers = _tokenizers()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # its own exceptions are of this type
        raise ValueError(f'tokenizer must be the content of a tokenizer.json: {error}') from None
    return BPEVocabulary(tokenizer)


def byte_of_symbol() -> dict[str, int]:
    """Map each symbol of byte-level BPE to its byte. A printable byte is its own symbol in Latin-1; others have symbols
    from 256 on."""
    printable = {*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _as_utf8(text: bytes) -> str:
    _check_bytes('text', text)
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        byte = f'byte {error.start} is 0x{text[error.start]:02x}'
        raise ValueError(
            f'text must be UTF-8 for a BPE vocabulary ({byte}); the vocabulary of bytes takes any'
        ) from None


def _check_bytes(name: str, text: Any) -> None:
    if not isinstance(text, bytes):
        raise TypeError(f'{name} must be bytes, got {described(text)}')


def _checked_tokens(tokens: Any, size: int) -> list[int]:
    checked = check_integers('tokens', tokens)
    if checked and not 0 <= min(checked) <= max(checked) < size:
        raise ValueError(f'tokens must be from 0 to {size - 1}, got {min(checked)} to {max(checked)}')
    return checked
