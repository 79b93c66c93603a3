"""Opening a run: which checkpoint, what does not fit, and the text that the model has not seen."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import TEXT, checkpoint, small_config, small_run

import train_mac
from titans_pytorch.configuration import build_model
from titans_pytorch.training import BadData, RunError, train_bpe, write_checkpoint
from titans_pytorch.training.runs import latest_run, open_run, unseen_text

BPE = train_bpe([TEXT], 300)


def test_a_run_is_opened(tmp_path: Path) -> None:
    run = open_run(small_run(tmp_path / 'run'), device='cpu')
    assert run.steps == 7
    assert run.vocabulary.size == 256
    assert not run.model.training
    torch.manual_seed(0)
    expected = build_model(small_config()).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in run.model.state_dict().items())
    by_file = open_run(tmp_path / 'run/titans_enwik8_best.pt', device='cpu')
    assert by_file.checkpoint == run.checkpoint
    assert open_run(small_run(tmp_path / 'bpe', BPE), device='cpu').vocabulary.to_dict() == BPE.to_dict()


def test_the_best_checkpoint_is_chosen_or_else_the_latest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_run(tmp_path / 'run')
    for steps in (9, 20, 3):
        checkpoint(folder / f'checkpoint_batch_{steps}.pt', steps)
    assert open_run(folder).steps == 7
    assert open_run(folder, 'checkpoint_batch_3.pt').steps == 3
    assert open_run(folder, folder / 'checkpoint_batch_9.pt').steps == 9
    checkpoint(tmp_path / 'checkpoint_batch_3.pt', 5)
    monkeypatch.chdir(tmp_path)  # where a file has the same name
    assert open_run(folder, 'checkpoint_batch_3.pt').steps == 3
    with pytest.raises(RunError, match='are two checkpoints'):
        open_run(folder / 'checkpoint_batch_3.pt', 'checkpoint_batch_9.pt')
    damaged = bytearray((folder / 'titans_enwik8_best.pt').read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / 'titans_enwik8_best.pt').write_bytes(damaged)
    (folder / 'checkpoint_batch_99.pt').write_bytes(b'not a checkpoint')
    assert open_run(folder).steps == 20
    assert 'skipped: ' in capsys.readouterr().err


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name('elsewhere'))


def no_description(folder: Path) -> None:
    (folder / 'config.json').unlink()


def damaged_description(folder: Path) -> None:
    (folder / 'config.json').write_text('{"model"')


def another_description(folder: Path) -> None:
    (folder / 'config.json').write_text('{"vocabulary": {"kind": "bytes"}, "model": {"architecture": "rnn"}}')


def incomplete_description(folder: Path) -> None:
    (folder / 'config.json').write_text('{}')


def no_checkpoint(folder: Path) -> None:
    (folder / 'titans_enwik8_best.pt').unlink()


def only_shards(folder: Path) -> None:
    no_checkpoint(folder)
    for steps in (3, 10, 5):
        (folder / f'checkpoint_batch_{steps}').mkdir()
        write_checkpoint(folder / f'checkpoint_batch_{steps}/run.pt', {'batch': steps})


def another_model(folder: Path) -> None:
    checkpoint(folder / 'titans_enwik8_best.pt', 7, num_tokens=300)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (no_folder, 'there is no run in .*run: train one with train_mac.py --run-dir'),
        (no_description, r'no .*config.json, .*: it is written by python train_mac.py --resume latest --run-dir .*run'),
        (damaged_description, r'config.json cannot be read: JSONDecodeError'),
        (another_description, r'config.json describes no model: ValueError: architecture must be one of'),
        (incomplete_description, r"config.json describes no model: KeyError: 'vocabulary'"),
        (no_checkpoint, r'there is no checkpoint in .*run$'),
        (only_shards, r'python -m titans_pytorch.training.checkpoints .*checkpoint_batch_10 makes one'),
        (another_model, r'best.pt does not fit .*config.json: RuntimeError'),
    ],
)
def test_failures_are_one_line(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = small_run(tmp_path / 'run')
    change(folder)
    with pytest.raises(RunError, match=message) as caught:
        open_run(folder)
    assert '\n' not in str(caught.value)


def test_other_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_run(tmp_path / 'run')
    with pytest.raises(RunError, match='device tpu cannot be used here'):
        open_run(folder, device='tpu')
    with pytest.raises(RunError, match='there is no checkpoint .*none.pt'):
        open_run(folder, 'none.pt')
    torch.save([1], folder / 'list.pt')
    torch.save({'a': 1}, folder / 'other.pt')
    with pytest.raises(RunError, match='list.pt is corrupt, or no checkpoint'):
        open_run(folder, 'list.pt')
    with pytest.raises(RunError, match='other.pt is no checkpoint of a run: it has no model_state_dict'):
        open_run(folder, 'other.pt')
    small_run(tmp_path / 'bpe', BPE)
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(RunError, match='a BPE vocabulary needs the package tokenizers'):
        open_run(tmp_path / 'bpe')


def test_the_latest_run(tmp_path: Path) -> None:
    for name in ('b', 'a', 'c'):
        small_run(tmp_path / name)
    os.utime(tmp_path / 'c/titans_enwik8_best.pt', (0, 0))
    assert latest_run(tmp_path) == tmp_path / 'a'
    for name in ('a', 'b', 'c'):
        no_checkpoint(tmp_path / name)
    with pytest.raises(RunError, match='there is no run with a checkpoint in .*: train one'):
        latest_run(tmp_path)


@pytest.mark.parametrize('vocabulary', [None, BPE])
def test_the_text_that_the_model_has_not_seen(vocabulary, tmp_path: Path) -> None:
    run = open_run(small_run(tmp_path / 'run', vocabulary, data_sha256=hashlib.sha256(TEXT).hexdigest()))
    tokens, source = unseen_text(run)
    assert source == f'test split of {tmp_path / "run/text.txt"}'
    assert TEXT.endswith(run.vocabulary.decode(tokens))
    assert len(run.vocabulary.decode(tokens)) == pytest.approx(len(TEXT) / 20, abs=8)

    (tmp_path / 'moved.txt').write_bytes(TEXT)
    assert torch.equal(unseen_text(run, [tmp_path / 'moved.txt'])[0], tokens)

    (tmp_path / 'other.txt').write_bytes(TEXT[:500])
    other, source = unseen_text(run, [tmp_path / 'other.txt'])
    assert source == str(tmp_path / 'other.txt')
    assert run.vocabulary.decode(other) == TEXT[:500]

    (tmp_path / 'run/text.txt').write_bytes(TEXT[:-1])
    with pytest.raises(BadData, match='is, or was, part of the text that'):
        unseen_text(run, [tmp_path / 'run/text.txt'])
    with pytest.raises(BadData, match='the text that .*best.pt was trained on is not here: name it, or another, with'):
        unseen_text(run)
    (tmp_path / 'run/text.txt').unlink()
    with pytest.raises(BadData, match=r'text\.txt'):
        unseen_text(run)
    with pytest.raises(BadData, match='was trained on is not here'):
        unseen_text(run._replace(settings={}))


def test_a_run_of_the_training_script_is_opened(tmp_path: Path) -> None:
    (tmp_path / 'text.txt').write_bytes(TEXT)
    settings = '--num-batches 2 --batch-size 2 --gradient-accumulate-every 1 --seq-len 24 --prime-length 8'
    settings += ' --generate-length 12 --validate-batches 2 --dim 16 --depth 1 --heads 2 --dim-head 8 --window-size 8'
    settings += ' --neural-mem-layers 1 --neural-mem-heads 2 --neural-mem-dim-head 8 --neural-mem-batch-size 16'
    folders = ['--data', str(tmp_path / 'text.txt'), '--run-dir', str(tmp_path / 'run'), '--cache-dir', str(tmp_path)]
    assert (
        train_mac.main(
            [*settings.split(), *folders, '--device', 'cpu', '--vocabulary', 'bpe', '--vocabulary-size', '300']
        )
        == 0
    )
    run = open_run(tmp_path / 'run', device='cpu')
    assert (run.steps, run.vocabulary.size, run.checkpoint.name) == (2, 300, 'titans_enwik8_best.pt')
    tokens, source = unseen_text(run)
    assert source == f'test split of {tmp_path / "text.txt"}'
    assert TEXT.endswith(run.vocabulary.decode(tokens))
