"""The examples run, and do what they say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from small_runs import small_run

EXAMPLES = Path(__file__).resolve().parent.parent / 'examples'


@pytest.fixture
def run(monkeypatch):
    def run(name: str, *arguments: object):
        monkeypatch.setattr('sys.argv', [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / f'{name}.py'))['main']()

    return run


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('chat hello --run none', 'there is no run in none: train one'),
        ('long_document none.txt', "No such file or directory: 'none.txt'"),
        ('long_document empty', 'empty is too short'),
        ('train none.txt', 'cannot read the data file none.txt'),
        ('train empty', 'at least 257: give a smaller --length, or more text'),
        ('train .', 'runs/own is in ., all files of which are text to train on: name a folder outside of it'),
        ('train empty --vocabulary 10', 2),
        ('long_document empty --piece 0', 2),
        ('time_series --piece 0', 2),
        ('chat hello --length -1', 2),
    ],
)
def test_mistakes_end_an_example_in_one_line(words, message, tmp_path, monkeypatch):
    pytest.importorskip('tokenizers')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / '.cache'))
    name, *arguments = words.split()
    (tmp_path / 'empty').touch()
    monkeypatch.setattr('sys.argv', [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f'{name}.py'), run_name='__main__')
    if isinstance(message, int):
        assert ended.value.code == message  # from argparse, which prints one
    else:
        assert message in ended.value.code and '\n' not in ended.value.code


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob('*.py')} == {'time_series', 'long_document', 'chat', 'train'}


def test_time_series(run):
    early, late = run('time_series', '--steps', 60, '--piece', 32)
    assert early < 0.15 and late < 0.2  # the variance is 1


def test_long_document(run, tmp_path):
    path = tmp_path / 'document'
    path.write_bytes(b'The same sentence, again and again. ' * 40)
    bits = run('long_document', path, '--piece', 128, '--rounds', 3)
    assert len(bits) == 3 and bits[-1] < 0.7 * bits[0]


def test_chat_goes_on_from_its_state(run, tmp_path):
    folder, path = small_run(tmp_path / 'run'), tmp_path / 'chat.pt'

    def turn(message: str):
        answer = run('chat', message, '--run', folder, '--state', path, '--length', 9)
        return answer, torch.load(path, weights_only=True)['state']

    answer, first = turn('My name is Ada.')
    assert len(answer) <= 9
    size = path.stat().st_size
    _, second = turn('What is my name?')
    assert second.seq_index > first.seq_index + len('\nYou: What is my name?\nModel: ')
    assert path.stat().st_size < 1.1 * size


def test_train_goes_on_from_its_checkpoint(run, tmp_path, monkeypatch):
    pytest.importorskip('tokenizers')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'text').write_bytes(b'The same sentence, again and again. ' * 200)
    sizes = ('--run-dir', tmp_path / 'run', '--vocabulary', 270, '--batch', 1, '--micro-batches', 2, '--length', 20)
    early = run('train', tmp_path / 'text', *sizes, '--steps', 2)
    late = run('train', tmp_path / 'text', *sizes, '--steps', 5)
    assert late < early
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [2, 5]
    assert torch.load(tmp_path / 'run' / 'checkpoint.pt', weights_only=True)['batch'] == 5
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['model']['architecture'] == 'mal'
