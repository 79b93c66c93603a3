"""The training script: data, presets, checkpoints, resume, signals, and what it leaves in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch

import train_mac
from titans_pytorch import configuration
from titans_pytorch.training import (
    checkpoints,
    enwik8,
    metrics,
    open_run,
    read_metrics,
    rewind,
    vocabulary_from_dict,
    windows,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    'BATCH_SIZE': 2,
    'GRADIENT_ACCUMULATE_EVERY': 1,
    'SEQ_LEN': 24,
    'LEARNING_RATE': 1e-2,
    'NUM_BATCHES': 4,
    'VALIDATE_EVERY': 100,
    'VALIDATE_BATCHES': 2,
    'GENERATE_EVERY': 100,
    'PRIME_LENGTH': 8,
    'GENERATE_LENGTH': 12,
    'CHECKPOINT_EVERY': 100,
    'DIM': 16,
    'DEPTH': 1,
    'HEADS': 2,
    'DIM_HEAD': 8,
    'WINDOW_SIZE': 8,
    'NUM_PERSIST_MEM': 2,
    'NUM_LONGTERM_MEM': 2,
    'NEURAL_MEM_LAYERS': (1,),
    'NEURAL_MEM_HEADS': 2,
    'NEURAL_MEM_DIM_HEAD': 8,
    'NEURAL_MEM_BATCH_SIZE': 16,
    'DEVICE': 'cpu',
}
TEXT = b'The quick brown fox jumps over the lazy dog, and the dog does not mind. ' * 60
CHECKPOINT_KEYS = {'batch', 'model_state_dict', 'optimizer_state_dict', 'val_loss', 'config'}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def loss_curves(monkeypatch, request):
    """Drawn where a test asks for them: they take half the time of a run as small as these."""
    if 'plotted' not in request.fixturenames:
        monkeypatch.setattr(metrics, '_draw', lambda folder: None)


@pytest.fixture
def plotted():
    """A test that asks for this has its loss curves drawn."""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / 'text.bin'
    path.write_bytes(TEXT)
    return path


def options(data, folder, **settings):
    words = []
    for name, value in {**TINY, 'DATA': data, 'RUN_DIR': folder, **settings}.items():
        flag = '--' + name.lower().replace('_', '-')
        if isinstance(value, bool):
            words.append(flag if value else flag.replace('--', '--no-', 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def start(words, *program, folder=ROOT):
    """The script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, program), *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )


def load(path):
    return torch.load(path, weights_only=True)


def sampled(folder):
    """The steps of the samples in the order of the file."""
    return [
        int(step) for step in re.findall(r'^--- sample after (\d+) steps$', (folder / 'samples.txt').read_text(), re.M)
    ]


def refusal(words):
    """The one line with which the script ends instead of running."""
    with pytest.raises(SystemExit) as ended:
        train_mac.main([*map(str, words)])
    assert isinstance(ended.value.code, str)  # a message, and with it the exit status 1
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code


def rows(folder, key):
    return {row['step']: row for row in read_metrics(folder / 'metrics.jsonl') if key in row}


def assert_same(first, second):
    """Equal bit for bit, through dicts, lists and tuples."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_same(one, other)
    else:
        assert first == second


# what a run leaves ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_plot_samples_and_checkpoints(plotted, text, tmp_path, capsys):
    folder = tmp_path / 'run'
    assert (
        train_mac.main(options(text, folder, NUM_BATCHES=30, VALIDATE_EVERY=10, GENERATE_EVERY=15, CHECKPOINT_EVERY=10))
        == 0
    )
    training, validation = rows(folder, 'train_loss'), rows(folder, 'val_loss')
    assert list(training) == list(range(1, 31))
    assert list(validation) == [0, 10, 20, 30]
    for row in training.values():
        assert row['bpb'] == pytest.approx(row['train_loss'] / math.log(2))
        assert row['tokens_per_second'] * row['seconds'] == pytest.approx(2 * 24)
    assert validation[0]['bpb'] == pytest.approx(8, abs=0.7)  # an untrained model knows nothing about a byte
    assert validation[30]['bpb'] < validation[10]['bpb'] < validation[0]['bpb'] - 1

    assert (folder / 'loss.png').read_bytes().startswith(b'\x89PNG')
    samples = (folder / 'samples.txt').read_text(encoding='utf-8')
    assert samples.count('--- sample after') == 2
    prompt = samples.split('\n')[1]
    assert prompt.encode() in TEXT
    assert len(prompt) == 8

    names = {f'checkpoint_batch_{batch}.pt': batch for batch in (10, 20, 30)} | {'titans_enwik8.pt': 30}
    assert {path.name for path in folder.glob('*.pt')} == {*names, 'titans_enwik8_best.pt'}
    assert not list(folder.glob('*.tmp'))
    for name, batch in names.items():
        checkpoint = load(folder / name)
        assert set(checkpoint) >= CHECKPOINT_KEYS
        assert checkpoint['batch'] == batch
        assert checkpoint['val_loss'] == validation[batch]['val_loss']
    best = load(folder / 'titans_enwik8_best.pt')
    assert best['val_loss'] == min(row['val_loss'] for row in validation.values())

    # the configuration in a checkpoint builds the model, and the model has the loss that was reported
    config = train_mac.Config(**checkpoint['config'])
    assert config.NEURAL_MEM_LAYERS == (1,)
    model = train_mac.build_model(config)
    model.load_state_dict(checkpoint['model_state_dict'])
    valid = train_mac.load_data(config).valid
    assert train_mac.validate(model, valid, config, train_mac.choose_machine(config)) == checkpoint['val_loss']

    output = capsys.readouterr().out
    assert 'quick preset on cpu, fp32, FlexAttention off, accelerated scan off' in output
    assert f'best validation {best["val_loss"] / math.log(2):.4f} bits per byte' in output


def test_accumulated_gradients_are_those_of_one_large_batch(text, tmp_path):
    losses = []
    for name, sizes in (('large', (4, 1)), ('small', (1, 4))):
        train_mac.main(
            options(
                text,
                tmp_path / name,
                NUM_BATCHES=3,
                LEARNING_RATE=1e-3,
                BATCH_SIZE=sizes[0],
                GRADIENT_ACCUMULATE_EVERY=sizes[1],
            )
        )
        losses.append([row['train_loss'] for row in rows(tmp_path / name, 'train_loss').values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_order_of_windows_depends_on_the_data_seed_only(text, tmp_path, monkeypatch):
    seen, draw = [], train_mac.random_starts

    def record(*args):
        starts = draw(*args)
        seen.append(windows(args[0], starts, TINY['SEQ_LEN'] + 1))
        return starts

    monkeypatch.setattr(train_mac, 'random_starts', record)
    for name, settings in (('a', {}), ('b', {'SEED': 5, 'DIM': 24}), ('c', {'DATA_SEED': 5})):
        train_mac.main(options(text, tmp_path / name, NUM_BATCHES=2, **settings))
    assert_same(seen[:2], seen[2:4])
    assert not torch.equal(seen[0], seen[4])
    assert all(bytes(window.tolist()) in TEXT for window in seen[0])


def test_a_new_run_moves_the_earlier_one_aside(text, tmp_path, capsys):
    folder = tmp_path / 'run'
    for _ in range(2):
        train_mac.main(options(text, folder, NUM_BATCHES=1))
    assert list(rows(folder, 'train_loss')) == list(rows(folder / 'earlier-1', 'train_loss')) == [1]
    assert load(folder / 'earlier-1' / 'titans_enwik8.pt')['batch'] == 1
    assert 'earlier-1' in capsys.readouterr().out


def test_weights_and_biases_only_when_asked(text, tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append('finished')
    )
    fake = types.ModuleType('wandb')
    fake.__spec__ = types.SimpleNamespace()
    fake.init = lambda **kwargs: calls.append(kwargs) or run
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    train_mac.main(options(text, tmp_path / 'without', NUM_BATCHES=1))
    assert calls == []
    folder = tmp_path / 'with'
    train_mac.main(options(text, folder, NUM_BATCHES=1, WANDB=True, RUN_NAME='mine'))
    first = calls[0]
    assert first['name'] == 'mine'
    assert first['config']['DIM'] == 16
    assert [step for step, row in calls[1:-1] if 'train_loss' in row] == [1]
    assert calls[-1] == 'finished'

    # a resumed run goes on there, a new one does not
    calls.clear()
    train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '2'])
    assert (calls[0]['id'], calls[0]['resume']) == (first['id'], 'allow')
    calls.clear()
    train_mac.main(options(text, folder, NUM_BATCHES=1, WANDB=True))
    assert calls[0]['id'] != first['id']


def test_the_plot_is_redrawn_at_validations(text, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_mac.LossCurve, 'draw', lambda curve: drawn.append(len(rows(curve.folder, 'val_loss'))))
    train_mac.main(options(text, tmp_path / 'run', NUM_BATCHES=4, VALIDATE_EVERY=2))
    assert drawn == [1, 2, 3, 3]


def test_the_folder_describes_its_model(text, tmp_path):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=1))
    described = json.loads((folder / 'config.json').read_text())
    model = configuration.build_model(described['model'])
    model.load_state_dict(load(folder / 'titans_enwik8.pt')['model_state_dict'])
    assert described['vocabulary'] == {'kind': 'bytes'}
    assert train_mac.Config(**described['settings']).DIM == 16
    (folder / 'config.json').unlink()  # as in a run of an earlier version
    train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '2'])
    assert json.loads((folder / 'config.json').read_text())['model'] == described['model']


def test_a_vocabulary_of_its_own(text, tmp_path):
    """It is in the checkpoint, from which the run goes on; the loss is in bits per byte all the same."""
    pytest.importorskip('tokenizers')
    folder = tmp_path / 'run'
    text.write_bytes(TEXT * 3)
    words = {'VOCABULARY': 'bpe', 'VOCABULARY_SIZE': 280, 'LEARNING_RATE': 0.0}
    train_mac.main(options(text, folder, NUM_BATCHES=1, **words))
    checkpoint = load(folder / 'titans_enwik8.pt')
    vocabulary = vocabulary_from_dict(checkpoint['vocabulary'])
    assert checkpoint['config']['VOCABULARY_SIZE'] == vocabulary.size == 280
    assert checkpoint['model_state_dict']['token_emb.weight'].shape[0] == 280
    valid = train_mac.load_data(train_mac.Config(**checkpoint['config'])).valid
    size = len(vocabulary.decode(valid.long()))
    for row in rows(folder, 'val_loss').values():
        assert row['bpb'] == pytest.approx(row['val_loss'] / math.log(2) * len(valid) / size)
    shutil.rmtree(tmp_path / 'cache')
    assert train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '2']) == 0
    assert_same(load(folder / 'titans_enwik8.pt')['vocabulary'], checkpoint['vocabulary'])
    prompt = (folder / 'samples.txt').read_text(encoding='utf-8').split('\n')[1]
    assert prompt.encode() in TEXT * 3


def test_weights_belong_to_their_vocabulary(text, tmp_path):
    pytest.importorskip('tokenizers')
    text.write_bytes(TEXT * 3)
    other = tmp_path / 'other.bin'
    other.write_bytes(TEXT.swapcase() * 3)
    words = {'VOCABULARY': 'bpe', 'VOCABULARY_SIZE': 280, 'NUM_BATCHES': 1}
    train_mac.main(options(text, tmp_path / 'run', **words))
    first = tmp_path / 'run' / 'titans_enwik8.pt'
    train_mac.main([*options(other, tmp_path / 'next', **words), '--init-from', str(first)])
    assert_same(load(tmp_path / 'next' / 'titans_enwik8.pt')['vocabulary'], load(first)['vocabulary'])
    message = refusal([*options(other, tmp_path / 'bytes', NUM_BATCHES=1), '--init-from', first])
    assert 'VOCABULARY must be that of the weights in --init-from' in message
    message = refusal(['--resume', first, '--vocabulary', 'bytes'])
    assert 'VOCABULARY must stay bpe' in message


def test_an_unknown_vocabulary_is_refused_in_one_line(text, tmp_path):
    assert '/nowhere.json cannot be used' in refusal(options(text, tmp_path / 'run', VOCABULARY='nowhere.json'))


def test_a_vocabulary_smaller_than_the_bytes_is_refused(text, tmp_path):
    words = options(text, tmp_path / 'run', VOCABULARY='bpe', VOCABULARY_SIZE=100)
    assert refusal(words) == 'VOCABULARY_SIZE must be at least 256, got 100'


def test_sharding_is_refused_where_it_cannot_work(text, tmp_path):
    assert 'FSDP must be started by torchrun' in refusal(options(text, tmp_path / 'run', FSDP=True))
    assert 'FSDP cannot go with' in refusal(options(text, tmp_path / 'run', FSDP=True, USE_CUDA_GRAPHS=True))
    assert not (tmp_path / 'run').exists()


def test_a_cache_that_cannot_be_written_to_is_named(text, tmp_path):
    packed = tmp_path / 'text.gz'
    packed.write_bytes(gzip.compress(TEXT))
    message = refusal(options(packed, tmp_path / 'run', CACHE_DIR=text / 'cache'))
    assert message.startswith('the run cannot continue: ') and str(text / 'cache') in message


def test_without_matplotlib_there_is_a_notice_and_no_plot(plotted, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert train_mac.main(options(text, tmp_path / 'run', NUM_BATCHES=1)) == 0
    assert 'matplotlib is not installed' in capsys.readouterr().out
    assert not (tmp_path / 'run' / 'loss.png').exists()


def test_a_folder_named_like_mathematics_is_plotted(plotted, text, tmp_path, capsys):
    folder = tmp_path / 'cost$5_{a$'
    assert train_mac.main(options(text, folder, NUM_BATCHES=1)) == 0
    assert (folder / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert 'no loss curve' not in capsys.readouterr().out


@pytest.mark.parametrize('error', [RuntimeError('broken'), OSError('no such font'), ImportError('libfreetype')])
def test_a_plotting_error_never_ends_a_run(plotted, text, tmp_path, monkeypatch, capsys, error):
    from matplotlib.font_manager import FontManager

    def broken_font_cache(*args, **kwargs):
        raise error

    monkeypatch.setattr(FontManager, 'findfont', broken_font_cache)
    assert train_mac.main(options(text, tmp_path / 'run', NUM_BATCHES=2, GENERATE_EVERY=1)) == 0
    assert f'no loss curve was drawn: {type(error).__name__}: {error}' in capsys.readouterr().out
    assert load(tmp_path / 'run' / 'titans_enwik8.pt')['batch'] == 2


# one run in one folder ------------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(text, tmp_path):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=1))
    (folder / 'half.pt.1.titans.tmp').write_bytes(b'an unfinished save of the first run')
    (folder / 'own.tmp').mkdir()
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    checkpoint = folder / 'titans_enwik8.pt'
    with train_mac.run_lock(folder):
        for words in (options(text, folder), ['--resume', 'latest', '--run-dir', folder], ['--resume', checkpoint]):
            assert f'another run is using {folder}' in refusal(words)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == content
    assert train_mac.main(['--resume', str(checkpoint), '--num-batches', '2']) == 0
    assert not list(folder.glob('*.titans.tmp')) and (folder / 'own.tmp').exists()


def test_without_locks_there_is_a_notice(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    assert train_mac.main(options(text, tmp_path / 'run', NUM_BATCHES=1)) == 0
    assert 'cannot be locked' in capsys.readouterr().out


def test_a_folder_that_cannot_hold_a_run(text, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('mine')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        assert str(folder) in refusal(options(text, folder))
    assert str(tmp_path / 'file') in refusal(['--resume', 'latest', '--run-dir', tmp_path / 'file'])
    assert (tmp_path / 'file').read_text() == 'mine'

    real_open, lock = open, tmp_path / 'read-only' / 'lock'

    def open_read_only(path, *args, **kwargs):
        if path == lock:  # permissions do not stop root
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real_open(path, *args, **kwargs)

    lock.parent.mkdir()
    monkeypatch.setattr('builtins.open', open_read_only)
    assert f"Permission denied: '{lock}'" in refusal(options(text, lock.parent))


# resume ---------------------------------------------------------------------------------------------------------------


def test_twenty_steps_are_ten_and_a_resume_and_ten(text, tmp_path):
    busy = {'VALIDATE_EVERY': 5, 'GENERATE_EVERY': 4}
    model = {'DEPTH': 2, 'NEURAL_MEM_LAYERS': (1, 2)}
    train_mac.main(options(text, tmp_path / 'whole', NUM_BATCHES=20, **busy, **model))
    train_mac.main(options(text, tmp_path / 'quiet', NUM_BATCHES=10, **model))
    train_mac.main(options(text, tmp_path / 'parts', NUM_BATCHES=10, **busy, **model))
    torch.manual_seed(7), random.seed(7)  # a resume must not depend on what was before it
    folder = tmp_path / 'parts'
    half, quiet = load(folder / 'titans_enwik8.pt'), load(tmp_path / 'quiet' / 'titans_enwik8.pt')
    assert train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '20']) == 0

    whole, parts = load(tmp_path / 'whole' / 'titans_enwik8.pt'), load(folder / 'titans_enwik8.pt')
    for key in set(whole) - {'config'}:
        assert_same(whole[key], parts[key])
    assert {**whole['config'], 'RUN_DIR': ''} == {**parts['config'], 'RUN_DIR': ''}

    # nor do validation and samples touch what training draws
    for key in ('model_state_dict', 'optimizer_state_dict', 'random', 'windows_random', 'val_loss'):
        assert_same(half[key], quiet[key])

    for key in ('train_loss', 'val_loss'):
        first, second = (
            {step: row[key] for step, row in rows(tmp_path / name, key).items()} for name in ('whole', 'parts')
        )
        assert first == second


def test_resume_at_an_older_checkpoint_takes_back_the_later_metrics(text, tmp_path):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=6, CHECKPOINT_EVERY=3))
    before = rows(folder, 'train_loss')
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 7, "trai')  # as a kill leaves it
    train_mac.main(['--resume', str(folder / 'checkpoint_batch_3.pt'), '--num-batches', '5', '--learning-rate', '0.02'])
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines if 'train_loss' in line] == [1, 2, 3, 4, 5]
    after = rows(folder, 'train_loss')
    assert after[4]['train_loss'] == before[4]['train_loss']
    assert after[5]['train_loss'] != before[5]['train_loss']  # the other learning rate
    final = load(folder / 'titans_enwik8.pt')
    assert final['optimizer_state_dict']['param_groups'][0]['lr'] == final['config']['LEARNING_RATE'] == 0.02
    assert final['config']['CHECKPOINT_EVERY'] == 3
    # what opens the run later reads the same settings
    settings = json.loads((folder / 'config.json').read_text())['settings']
    assert (settings['LEARNING_RATE'], settings['NUM_BATCHES']) == (0.02, 5)


def test_a_run_that_goes_back_takes_its_new_course(text, tmp_path, capsys):
    """Checkpoints of the course that it left are kept apart, so that `latest` is one of the new course."""
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=6, CHECKPOINT_EVERY=2))
    train_mac.main(['--resume', str(folder / 'checkpoint_batch_2.pt'), '--num-batches', '3', '--learning-rate', '0.02'])
    aside = {path.name for path in (folder / 'earlier-1').iterdir()}
    assert {'checkpoint_batch_4.pt', 'checkpoint_batch_6.pt', 'titans_enwik8.pt'} <= aside
    capsys.readouterr()
    train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '4'])
    assert 'resumed after 3 steps' in capsys.readouterr().out
    assert list(rows(folder, 'train_loss')) == [1, 2, 3, 4]
    assert load(folder / 'titans_enwik8.pt')['config']['LEARNING_RATE'] == 0.02


@pytest.mark.parametrize('change', [{'BATCH_SIZE': 3}, {'SEQ_LEN': 16}, {'DATA': 'other.txt'}])
def test_the_best_checkpoint_of_other_validation_windows_is_kept_apart(text, tmp_path, change):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=2, VALIDATE_EVERY=1))
    best = (folder / train_mac.BEST).read_bytes()
    if 'DATA' in change:
        change = {'DATA': tmp_path / change['DATA']}
        change['DATA'].write_bytes(TEXT + b'more')
    for steps in ('3', '4'):
        words = options(text, folder, NUM_BATCHES=steps, VALIDATE_EVERY=1, **change)
        train_mac.main(['--resume', 'latest', *words])
        assert (folder / 'earlier-1' / train_mac.BEST).read_bytes() == best
        assert (folder / train_mac.BEST).exists()
        assert not (folder / 'earlier-2').exists()  # the windows did not change again


def test_a_run_that_goes_on_in_the_folder_of_another_keeps_that_apart(text, tmp_path):
    for name in ('one', 'other'):
        train_mac.main(options(text, tmp_path / name, NUM_BATCHES=2, CHECKPOINT_EVERY=1))
    before = (tmp_path / 'other' / 'metrics.jsonl').read_bytes()
    words = ['--resume', str(tmp_path / 'one' / 'checkpoint_batch_1.pt'), '--num-batches', '2']
    # its own folder by another path
    train_mac.main([*words, '--run-dir', str(tmp_path / 'other' / '..' / 'one')])
    assert list(rows(tmp_path / 'one', 'train_loss')) == [1, 2]
    train_mac.main([*words, '--run-dir', str(tmp_path / 'other')])
    assert (tmp_path / 'other' / 'earlier-1' / 'metrics.jsonl').read_bytes() == before
    assert list(rows(tmp_path / 'other', 'train_loss')) == [2]


def test_resuming_a_folder_goes_on_from_its_newest_checkpoint(text, tmp_path):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=2, CHECKPOINT_EVERY=1))
    assert train_mac.main(['--resume', str(folder), '--num-batches', '3']) == 0
    assert list(rows(folder, 'train_loss')) == [1, 2, 3]
    (empty := tmp_path / 'empty').mkdir()
    assert f'there is no checkpoint to resume in {empty}' in refusal(['--resume', empty])
    assert f'--init-from must name a file, and {folder} is a folder' in refusal(['--init-from', folder])


def test_a_path_that_is_not_there_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'there is no checkpoint to resume: nowhere does not exist' in refusal(['--resume', 'nowhere'])
    assert not [*tmp_path.iterdir()]


def test_a_run_that_is_refused_leaves_no_lock_behind(text, tmp_path):
    (tmp_path / 'empty').mkdir()
    before = [*tmp_path.rglob('*')]
    for path in (text, tmp_path / 'empty'):
        refusal(['--resume', path])
    assert [*tmp_path.rglob('*')] == before
    with train_mac.run_lock(tmp_path / 'new'):
        refusal(['--resume', 'latest', '--run-dir', tmp_path / 'new'])
        assert (tmp_path / 'new' / 'lock').exists()  # that of the other


def test_what_a_checkpoint_decides_cannot_be_chosen(text, tmp_path):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=1))
    path = folder / 'titans_enwik8.pt'
    assert '--preset cannot go with --resume PATH' in refusal(['--resume', path, '--preset', 'quick'])
    assert 'DATA_SEED must stay 0 in the run that is resumed, not 3' in refusal(['--resume', path, '--data-seed', '3'])
    message = refusal(['--resume', path, '--dim', '32', '--num-batches', '5', '--learning-rate', '0.1'])
    assert f'do not fit --dim (now 32, saved with {TINY["DIM"]}): RuntimeError' in message
    # the saved depth does not go with the layers that are given
    message = refusal(['--resume', path, '--depth', '2', '--neural-mem-layers', '2'])
    assert 'do not fit --neural-mem-layers (now (2,), saved with (1,)): RuntimeError' in message


def test_a_run_that_has_all_its_steps_says_that_nothing_was_trained(text, tmp_path, capsys):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=2))
    assert 'done: 2 steps, best' in capsys.readouterr().out
    for steps in (1, 2):
        assert train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', str(steps)]) == 0
        expected = f'nothing was trained, as there were 2 steps and NUM_BATCHES is {steps}'
        assert expected in capsys.readouterr().out
    assert list(rows(folder, 'train_loss')) == [1, 2]


def test_a_run_finds_its_data_from_another_folder(text, tmp_path, monkeypatch):
    folder = tmp_path / 'run'
    monkeypatch.chdir(text.parent)
    train_mac.main(options(text.name, folder, NUM_BATCHES=1))
    monkeypatch.chdir(tmp_path)
    assert train_mac.main(['--resume', str(folder), '--num-batches', '2']) == 0
    assert json.loads((folder / 'config.json').read_text())['settings']['DATA'] == [str(text)]


def test_the_best_validation_is_one_of_the_same_windows(text, tmp_path):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=1))
    checkpoint = folder / 'titans_enwik8.pt'
    content = load(checkpoint)
    checkpoints.write_checkpoint(checkpoint, {**content, 'best_val_loss': 0.1})
    train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '2'])
    assert load(checkpoint)['best_val_loss'] == 0.1
    more = str(content['config']['SEQ_LEN'] + 1)
    train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '3', '--seq-len', more])
    after = load(checkpoint)
    assert after['best_val_loss'] == after['val_loss'] > 0.1


def test_a_checkpoint_keeps_the_model_that_it_was_trained_as(text, tmp_path):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=1))
    rate = load(folder / 'titans_enwik8.pt')['config']['NEURAL_MEM_MAX_LR']
    (folder / 'titans_enwik8.pt').rename(folder / 'before.pt')
    words = ['--num-batches', '2', '--neural-mem-max-lr', str(2 * rate)]
    train_mac.main(['--resume', str(folder / 'before.pt'), *words])
    for name, expected in (('before.pt', rate), ('titans_enwik8.pt', 2 * rate)):
        model = open_run(folder, name).model
        memory = next(layer.memory for layer in model.layers if layer.memory is not None)
        assert memory.adaptive_step_transform(torch.zeros(())).item() == pytest.approx(expected / 2)


def test_latest_is_the_checkpoint_of_most_steps_whatever_the_file_times(text, tmp_path, capsys):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=4, CHECKPOINT_EVERY=1))
    for age, step in enumerate((2, 1, 3)):
        os.utime(folder / f'checkpoint_batch_{step}.pt', (time.time() + 100 - age,) * 2)
    for name in ('titans_enwik8', 'titans_enwik8_best', 'checkpoint_batch_4'):
        (folder / f'{name}.pt').unlink()
    (folder / 'checkpoint_batch_1.pt').rename(folder / 'checkpoint_batch_9.pt')  # names do not count either
    capsys.readouterr()
    train_mac.main(['--resume', 'latest', '--run-dir', str(folder)])
    assert 'resumed after 3 steps' in capsys.readouterr().out


def test_samples_are_not_repeated_after_a_resume(text, tmp_path):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=6, GENERATE_EVERY=2, CHECKPOINT_EVERY=3))
    once = (folder / 'samples.txt').read_bytes()
    assert sampled(folder) == [2, 4, 6]
    train_mac.main(['--resume', str(folder / 'checkpoint_batch_3.pt')])
    assert (folder / 'samples.txt').read_bytes() == once


def test_a_checkpoint_from_before_its_evaluation_takes_that_back(tmp_path):
    """As a signal during validation leaves one: the next run writes the results, and may be killed in its turn."""
    kept = [{'step': 2, 'val_loss': 1.0}, {'step': 3, 'train_loss': 1.0}, {'step': 4, 'train_loss': 1.0}]
    later = [{'step': 4, 'val_loss': 1.0}, {'step': 5, 'train_loss': 1.0}]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in kept + later))
    samples = [f'--- sample after {step} steps\na\n--- goes on as\n\u00fc\n---\n\n' for step in (2, 4)]
    (tmp_path / 'samples.txt').write_text(''.join(samples), encoding='utf-8')
    rewind(tmp_path, batch=4, evaluated=3)
    assert read_metrics(tmp_path / 'metrics.jsonl') == kept
    assert (tmp_path / 'samples.txt').read_text(encoding='utf-8') == samples[0]


def test_damaged_metrics_are_left_out_with_a_notice(text, tmp_path, capsys):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=2))
    lines = (folder / 'metrics.jsonl').read_bytes().splitlines()
    damaged = [b'\xff\xfe\x00', b'5', b'[1]', b'{"train_loss": 1.0}', b'{"step": "1"}', b'{"step": null}']
    (folder / 'metrics.jsonl').write_bytes(b'\n'.join([*damaged, *lines, b'{"step": 2, "tra']))
    capsys.readouterr()
    assert train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '3']) == 0
    assert f'{folder / "metrics.jsonl"}: 7 damaged lines of {len(lines) + 7} are left out' in capsys.readouterr().out
    assert (folder / 'metrics.jsonl').read_bytes().splitlines()[: len(lines)] == lines
    assert list(rows(folder, 'train_loss')) == [1, 2, 3]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoint')
    (folder / 'text.bin').write_bytes(TEXT)
    train_mac.main(options(folder / 'text.bin', folder / 'run', NUM_BATCHES=1))
    return folder / 'run' / 'titans_enwik8.pt'


def test_flipped_bits_in_a_checkpoint_are_detected(tmp_path, checkpoint):
    stored = checkpoint.read_bytes()
    # the archive has a checksum for each file in it, but not for its own headers: all bits of one of these, the digest
    # with what is around it, and some hundred bits anywhere
    header = stored.index(b'PK\1\2', stored.index(b'PK\1\2') + 1000)
    bits = [*range(8 * header, 8 * (header + 46)), *range(8 * (len(stored) - 80), 8 * len(stored), 3)]
    bits += random.Random(0).sample(range(8 * len(stored)), 400)
    expected, damaged, refused = load(checkpoint), tmp_path / 'damaged.pt', 0
    for bit in bits:
        content = bytearray(stored)
        content[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(content)
        try:
            assert_same(train_mac.read_checkpoint(damaged), expected)
        except train_mac.BadCheckpoint as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert refused == len(bits)


def test_the_digest_leaves_a_checkpoint_a_valid_archive(checkpoint):
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    stored = checkpoint.read_bytes()
    assert comment == b'sha256 ' + hashlib.sha256(stored[:-64]).hexdigest().encode()
    assert stored.endswith(comment)
    assert load(checkpoint)['batch'] == 1


def test_a_checkpoint_without_a_digest_can_be_resumed(tmp_path, checkpoint):
    content = load(checkpoint)
    torch.save(content, tmp_path / 'older.pt')  # as earlier versions of the script wrote it
    assert_same(train_mac.read_resumable(tmp_path / 'older.pt'), content)
    assert train_mac.main(['--resume', str(tmp_path / 'older.pt'), '--num-batches', '2']) == 0
    assert load(tmp_path / 'titans_enwik8.pt')['batch'] == 2


def test_a_run_can_go_on_in_another_folder(tmp_path, checkpoint):
    before, folder = checkpoint.read_bytes(), tmp_path / 'new' / 'run'
    assert train_mac.main(['--resume', str(checkpoint), '--run-dir', str(folder), '--num-batches', '3']) == 0
    assert list(rows(folder, 'train_loss')) == [2, 3]
    assert load(folder / 'titans_enwik8.pt')['config']['RUN_DIR'] == str(folder)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize('key', checkpoints.RESUMABLE)
def test_a_checkpoint_that_lacks_a_key_is_refused_in_one_line(tmp_path, checkpoint, key):
    content, path = load(checkpoint), tmp_path / 'incomplete.pt'
    for changed in ({k: v for k, v in content.items() if k != key}, {**content, key: b'nonsense'}):
        torch.save(changed, path)
        message = refusal(['--resume', path])
        assert str(path) in message
        assert f'lacks {key};' in message
        assert 'no checkpoint to resume' in refusal(['--resume', 'latest', '--run-dir', tmp_path])


def test_content_that_does_not_fit_is_refused_in_one_line(tmp_path, checkpoint):
    content, path = load(checkpoint), tmp_path / 'unfit.pt'
    changes = {
        'model_state_dict': ({}, {1: 2}, {**content['model_state_dict'], 'more': torch.zeros(1)}),
        'optimizer_state_dict': ({}, {'state': {}, 'param_groups': []}),
        'config': ({**content['config'], 'DIM': 'wide'}, {**content['config'], 'NEURAL_MEM_LAYERS': ('a',)}),
        'random': (torch.zeros(3),),
        'python_random': ((1,),),
        'windows_random': (torch.zeros(3, dtype=torch.uint8),),
    }
    for key, values in changes.items():
        for value in values:
            torch.save({**content, key: value}, path)
            message = refusal(['--resume', path])
            assert any(word in message for word in ('do not fit', 'DIM must', 'NEURAL_MEM_LAYERS must')), message


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'text', 'empty'])
def test_a_corrupt_checkpoint_is_refused_by_path_and_skipped_by_latest(text, tmp_path, capsys, damage):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=2, CHECKPOINT_EVERY=1))
    for name in ('titans_enwik8.pt', 'titans_enwik8_best.pt'):
        (folder / name).unlink()
    newest = folder / 'checkpoint_batch_2.pt'
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({'truncated': content[:-1000], 'flipped': content, 'text': b'hello', 'empty': b''}[damage])
    with pytest.raises(SystemExit, match=r'checkpoint_batch_2\.pt is corrupt'):
        train_mac.main(['--resume', str(newest)])
    capsys.readouterr()
    assert train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '2']) == 0
    output = capsys.readouterr().out
    assert 'skipped: ' in output
    assert 'resumed after 1 steps' in output
    assert load(newest)['batch'] == 2  # made again


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(SystemExit, match='no checkpoint to resume'):
        train_mac.main(['--resume', 'latest', '--run-dir', str(tmp_path)])
    with pytest.raises(SystemExit, match='there is no checkpoint'):
        train_mac.main(['--resume', str(tmp_path / 'absent.pt')])


def test_init_from_takes_weights_and_nothing_else(text, tmp_path):
    train_mac.main(options(text, tmp_path / 'first', NUM_BATCHES=2))
    source = tmp_path / 'first' / 'titans_enwik8.pt'
    bare = tmp_path / 'bare.pt'
    torch.save(load(source)['model_state_dict'], bare)
    for path in (source, bare):
        folder = tmp_path / path.stem
        train_mac.main([*options(text, folder, NUM_BATCHES=1, SEED=3, LEARNING_RATE=0.0), '--init-from', str(path)])
        final = load(folder / 'titans_enwik8.pt')
        assert_same(final['model_state_dict'], load(source)['model_state_dict'])
        assert final['batch'] == 1
        assert final['optimizer_state_dict']['state'][0]['step'] == 1
    with pytest.raises(SystemExit, match='--init-from'):
        train_mac.main(['--resume', str(bare)])
    with pytest.raises(SystemExit, match='do not fit'):
        train_mac.main([*options(text, tmp_path / 'other', DIM=24), '--init-from', str(bare)])
    assert not (tmp_path / 'other').exists()


# kills, signals, bad numbers ------------------------------------------------------------------------------------------

# two runs, each killed in a save of its own; forked, so that modules are imported once
KILLED = """
import contextlib, os, signal, sys, train_mac
from titans_pytorch.training import checkpoints
real_atomic_file, real_replace, where = checkpoints.atomic_file, os.replace, None
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
class Killer:
    def __init__(self, file):
        self.file = file
    def write(self, content):
        self.file.write(content[:len(content) // 2])
        self.file.flush()
        kill()
@contextlib.contextmanager
def atomic_file(path):
    with real_atomic_file(path) as file:
        again = path.exists() and path.name == 'titans_enwik8_best.pt'
        yield Killer(file) if where == 'write' and again else file
def replace(source, target):
    if where == 'replace' and os.path.exists(target) and target.name == 'titans_enwik8_best.pt':
        kill()
    real_replace(source, target)
checkpoints.atomic_file, os.replace = atomic_file, replace
for where in ('write', 'replace'):
    if not (run := os.fork()):
        train_mac.main([*sys.argv[1:], '--run-dir', where])
        os._exit(0)
    print('status', os.waitpid(run, 0)[1])
"""


def test_kill_in_a_save_leaves_the_last_good_checkpoint(text, tmp_path, capsys):
    words = options(text, tmp_path, NUM_BATCHES=6, VALIDATE_EVERY=2, GENERATE_EVERY=2, CHECKPOINT_EVERY=2)
    output, _ = start(words, '-c', KILLED, folder=tmp_path).communicate(timeout=120)
    assert output.count(f'status {signal.SIGKILL:d}\n') == 2, output
    for where in ('write', 'replace'):
        folder = tmp_path / where
        (unfinished,) = folder.glob('*.tmp')
        assert unfinished.stat().st_size > 0
        assert (folder / 'lock').exists()  # left behind, but no longer locked
        assert sampled(folder) == [2, 4]
        assert load(folder / 'titans_enwik8_best.pt')['batch'] == 2  # the one that was being written over
        assert {path.name for path in folder.glob('*.pt')} == {'titans_enwik8_best.pt', 'checkpoint_batch_2.pt'}
        assert train_mac.main(['--resume', 'latest', '--run-dir', str(folder)]) == 0
        assert 'resumed after 2 steps' in capsys.readouterr().out
        assert not list(folder.glob('*.tmp'))
        assert list(rows(folder, 'train_loss')) == [1, 2, 3, 4, 5, 6]
        assert sampled(folder) == [2, 4, 6]
        assert load(folder / 'titans_enwik8.pt')['batch'] == 6


def assert_saved_and_ended(folder, number, status, output):
    assert status == 128 + number, output
    batch = max(rows(folder, 'train_loss'))
    assert f'ended by {number.name} after {batch} steps; go on with --resume latest' in output
    assert [path.name for path in folder.glob('*.pt')] == [f'checkpoint_batch_{batch}.pt']
    assert load(folder / f'checkpoint_batch_{batch}.pt')['batch'] == batch
    assert (folder / 'loss.png').exists()


def test_a_signal_ends_the_script(text, tmp_path):
    folder, deadline = tmp_path / 'run', time.monotonic() + 60
    process = start(options(text, folder, NUM_BATCHES=100_000), ROOT / 'train_mac.py')
    while len(rows(folder, 'train_loss')) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert_saved_and_ended(folder, signal.SIGINT, process.returncode, output)
    assert 'SIGINT: this step is finished and saved; a second signal ends the run at once' in output


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(plotted, text, tmp_path, monkeypatch, capsys, number):
    folder = tmp_path / 'run'
    in_the_step_after(monkeypatch, 3, folder, lambda: os.kill(os.getpid(), number))
    status = train_mac.main(options(text, folder, NUM_BATCHES=100_000, GRADIENT_ACCUMULATE_EVERY=2))
    assert_saved_and_ended(folder, number, status, capsys.readouterr().out)


def test_a_signal_breaks_off_validation_which_is_done_again_after_the_resume(text, tmp_path, monkeypatch):
    folder, validate = tmp_path / 'run', train_mac.validate

    def interrupted(model, data, config, machine):
        loss = validate(model, data, config, machine)
        if len(rows(folder, 'train_loss')) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(train_mac, 'validate', interrupted)
    before = signal.getsignal(signal.SIGTERM)
    settings = {'NUM_BATCHES': 4, 'VALIDATE_EVERY': 2}
    assert train_mac.main(options(text, folder, **settings)) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(rows(folder, 'val_loss')) == [0]
    monkeypatch.undo()
    train_mac.main(['--resume', 'latest', '--run-dir', str(folder)])
    assert list(rows(folder, 'val_loss')) == [0, 2, 4]
    train_mac.main(options(text, tmp_path / 'whole', **settings))
    whole, parts = load(tmp_path / 'whole' / 'titans_enwik8.pt'), load(folder / 'titans_enwik8.pt')
    for key in set(whole) - {'config'}:
        assert_same(whole[key], parts[key])
    best, best_of_parts = (load(place / 'titans_enwik8_best.pt') for place in (tmp_path / 'whole', folder))
    assert best['batch'] == best_of_parts['batch']


def test_a_step_that_fails_halfway_is_not_saved(text, tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def failing(self, *args, **kwargs):
        calls.append(step(self, *args, **kwargs))
        if len(calls) == 2:
            raise RuntimeError('out of memory')

    monkeypatch.setattr(torch.optim.AdamW, 'step', failing)
    with pytest.raises(RuntimeError, match='out of memory'):
        train_mac.main(options(text, tmp_path / 'run', NUM_BATCHES=4))
    assert not list((tmp_path / 'run').glob('*.pt'))


def test_the_best_checkpoint_of_a_course_that_was_left_is_not_the_best(text, tmp_path, capsys):
    folder = tmp_path / 'run'
    train_mac.main(options(text, folder, NUM_BATCHES=4, VALIDATE_EVERY=2, CHECKPOINT_EVERY=2))
    assert load(folder / 'titans_enwik8_best.pt')['batch'] == 4
    words = ['--resume', str(folder / 'checkpoint_batch_2.pt'), '--run-dir', str(folder), '--learning-rate', '0']
    train_mac.main(words)
    assert load(folder / 'titans_enwik8_best.pt')['batch'] == 4
    assert load(folder / 'titans_enwik8_best.pt')['val_loss'] == load(folder / 'titans_enwik8.pt')['val_loss']


def test_a_second_signal_does_not_wait_for_the_step(text, tmp_path, monkeypatch):
    folder, draw = tmp_path / 'run', train_mac.random_starts

    def interrupted(*args):
        if len(rows(folder, 'train_loss')) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(train_mac, 'random_starts', interrupted)
    assert train_mac.main(options(text, folder)) == 128 + signal.SIGINT
    assert not list(folder.glob('*.pt'))


@pytest.mark.parametrize('where', ['loss', 'gradient', 'weights', 'validation'])
def test_numbers_that_are_not_finite_end_the_run_and_are_never_saved(text, tmp_path, monkeypatch, where):
    folder, build, generate = tmp_path / 'run', train_mac.build_model, train_mac.generate
    model = None

    def poison(parameter):
        with torch.no_grad():
            parameter.view(-1)[0] = math.nan

    def build_and_keep(config):
        nonlocal model
        model = build(config)
        if where in ('loss', 'gradient'):
            forward = model.forward

            def bad_forward(*args, **kwargs):
                loss = forward(*args, **kwargs)
                if torch.is_grad_enabled() and len(rows(folder, 'train_loss')) == 4:
                    weight = next(model.parameters())
                    loss = loss * math.nan if where == 'loss' else loss + (weight - weight.detach()).sum().sqrt()
                return loss

            model.forward = bad_forward
        return model

    def generate_and_poison(*args):
        sample = generate(*args)
        if args[-1] == 4 and where in ('weights', 'validation'):
            poison(model.to_logits.weight)
        return sample

    monkeypatch.setattr(train_mac, 'build_model', build_and_keep)
    monkeypatch.setattr(train_mac, 'generate', generate_and_poison)
    if where == 'validation':  # the weights go bad at step 4, and step 5 would notice if there were one
        monkeypatch.setattr(
            train_mac,
            'validate',
            lambda *args: math.nan if args[2].SEQ_LEN and len(rows(folder, 'train_loss')) == 4 else 5.0,
        )
    with pytest.raises(SystemExit, match='NEURAL_MEM_MAX_LR') as ended:
        train_mac.main(options(text, folder, NUM_BATCHES=8, CHECKPOINT_EVERY=2, VALIDATE_EVERY=2, GENERATE_EVERY=2))
    assert isinstance(ended.value.code, str)  # a message, and with it the exit status 1
    assert 'earlier checkpoints are good' in ended.value.code
    batches = [2] if where in ('weights', 'validation') else [2, 4]
    saved = [load(path) for path in folder.glob('*.pt')]
    assert {checkpoint['batch'] for checkpoint in saved} <= {2, 4}
    assert sorted(int(path.stem.split('_')[-1]) for path in folder.glob('checkpoint_batch_*.pt')) == batches
    assert all(value.isfinite().all() for checkpoint in saved for value in checkpoint['model_state_dict'].values())


def test_checkpoints_that_are_not_there_are_not_called_good(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train_mac, 'validate', lambda *args: math.nan)
    with pytest.raises(SystemExit, match=r'Nothing was saved from this state\. A lower NEURAL_MEM_MAX_LR'):
        train_mac.main(options(text, tmp_path / 'run'))


def in_the_step_after(monkeypatch, steps, folder, act):
    """Let `act` be called when so many steps are done, before the second micro batch of the next."""
    draw, drawn = train_mac.random_starts, []

    def acting(*args):
        drawn.append(len(rows(folder, 'train_loss')))
        if drawn.count(steps) == 2:
            act()
        return draw(*args)

    monkeypatch.setattr(train_mac, 'random_starts', acting)


def assert_goes_on_as_if_nothing_had_happened(text, tmp_path, folder, settings):
    assert train_mac.main(['--resume', 'latest', '--run-dir', str(folder)]) == 0
    train_mac.main(options(text, tmp_path / 'whole', **settings))
    whole, parts = load(tmp_path / 'whole' / 'titans_enwik8.pt'), load(folder / 'titans_enwik8.pt')
    for key in set(whole) - {'config'}:
        assert_same(whole[key], parts[key])


def test_an_error_in_a_step_saves_the_steps_before_it(text, tmp_path, monkeypatch):
    folder, settings = tmp_path / 'run', {'GRADIENT_ACCUMULATE_EVERY': 3}

    def fail():
        raise RuntimeError('something new')

    in_the_step_after(monkeypatch, 2, folder, fail)
    with pytest.raises(RuntimeError, match='something new'):  # with its traceback
        train_mac.main(options(text, folder, **settings))
    assert [path.name for path in folder.glob('*.pt')] == ['checkpoint_batch_2.pt']
    monkeypatch.undo()
    assert_goes_on_as_if_nothing_had_happened(text, tmp_path, folder, settings)
    assert sampled(folder) == [4]


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
@pytest.mark.parametrize('name', ['metrics.jsonl', 'samples.txt'])
def test_a_full_disk_ends_the_run_in_one_line_with_its_steps_saved(text, tmp_path, monkeypatch, name):
    folder, settings = tmp_path / 'run', {'GRADIENT_ACCUMULATE_EVERY': 2, 'GENERATE_EVERY': 3, 'VALIDATE_EVERY': 1}

    def fill_the_disk():
        (folder / name).rename(folder / 'aside') if (folder / name).exists() else None
        (folder / name).symlink_to('/dev/full')

    in_the_step_after(monkeypatch, 2, folder, fill_the_disk)
    message = refusal(options(text, folder, **settings))
    assert f"No space left on device: '{folder / name}'" in message
    assert load(folder / 'checkpoint_batch_3.pt')['batch'] == 3
    assert not list(folder.glob('*.tmp'))
    monkeypatch.undo()
    (folder / name).unlink()
    (folder / 'aside').rename(folder / name) if (folder / 'aside').exists() else None
    assert_goes_on_as_if_nothing_had_happened(text, tmp_path, folder, settings)
    assert sampled(folder) == [3, 4]
    assert list(rows(folder, 'val_loss')) == [0, 1, 2, 3, 4]


def test_a_checkpoint_that_the_disk_has_no_room_for(plotted, text, tmp_path, monkeypatch):
    resource, folder = pytest.importorskip('resource'), tmp_path / 'run'
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    in_the_step_after(monkeypatch, 2, folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
    try:
        message = refusal(options(text, folder, GRADIENT_ACCUMULATE_EVERY=2, CHECKPOINT_EVERY=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'the 4 steps done could not be saved' in message
    assert f"'{folder / 'checkpoint_batch_4.pt'}'" in message
    assert train_mac.read_resumable(folder / 'checkpoint_batch_2.pt')['batch'] == 2
    assert not list(folder.glob('*.tmp'))


# data -----------------------------------------------------------------------------------------------------------------


def test_raw_gz_and_zip_give_the_same_splits(tmp_path):
    content = bytes(random.Random(0).randbytes(4001))
    (tmp_path / 'raw').write_bytes(content)
    (tmp_path / 'packed.gz').write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / 'packed.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('anything', content)
    for name in ('raw', 'packed.gz', 'packed.zip'):
        data = train_mac.load_data(train_mac.Config(DATA=str(tmp_path / name), SEQ_LEN=64))
        assert bytes(data.train.tolist()) == content[:3600]
        assert bytes(data.valid.tolist()) == content[3600:3800]
        assert bytes(data.test.tolist()) == content[3800:]


@pytest.mark.parametrize(
    ('name', 'damage', 'message'),
    [
        ('cut.gz', lambda packed: packed[:-20], 'cannot read'),
        ('flipped.gz', lambda packed: packed[:50] + bytes([packed[50] ^ 8]) + packed[51:], 'cannot read'),
        ('other.gz', lambda packed: b'not gzip at all', 'cannot read'),
        ('other.zip', lambda packed: b'not a zip at all', 'cannot read'),
        ('short.gz', lambda packed: gzip.compress(TEXT[:99]), 'too few: .*: give a smaller --prime-length, or more'),
        ('absent.gz', None, 'cannot read'),
    ],
)
def test_a_bad_data_file_ends_with_its_name(tmp_path, name, damage, message):
    if damage:
        (tmp_path / name).write_bytes(damage(gzip.compress(random.Random(0).randbytes(5000))))
    with pytest.raises(SystemExit, match=message) as ended:
        train_mac.load_data(train_mac.Config(DATA=str(tmp_path / name), SEQ_LEN=64))
    assert name in str(ended.value.code)


def test_text_too_short_for_windows_names_the_option(tmp_path):
    path = tmp_path / 'text'
    path.write_bytes(TEXT[:2000])
    train_mac.load_data(train_mac.Config(DATA=str(path), SEQ_LEN=98, PRIME_LENGTH=98))
    with pytest.raises(SystemExit, match='a window needs at least 101: give a smaller --seq-len, or more text'):
        train_mac.load_data(train_mac.Config(DATA=str(path), SEQ_LEN=99, PRIME_LENGTH=98))


def test_a_zip_of_two_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'two.zip', 'w') as archive:
        archive.writestr('one', TEXT)
        archive.writestr('two', TEXT)
    with pytest.raises(SystemExit, match='holds 2 files'):
        train_mac.load_data(train_mac.Config(DATA=str(tmp_path / 'two.zip')))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A place on this machine to download from, in the stead of the real one; the text is not the real one either."""
    state = types.SimpleNamespace(status=200, body=b'', missing=0, length=None, endless=False, requests=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests += 1
            self.send_response(state.status)
            self.send_header('Content-Length', state.length or str(len(state.body) + state.missing))
            self.end_headers()
            self.wfile.write(state.body)
            with contextlib.suppress(OSError):  # until nobody listens
                while state.endless:
                    self.wfile.write(bytes(1 << 16))

        def log_message(self, *args):
            pass

    listener = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('enwik8', TEXT)
    state.body = packed.getvalue()
    state.folder = tmp_path / 'data'
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(train_mac, 'DATA_FOLDER', state.folder)
    monkeypatch.setattr(enwik8, 'URL', f'http://127.0.0.1:{listener.server_port}/enwik8.zip')
    monkeypatch.setattr(enwik8, 'ZIP_SHA256', hashlib.sha256(state.body).hexdigest())
    monkeypatch.setattr(enwik8, 'SHA256', hashlib.sha256(TEXT).hexdigest())
    yield state
    listener.shutdown()
    listener.server_close()


SMALL = train_mac.Config(SEQ_LEN=32, PRIME_LENGTH=8)


def test_enwik8_is_downloaded_once(server, capsys):
    first = train_mac.load_data(SMALL)
    assert [path.name for path in server.folder.iterdir()] == ['enwik8.gz']
    assert gzip.decompress((server.folder / 'enwik8.gz').read_bytes()) == TEXT
    second = train_mac.load_data(SMALL)
    assert server.requests == 1
    assert_same(list(first), list(second))
    assert bytes(torch.cat(first[:3]).tolist()) == TEXT
    assert 'NOTICE' not in capsys.readouterr().out


@pytest.mark.parametrize('fault', ['flipped', 'cut', 'other text', 'refused'])
def test_a_bad_download_is_an_error_and_leaves_nothing(server, monkeypatch, fault):
    if fault == 'flipped':
        server.body = server.body[:60] + bytes([server.body[60] ^ 1]) + server.body[61:]
    elif fault == 'cut':
        server.body, server.missing = server.body[:-30], 30
    elif fault == 'other text':
        monkeypatch.setattr(enwik8, 'SHA256', '0' * 64)
    else:
        server.status = 503
    with pytest.raises(SystemExit, match={'refused': 'refused'}.get(fault, 'corrupt')) as ended:
        train_mac.load_data(SMALL)
    assert '--data' in str(ended.value.code)
    assert list(server.folder.iterdir()) == []


@pytest.mark.parametrize('large', ['archive', 'text'])
def test_a_download_is_bounded_before_it_is_verified(server, monkeypatch, large):
    if large == 'archive':
        server.endless, server.length = True, str(1 << 50)
    monkeypatch.setattr(enwik8, 'BYTES', 1_000_000 if large == 'archive' else len(TEXT) - 1)
    with pytest.raises(SystemExit, match='it exceeds') as ended:
        train_mac.load_data(SMALL)
    assert '--data' in str(ended.value.code)
    assert list(server.folder.iterdir()) == []


def test_a_server_that_does_not_know_the_length(server):
    server.length = 'unknown'
    assert bytes(torch.cat(train_mac.load_data(SMALL)[:3]).tolist()) == TEXT


def test_without_a_network_the_standard_library_is_the_text(server, monkeypatch, capsys):
    monkeypatch.setattr(enwik8, 'URL', 'http://127.0.0.1:1/enwik8.zip')
    data = train_mac.load_data(SMALL)
    output = capsys.readouterr().out
    assert 'no network' in output
    assert "NOTICE: this run uses the source text of Python's standard library, which is not enwik8" in output
    content = b''.join(path.read_bytes() for path in enwik8.standard_library())
    assert data.sha256 == hashlib.sha256(content).hexdigest()
    assert Path(json.__file__).read_bytes() in content
    assert Path(pytest.__file__).read_bytes() not in content
    assert len(data.train) > 1_000_000
    assert list(server.folder.iterdir()) == []


def test_a_file_in_the_place_of_enwik8_is_used_with_a_notice(server, capsys):
    server.folder.mkdir()
    (server.folder / 'enwik8.gz').write_bytes(gzip.compress(TEXT[:2000]))
    assert len(train_mac.load_data(SMALL).train) == 1800
    assert 'which is not enwik8' in capsys.readouterr().out
    (server.folder / 'enwik8.gz').write_bytes(gzip.compress(TEXT)[:-9])
    with pytest.raises(SystemExit, match='delete it, and it is downloaded again'):
        train_mac.load_data(SMALL)
    assert server.requests == 0


def test_checksums_are_the_published_ones():
    assert enwik8.ZIP_SHA256 == '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc'
    assert enwik8.SHA256 == '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8'


# settings -------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_configuration():
    expected = {
        'NUM_BATCHES': 100_000,
        'BATCH_SIZE': 4,
        'GRADIENT_ACCUMULATE_EVERY': 4,
        'LEARNING_RATE': 2e-4,
        'VALIDATE_EVERY': 100,
        'GENERATE_EVERY': 500,
        'PRIME_LENGTH': 100,
        'GENERATE_LENGTH': 512,
        'SEQ_LEN': 512,
        'CHECKPOINT_EVERY': 5000,
        'NEURAL_MEMORY_DEPTH': 2,
        'NUM_PERSIST_MEM': 4,
        'NUM_LONGTERM_MEM': 4,
        'NEURAL_MEM_LAYERS': (2, 4, 6),
        'NEURAL_MEM_GATE_ATTN_OUTPUT': False,
        'NEURAL_MEM_MOMENTUM': True,
        'NEURAL_MEM_MOMENTUM_ORDER': 1,
        'NEURAL_MEM_QK_NORM': True,
        'NEURAL_MEM_MAX_LR': 1e-1,
        'NEURAL_MEM_SEGMENT_LEN': 4,
        'NEURAL_MEM_BATCH_SIZE': 128,
        'NEURAL_MEM_WEIGHT_RESIDUAL': True,
        'NEURAL_MEM_QKV_RECEIVES_DIFF_VIEW': True,
        'NEURAL_MEM_SPEC_NORM_SURPRISES': True,
        'STORE_ATTN_POOL_CHUNKS': True,
        'MEMORY_MODEL_PER_LAYER_LEARNED_LR': True,
        'WINDOW_SIZE': 32,
        'SLIDING_WINDOWS': True,
        'USE_MEM_ATTENTION_MODEL': False,
        'DIM': 384,
        'DEPTH': 8,
        'NEURAL_MEM_HEADS': 4,
        'NEURAL_MEM_DIM_HEAD': 64,
    }
    config = dataclasses.asdict(train_mac.config_from_options({'PRESET': 'full'}))
    assert {name: config[name] for name in expected} == expected
    assert config == {**dataclasses.asdict(train_mac.Config()), 'PRESET': 'full'}


def test_every_setting_has_an_option_with_help():
    actions = {action.dest: action for action in train_mac.build_parser()._actions}
    for setting in dataclasses.fields(train_mac.Config):
        action = actions[setting.name]
        assert '--' + setting.name.lower().replace('_', '-') in action.option_strings
        assert len(action.help) > 10
    help_text = train_mac.build_parser().format_help()
    for name in ('--preset', '--resume', '--init-from', '--no-neural-mem-momentum'):
        assert name in help_text


def test_data_without_a_path_is_refused(capsys):
    with pytest.raises(SystemExit):
        train_mac.main(['--data'])
    assert 'argument --data: expected at least one argument' in capsys.readouterr().err


def test_options_override_the_preset():
    def parse(*words):
        given = vars(train_mac.build_parser().parse_args(words))
        given.pop('resume'), given.pop('init_from')
        return train_mac.config_from_options(given)

    quick = parse('--preset', 'quick')
    assert quick.DIM < 384
    config = parse(
        '--preset',
        'quick',
        '--dim',
        '48',
        '--no-neural-mem-momentum',
        '--neural-mem-layers',
        '1',
        '2',
        '--use-flex-attn',
        '--neural-mem-max-lr',
        '0.5',
    )
    assert config == dataclasses.replace(
        quick, DIM=48, NEURAL_MEM_MOMENTUM=False, NEURAL_MEM_LAYERS=(1, 2), USE_FLEX_ATTN=True, NEURAL_MEM_MAX_LR=0.5
    )
    assert parse('--device', 'cpu') == dataclasses.replace(quick, DEVICE='cpu')
    assert parse('--device', 'cuda').PRESET == 'full'
    assert parse().PRESET == ('full' if torch.cuda.is_available() else 'quick')
    with pytest.raises(SystemExit):
        parse('--precision', 'fp7')


def test_settings_that_may_be_unset_have_a_type():
    assert train_mac.Config(NEURAL_MEM_INIT_DECAY_BIAS=-3).NEURAL_MEM_INIT_DECAY_BIAS == -3
    for value in (math.inf, math.nan, True, '-3'):
        with pytest.raises(train_mac.BadSetting, match='NEURAL_MEM_INIT_DECAY_BIAS must be'):
            train_mac.Config(NEURAL_MEM_INIT_DECAY_BIAS=value)


def test_chunks_of_one_token_are_not_pooled():
    with pytest.raises(train_mac.BadSetting, match='NEURAL_MEM_SEGMENT_LEN=1 needs --no-store-attn-pool-chunks'):
        train_mac.Config(NEURAL_MEM_SEGMENT_LEN=1)
    assert train_mac.Config(NEURAL_MEM_SEGMENT_LEN=1, STORE_ATTN_POOL_CHUNKS=False).NEURAL_MEM_SEGMENT_LEN == 1


def test_the_stable_presets_keep_gradients_small_at_any_length(text, tmp_path):
    text.write_bytes(TEXT * 16)
    sizes = {'SEQ_LEN': 2048, 'BATCH_SIZE': 1, 'NUM_BATCHES': 2}
    sizes |= {name: train_mac.QUICK[name] for name in ('LEARNING_RATE', 'NEURAL_MEM_BATCH_SIZE')}
    largest = []
    for number, memory in enumerate(({}, train_mac.STABLE)):
        folder = tmp_path / str(number)
        train_mac.main(options(text, folder, **{**sizes, **memory}))
        largest.append(max(row['grad_norm'] for row in rows(folder, 'grad_norm').values()))
    assert largest[1] < 5 < largest[0]
    for preset in ('stable', 'quick-stable'):
        assert train_mac.STABLE.items() <= train_mac.PRESETS[preset].items()


def test_gradients_that_explode_are_warned_of_once(text, tmp_path, capsys):
    train_mac.main(options(text, tmp_path / 'run', MAX_GRAD_NORM=1e-6, NUM_BATCHES=3))
    warning = 'WARNING: the gradient of step 1 has norm'
    output = capsys.readouterr().out
    assert output.count('WARNING') == 1 and warning in output and '--preset stable' in output


@pytest.mark.parametrize(
    'words',
    [
        '--batch-size 0',
        '--validate-every -1',
        '--num-persist-mem -1',
        '--learning-rate nan',
        '--learning-rate inf',
        '--learning-rate=-1e-3',
        '--max-grad-norm -1',
        '--max-grad-norm 0',
        '--max-grad-norm nan',
        '--max-grad-norm inf',
        '--neural-mem-max-lr 0',
        '--neural-mem-max-lr=-inf',
        '--seed -1',
        f'--data-seed {2**63}',
        '--neural-mem-batch-size 6',
        '--neural-mem-layers 3',
        '--neural-mem-layers 0',
        '--generate-length 8',
    ],
)
def test_impossible_settings_are_refused_in_one_line(text, tmp_path, words):
    folder = tmp_path / 'run'
    message = refusal([*options(text, folder), *words.split()])
    assert message.startswith(re.split('[ =]', words)[0][2:].upper().replace('-', '_') + ' must ')
    assert not folder.exists()


def test_every_number_is_checked():
    for setting in dataclasses.fields(train_mac.Config):
        if type(setting.default) in (int, float):
            for value in (-1, math.nan, math.inf, 2**70 if type(setting.default) is int else -math.inf, '1', None):
                with pytest.raises(ValueError, match=f'^{setting.name} must '):
                    train_mac.Config(**{setting.name: value})


@pytest.mark.parametrize('device', ['', 'tpu', 'meta', 'cuda:99'])
def test_a_device_that_is_not_there_is_refused_in_one_line(text, tmp_path, device):
    assert refusal(options(text, tmp_path / 'run', DEVICE=device)).startswith(f'--device {device} cannot be used here')
    assert not (tmp_path / 'run').exists()


def test_a_model_that_cannot_be_built_is_refused_in_one_line(text, tmp_path):
    message = refusal(options(text, tmp_path / 'run', NEURAL_MEM_HEADS=1))
    assert 'dim_head' in message
    assert not (tmp_path / 'run').exists()


def test_a_model_that_cannot_be_sampled_is_refused_before_training(text, tmp_path, monkeypatch):
    def sample(*args, **kwargs):
        raise RuntimeError('not with this size\nat all')

    monkeypatch.setattr(train_mac.MemoryAsContextTransformer, 'sample', sample)
    message = refusal(options(text, tmp_path / 'run', DIM_HEAD=7))
    assert 'not with this size at all' in message
    assert 'DIM_HEAD (now 7)' in message
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('size', ['DIM', 'DIM_HEAD', 'NEURAL_MEM_DIM_HEAD', 'WINDOW_SIZE', 'HEADS', 'SEQ_LEN'])
def test_an_odd_size_is_served_or_refused_before_training(text, tmp_path, size):
    folder = tmp_path / 'run'
    words = options(text, folder, NUM_BATCHES=1, **{size: 7})
    try:
        assert train_mac.main(words) == 0
    except SystemExit as ended:
        assert size in str(ended.code)
        assert not folder.exists()


def test_precision():
    for precision, expected in (('auto', 'highest'), ('fp32', 'highest'), ('tf32', 'high'), ('bf16', 'highest')):
        machine = train_mac.choose_machine(train_mac.Config(DEVICE='cpu', PRECISION=precision))
        assert machine.precision == ('fp32' if precision == 'auto' else precision)
        assert torch.get_float32_matmul_precision() == expected
        with machine.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == 'bf16' else torch.float32)
    train_mac.choose_machine(train_mac.Config(DEVICE='cpu'))


def test_the_memory_attention_model_and_bf16_train_too(text, tmp_path):
    train_mac.main(
        options(
            text,
            tmp_path / 'run',
            NUM_BATCHES=2,
            USE_MEM_ATTENTION_MODEL=True,
            PRECISION='bf16',
            USE_FAST_INFERENCE=False,
            NEURAL_MEM_MOMENTUM=False,
        )
    )
    assert len(rows(tmp_path / 'run', 'train_loss')) == 2


def test_the_training_step_is_what_is_compiled(text, tmp_path, monkeypatch):
    """Whole; and neither validation nor sampling."""
    compiled, called = [], []

    def noted(function, **how):
        compiled.append(how)
        return lambda *args: called.append(args) or function(*args)

    for compiles in (False, True):
        monkeypatch.setattr(torch, 'compile', noted)
        train_mac.main(options(text, tmp_path / f'{compiles}', COMPILE=compiles, GRADIENT_ACCUMULATE_EVERY=2))
    (how,) = compiled
    assert how['fullgraph'] and not how['dynamic']
    assert len(called) == 2 * TINY['NUM_BATCHES']
    losses = [[row['train_loss'] for row in rows(tmp_path / f'{c}', 'train_loss').values()] for c in (False, True)]
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_a_gpu(text, tmp_path):
    folder = tmp_path / 'run'
    size = {'SEQ_LEN': 64, 'DIM': 64, 'DIM_HEAD': 32, 'NEURAL_MEM_DIM_HEAD': 32, 'NEURAL_MEM_BATCH_SIZE': 32}
    train_mac.main(options(text, folder, DEVICE='cuda', NUM_BATCHES=4, VALIDATE_EVERY=2, GENERATE_EVERY=2, **size))
    assert train_mac.main(['--resume', 'latest', '--run-dir', str(folder), '--num-batches', '6']) == 0
    training = rows(folder, 'train_loss')
    assert list(training) == [1, 2, 3, 4, 5, 6]
    assert all(row['peak_memory_bytes'] > 0 for row in training.values())
    assert load(folder / 'titans_enwik8.pt')['batch'] == 6


def test_printable():
    assert train_mac.printable(torch.tensor([72, 105, 10, 0, 27, 195, 188, 255])) == 'Hi\n\ufffd\ufffd\xfc\ufffd'
