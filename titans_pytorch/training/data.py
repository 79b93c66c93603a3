"""Text as memory-mapped tokens, and windows of it; nothing is read into memory as a whole."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from titans_pytorch.training.files import RunError, atomic_file, remove_leftovers
from titans_pytorch.training.vocabulary import ByteVocabulary, Vocabulary, train_bpe, vocabulary_from_dict
from titans_pytorch.utils.checks import check_integer, check_not_negative, check_positive, described
from titans_pytorch.utils.shapes import Int

BLOCK = 1 << 20
CHUNK = 1 << 16
"""Number of bytes to tokenise at a time. `tokenizers` holds some hundreds of such chunks."""
BPE_SAMPLE = 1 << 26
"""Most bytes of a text that a vocabulary is trained on."""
LENGTH = 8
"""Size in bytes of the number at the end of a cache file."""


class BadData(RunError):
    """Data that cannot be read or trained on."""


class TooLittleText(BadData):
    """A text with a split that is shorter than a window."""


class Data(NamedTuple):
    """A text in order: the first 90 % for training, the next 5 % for validation, the last 5 % for testing."""

    train: Int[Tensor, ' n']
    """Token ids, memory-mapped: uint8, int16 or int32, by the size of the vocabulary."""
    valid: Int[Tensor, ' n']
    test: Int[Tensor, ' n']
    vocabulary: Vocabulary
    source: str
    """Where the text comes from."""
    sha256: str
    """Digest of the text."""
    tokens_per_byte: float
    """Of the validation split. Multiplied by this and divided by ln 2, a loss in nats per token is in bits per byte."""


def load_data(
    paths: str | Path | Sequence[str | Path],
    vocabulary: Vocabulary | int | None = None,
    *,
    cache: str | Path | None = None,
    window: int = 1,
) -> Data:
    """Load the text of one or more files, one after another, as tokens.

    With the vocabulary of bytes, a raw file is mapped where it is. Everything else is unpacked or tokenised once, into
    files in `cache` whose names depend on the text and the vocabulary.

    Args:
        paths: one or more files: raw text, .gz, or a .zip of one file. A folder stands for the files in it, ordered by
            path, without hidden ones.
        vocabulary: default: bytes. A number stands for a BPE vocabulary of that size, kept in `cache` and trained on
            the training split (if that is larger than 64 MiB, on a sample of 64 MiB spread over it).
        cache: default: `titans_pytorch` in the user's cache folder (`$XDG_CACHE_HOME`, or `~/.cache`).
        window: number of tokens that each split must have at least.

    Raises:
        BadData: for files that cannot be read, and for a `cache` inside a folder of text.
        TooLittleText: for a text with a split that is shorter than `window`; a kind of `BadData`.
        ValueError, TypeError: for invalid arguments.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    if not paths:
        raise ValueError(f'paths must name a file or a folder, got {described(paths)}')
    vocabulary = _checked_vocabulary(vocabulary)
    (window,) = check_positive(window=window)
    cache = Path(cache) if cache is not None else default_cache()
    check_outside_text(cache, paths)
    files = [file for path in paths for file in _files_in(Path(path))]
    source = ', '.join(map(str, paths)) if len(paths) < 5 else f'{paths[0]} and {len(paths) - 1} others'
    if not files:
        raise BadData(f'there is no file in {source}')
    text, sha256 = _mapped_text(files, cache)
    size = len(text)

    def check_enough(parts: list[Tensor], unit: str) -> None:
        if (shortest := min(map(len, parts))) < window:
            few = f'a twentieth of them is {shortest} {unit}, and a window needs at least {window}'
            raise TooLittleText(f'{source} has {size} bytes, too few: {few}')

    if isinstance(vocabulary, ByteVocabulary):
        parts = splits = _split(text, [size * 90 // 100, size * 95 // 100])
    else:
        parts = _split(text, [_character_start(text, size * percent // 100) for percent in (90, 95)])
        check_enough(parts, 'bytes')  # a token has at least one byte
        try:
            if isinstance(vocabulary, int):
                vocabulary = _trained_bpe(parts[0], vocabulary, cache, sha256)
            splits = _tokenised(parts, vocabulary, cache, sha256)
        except ValueError as error:  # the vocabulary cannot encode the text
            raise BadData(f'{source}: {error}') from None
    check_enough(splits, 'tokens')
    train, valid, test = splits
    return Data(train, valid, test, vocabulary, source, sha256, len(valid) / len(parts[1]))


def default_cache() -> Path:
    """The folder for tokens if none is given."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'titans_pytorch'


def check_outside_text(folder: str | Path, paths: str | Path | Sequence[str | Path]) -> None:
    """Check that what a run writes to `folder` does not become part of its text, the files and folders `paths`.

    Raises:
        BadData: if `folder` is inside a folder of text and not hidden there.
    """
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        inner, outer = Path(folder).resolve(), Path(path).resolve()
        if outer.is_dir() and inner.is_relative_to(outer) and not _is_hidden(inner, outer):
            raise BadData(
                f'{folder} is in {path}, all files of which are text to train on: name a folder outside of it'
            )


def _checked_vocabulary(vocabulary: Any) -> Vocabulary | int:
    if vocabulary is None:
        return ByteVocabulary()
    if isinstance(vocabulary, Vocabulary) and not isinstance(vocabulary, type):
        return vocabulary
    try:
        return check_integer('vocabulary', vocabulary, ByteVocabulary.size)
    except TypeError:
        raise TypeError(f'vocabulary must be a Vocabulary or a number of tokens, got {described(vocabulary)}') from None


# files


def _files_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = (file for file in path.rglob('*') if file.is_file())
    return sorted(file for file in inside if not _is_hidden(file, path))


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether `path`, which is inside `folder`, is hidden, or any folder between the two."""
    return any(part[0] == '.' for part in path.relative_to(folder).parts)


def _blocks(files: Iterable[Path]) -> Iterator[bytes]:
    """The content of files, unpacked, in blocks."""
    for path in files:
        try:
            with _opened(path) as file:
                while block := file.read(BLOCK):
                    yield block
        except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise BadData(f'cannot read the data file {path}: {error}') from error


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == '.gz':
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix == '.zip':
        archive = zipfile.ZipFile(path)
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise BadData(f'{path} holds {len(members)} files; a .zip to train on must hold exactly one')
        return archive.open(members[0])
    return open(path, 'rb')


def _mapped_text(files: list[Path], cache: Path) -> tuple[Int[Tensor, ' n'], str]:
    """The bytes of the files, mapped, and their digest."""
    digest = hashlib.sha256()
    for block in _blocks(files):
        digest.update(block)
    sha256 = digest.hexdigest()
    if len(files) == 1 and files[0].suffix not in ('.gz', '.zip'):
        return _mapped(files[0], torch.uint8, files[0].stat().st_size), sha256
    path = cache / f'{sha256[:16]}.bytes'
    return _mapped(path, torch.uint8, _cached(path, _blocks(files))), sha256


def _cached(path: Path, blocks: Iterable[bytes]) -> int:
    """Write a file to the cache, unless it is there, and return its number of bytes. That number is stored after them,
    so that a file that was cut short is recognised and written again."""
    if (length := _length(path)) is not None:
        return length
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, older_than=3600.0)
    with atomic_file(path) as file:
        length = sum(map(file.write, blocks))
        file.write(length.to_bytes(LENGTH, 'little'))
    return length


def _length(path: Path) -> int | None:
    """The length of the content, as stored at the end of a file; `None` if it is missing or does not fit."""
    try:
        with open(path, 'rb') as file:
            size = file.seek(0, os.SEEK_END) - LENGTH
            file.seek(max(size, 0))
            return size if size == int.from_bytes(file.read(), 'little') else None
    except FileNotFoundError:
        return None


def _mapped(path: Path, dtype: torch.dtype, length: int) -> Int[Tensor, ' n']:
    """The first `length` bytes of a file, mapped as numbers."""
    kind = {torch.uint8: np.uint8, torch.int16: np.int16, torch.int32: np.int32}[dtype]
    if length == 0:  # an empty file cannot be mapped
        return torch.zeros(0, dtype=dtype)
    # copy-on-write, because a tensor cannot be read-only
    return torch.from_numpy(np.memmap(path, kind, mode='c', shape=(length // dtype.itemsize,)))


# tokens


def _trained_bpe(text: Tensor, size: int, cache: Path, sha256: str) -> Vocabulary:
    def trained() -> Iterator[bytes]:
        sample = itertools.islice(_chunks(text), 0, None, -(-len(text) // BPE_SAMPLE))
        yield json.dumps(train_bpe(sample, size).to_dict()).encode()

    path = cache / f'{sha256[:16]}-bpe-{size}.json'
    length = _cached(path, trained())
    return vocabulary_from_dict(json.loads(path.read_bytes()[:length]))


def _split(text: Tensor, ends: list[int]) -> list[Tensor]:
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)])]


def _character_start(text: Tensor, position: int) -> int:
    """The first position, at or after `position`, that is not inside a UTF-8 character."""
    while position < len(text) and int(text[position]) & 0xC0 == 0x80:
        position += 1
    return position


def _chunks(text: Tensor) -> Iterator[bytes]:
    """The text in chunks, which end at the end of a line if possible, and never within a character."""
    start = 0
    while start < len(text):
        chunk = text[start : start + CHUNK].numpy().tobytes()
        if start + CHUNK < len(text):
            chunk = chunk[: chunk.rfind(b'\n') + 1 or _character_start(text, start + CHUNK - 3) - start]
        yield chunk
        start += len(chunk)


def _tokenised(parts: Sequence[Tensor], vocabulary: Vocabulary, cache: Path, sha256: str) -> list[Tensor]:
    """The tokens of each part, mapped."""
    dtype = next(t for t in (torch.uint8, torch.int16, torch.int32) if vocabulary.size - 1 <= torch.iinfo(t).max)
    words = hashlib.sha256(json.dumps(vocabulary.to_dict(), sort_keys=True).encode()).hexdigest()
    tokens = []
    for name, part in zip(('train', 'valid', 'test'), parts):
        path = cache / f'{sha256[:16]}-{words[:16]}.{name}'
        length = _cached(path, (vocabulary.encode(chunk).to(dtype).numpy().tobytes() for chunk in _chunks(part)))
        tokens.append(_mapped(path, dtype, length))
    return tokens


# windows


def windows(tokens: Int[Tensor, ' n'], starts: Int[Tensor, ' b'], length: int) -> Int[Tensor, 'b _length']:
    """Windows of `length` tokens, int64. To predict n tokens, a model needs n + 1."""
    return tokens[starts[:, None] + torch.arange(length, device=starts.device)].long()


def random_starts(tokens: Int[Tensor, ' n'], count: int, length: int, generator: torch.Generator) -> Int[Tensor, ' b']:
    """Starts of `count` random windows of length + 1 tokens. The generator's state is the position in the data."""
    count, length = _checked_sizes(tokens, count, length)
    return torch.randint(len(tokens) - length, (count,), generator=generator, device=generator.device)


def even_starts(tokens: Int[Tensor, ' n'], count: int, length: int) -> Int[Tensor, ' b']:
    """Starts of `count` evenly spaced windows of length + 1 tokens."""
    count, length = _checked_sizes(tokens, count, length)
    last = len(tokens) - length - 1
    return torch.linspace(0, last, count, dtype=torch.float64, device=tokens.device).long()


def _checked_sizes(tokens: Tensor, count: int, length: int) -> list[int]:
    count, length = check_not_negative(count=count, length=length)
    if len(tokens) <= length:
        raise ValueError(f'length must be less than the {len(tokens)} tokens that there are, got {length}')
    return [count, length]
