"""Data as memory-mapped tokens: files, folders, vocabularies, the cache, and memory use."""

from __future__ import annotations

import gzip
import os
import zipfile
from pathlib import Path

import pytest
import torch

from titans_pytorch.training import (
    BadData,
    ByteVocabulary,
    check_outside_text,
    even_starts,
    load_data,
    random_starts,
    train_bpe,
    windows,
)

WORDS = ['memory', 'surprise', 'momentum', 'decay', 'größer', '記憶', 'the', 'of', 'and\n']


def text(words: int) -> bytes:
    picks = torch.randint(0, len(WORDS), (words,), generator=torch.Generator().manual_seed(0))
    return ' '.join(WORDS[pick] for pick in picks).encode()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / 'cache'


def test_files_and_folders_are_one_text(tmp_path, cache):
    content = text(3000)
    thirds = [content[i * len(content) // 3 : (i + 1) * len(content) // 3] for i in range(3)]
    folder = tmp_path / 'texts'
    (folder / 'inner').mkdir(parents=True)
    (folder / 'a.txt').write_bytes(thirds[0])
    (folder / 'b.gz').write_bytes(gzip.compress(thirds[1]))
    with zipfile.ZipFile(folder / 'inner' / 'c.zip', 'w') as archive:
        archive.writestr('text', thirds[2])
    (folder / '.hidden').write_bytes(b'not this')
    (tmp_path / 'whole').write_bytes(content)
    listed = [folder / 'a.txt', folder / 'b.gz', folder / 'inner' / 'c.zip']
    expected = load_data([tmp_path / 'whole'], cache=cache)
    assert not cache.exists()  # a raw file is mapped where it is
    for paths in ([folder], listed):
        data = load_data(paths, cache=cache)
        for name in ('train', 'valid', 'test'):
            assert torch.equal(getattr(data, name), getattr(expected, name))
        assert data.sha256 == expected.sha256 and data.tokens_per_byte == 1
    assert [path.name for path in cache.iterdir()] == [f'{data.sha256[:16]}.bytes']
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BadData, match='there is no file in'):
        load_data([tmp_path / 'empty'], cache=cache)


def test_bpe_tokens_are_the_text(tmp_path, cache):
    pytest.importorskip('tokenizers')
    content = text(40_000)
    (tmp_path / 'text').write_bytes(content)
    data = load_data([tmp_path / 'text'], 300, cache=cache)
    assert 256 < data.vocabulary.size <= 300 and data.train.dtype == torch.int16
    splits = [data.vocabulary.decode(split.long()) for split in (data.train, data.valid, data.test)]
    assert b''.join(splits) == content
    assert len(splits[0]) == pytest.approx(0.9 * len(content), abs=4)
    assert len(splits[1]) == pytest.approx(0.05 * len(content), abs=4)
    assert data.tokens_per_byte == len(data.valid) / len(splits[1])
    for split in splits:
        split.decode()  # no character is cut

    # a second time, neither the vocabulary nor the tokens are made
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = load_data([tmp_path / 'text'], 300, cache=cache)
    stored = load_data([tmp_path / 'text'], data.vocabulary, cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == times and len(times) == 4
    assert torch.equal(again.train, data.train) and torch.equal(stored.train, data.train)
    (tmp_path / 'text').write_bytes(content + b'!')
    assert load_data([tmp_path / 'text'], data.vocabulary, cache=cache).sha256 != data.sha256
    assert len([*cache.iterdir()]) == 7


def test_vocabularies_share_a_cache(tmp_path, cache):
    whole = text(3000)
    (tmp_path / 'text').write_bytes(whole)
    for size in (280, 300, 280):
        data = load_data([tmp_path / 'text'], size, cache=cache)
        assert data.vocabulary.size == size
        assert b''.join(data.vocabulary.decode(part) for part in data[:3]) == whole


@pytest.mark.parametrize('left', [0, 7, 100])
def test_files_of_the_cache_that_were_cut_short_are_made_again(left, tmp_path, cache):
    whole = text(3000)
    (tmp_path / 'text.gz').write_bytes(gzip.compress(whole))

    def loaded():
        data = load_data([tmp_path / 'text.gz'], 300, cache=cache)
        return [data.vocabulary.decode(part) for part in data[:3]]

    expected = loaded()
    for path in cache.iterdir():
        os.truncate(path, left)
    assert loaded() == expected and b''.join(expected) == whole


def test_text_that_cannot_be_encoded_is_named(tmp_path, cache):
    pytest.importorskip('tokenizers')
    (tmp_path / 'latin').write_bytes('größer '.encode('latin-1') * 1000)
    with pytest.raises(BadData, match='latin: text must be UTF-8'):
        load_data([tmp_path / 'latin'], 300, cache=cache)


@pytest.mark.parametrize('content', [b'', b'abc', 'größer '.encode() * 20])
def test_too_little_text_is_refused_in_every_vocabulary(content, tmp_path, cache):
    pytest.importorskip('tokenizers')
    (tmp_path / 'short').write_bytes(content)
    for vocabulary in (None, 300, train_bpe([b'abc'], 300)):
        with pytest.raises(BadData, match=f'short has {len(content)} bytes, too few: a twentieth of them'):
            load_data(tmp_path / 'short', vocabulary, cache=cache, window=1 if len(content) < 9 else 20)


@pytest.mark.parametrize(
    ('wrong', 'error', 'message'),
    [
        ({'paths': []}, ValueError, r'paths must name a file or a folder, got \[\]'),
        ({'vocabulary': 'bpe'}, TypeError, "vocabulary must be a Vocabulary or a number of tokens, got 'bpe'"),
        ({'vocabulary': 10}, ValueError, 'vocabulary must be an integer of at least 256, got 10'),
        ({'window': 0}, ValueError, 'window must be a positive integer, got 0'),
    ],
)
def test_arguments_of_load_data_are_checked(wrong, error, message, cache):
    with pytest.raises(error, match=message):
        load_data(**{'paths': __file__, 'cache': cache, **wrong})


@pytest.mark.parametrize('starts', [even_starts, lambda *sizes: random_starts(*sizes, torch.Generator())])
@pytest.mark.parametrize(('count', 'length', 'name'), [(-1, 5, 'count'), (1.5, 5, 'count'), (2, -1, 'length')])
def test_sizes_of_windows_are_checked(starts, count, length, name):
    with pytest.raises((ValueError, TypeError), match=f'{name} must be an integer of at least 0, got'):
        starts(torch.arange(100), count, length)


def test_folders_that_a_run_writes_to_are_outside_of_its_text(tmp_path):
    text = tmp_path / 'text'
    text.mkdir()
    (text / 'file').write_bytes(b'text' * 99)
    for inside in (text, text / 'cache', text / 'a' / 'b', tmp_path / 'other' / '..' / 'text' / 'c'):
        with pytest.raises(BadData, match=r'is in .*text, all files of which are text to train on'):
            check_outside_text(inside, text)
        with pytest.raises(BadData, match='name a folder outside of it'):
            load_data([tmp_path / 'other', text], cache=inside)
    for outside in (tmp_path, tmp_path / 'texts', text / '.cache', text / '.hidden' / 'runs'):
        check_outside_text(str(outside), [str(text), str(text / 'file')])
        assert len(load_data(text, cache=outside).train) == 356


def test_windows_are_parts_of_the_text(tmp_path):
    content = text(2000)
    (tmp_path / 'text').write_bytes(content)
    train = load_data(tmp_path / 'text', ByteVocabulary()).train
    starts = random_starts(train, 5, 16, torch.Generator().manual_seed(0))
    for start, window in zip(starts.tolist(), windows(train, starts, 17)):
        assert bytes(window.tolist()) == content[start : start + 17]
    assert (random_starts(train, 10_000, len(train) - 1, torch.Generator()) == 0).all()


def private() -> int:
    """Memory that is not a mapped file, in bytes."""
    fields = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())
    return int(fields['RssAnon'].split()[0]) * 1024


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
def test_a_file_is_not_read_into_memory(tmp_path):
    with open(tmp_path / 'large', 'wb') as file:
        for _ in range(64):
            file.write(b'a line of text\n' * 70_000)
    before = private()
    train = load_data([tmp_path / 'large']).train
    for _ in range(100):
        windows(train, random_starts(train, 8, 512, torch.Generator()), 513)
    assert private() - before < 10e6 < 0.2 * (tmp_path / 'large').stat().st_size
