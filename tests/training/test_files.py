"""Files and folders that survive a kill."""

from __future__ import annotations

import inspect
import re
import zipfile
from pathlib import Path

import pytest
import torch
from small_runs import small_run

from titans_pytorch import training
from titans_pytorch.training import ByteVocabulary, atomic_file, finish_saves, remove_leftovers
from titans_pytorch.training.checkpoints import CONTENT, checkpoints


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    for name in training.__all__:
        public = getattr(training, name)
        if inspect.isfunction(public) or public is training.LossCurve:
            for parameter in inspect.signature(public).parameters.values():
                kind = str(parameter.annotation)
                assert 'Path' not in kind or 'str | Path' in kind, f'{name}({parameter})'
    folder = str(tmp_path / 'run')
    with training.run_lock(folder):
        training.describe_run(folder, {}, ByteVocabulary())
        training.write_checkpoint(f'{folder}/one.pt', {'batch': 1})
        training.append(f'{folder}/metrics.jsonl', '{"step": 1}\n{"step": 2}\n')
        training.rewind(folder, 1, 1)
    assert training.read_metrics(f'{folder}/metrics.jsonl') == [{'step': 1}]
    assert training.read_checkpoint(f'{folder}/one.pt') == {'batch': 1}
    assert training.is_run_folder(folder) and not training.leave_later_checkpoints(folder, 1)
    with pytest.raises(training.BadCheckpoint, match='lacks evaluated'):
        training.read_resumable(f'{folder}/one.pt')
    with pytest.raises(training.BadCheckpoint, match='no checkpoint to resume'):
        training.latest_checkpoint(folder)
    training.LossCurve(folder).draw()
    training.finish_saves(folder)
    training.remove_other_form(f'{folder}/one')
    training.clear_run_folder(folder)
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {'earlier-1', 'lock'}


@pytest.mark.parametrize('name', ['book.txt', 'empty.pt', 'archive.zip', 'objects.pt', 'model.safetensors'])
def test_a_file_of_another_kind_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    path, reason = tmp_path / name, 'is corrupt, or no checkpoint: ValueError: it does not hold tensors'
    path.write_bytes(b'' if name == 'empty.pt' else b'It was a dark night.\n' * 9)
    if name == 'archive.zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('text', 'dark')
    if name == 'objects.pt':
        torch.save({'path': path}, path)
    if name == 'model.safetensors':
        reason = f'holds weights alone: titans_pytorch.hf.pretrained_to_run({str(tmp_path)!r}, RUN) makes a run'
    with pytest.raises(training.BadCheckpoint, match=re.escape(reason)) as refused:
        training.read_checkpoint(path)
    assert 'weights_only' not in str(refused.value)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    run, shards = small_run(tmp_path / 'run'), tmp_path / 'run' / 'shards'
    for read in (training.read_checkpoint, lambda path: training.open_run(run, path)):
        with pytest.raises(training.BadCheckpoint, match='run is a folder: name a file in it'):
            read(run)
    shards.mkdir()
    (shards / CONTENT).touch()
    for read in (training.read_checkpoint, lambda path: training.open_run(run, path)):
        with pytest.raises(training.BadCheckpoint, match='holds shards; .* makes a file of them'):
            read(shards)


def test_shards_are_set_aside_by_their_own_name(tmp_path: Path) -> None:
    (tmp_path / 'best').mkdir()
    training.leave_best_checkpoint(tmp_path / 'best')
    assert (tmp_path / 'earlier-1' / 'best').is_dir() and not (tmp_path / 'best').exists()


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / 'file'
    with atomic_file(path) as first:
        first.write(b'first')
        with atomic_file(path) as second:
            second.write(b'second, which is longer')
        assert path.read_bytes() == b'second, which is longer'
    assert path.read_bytes() == b'first'
    assert [*tmp_path.iterdir()] == [path]


def test_only_what_this_package_left_is_removed(tmp_path: Path) -> None:
    for name in ('mine.tmp', 'run.pt.1.tmp'):
        (tmp_path / name).mkdir()
    with pytest.raises(RuntimeError), atomic_file(tmp_path / 'file'):
        raise RuntimeError
    (tmp_path / 'checkpoint.0123.titans.tmp').write_bytes(b'half')
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {'mine.tmp', 'run.pt.1.tmp'}


@pytest.mark.parametrize(
    ('left', 'kept'),
    [
        (['best.titans.tmp', 'best.old.titans.tmp'], 'best.titans.tmp'),  # killed between the renames
        (['best.old.titans.tmp'], 'best.old.titans.tmp'),
        (['best', 'best.titans.tmp'], 'best'),
        (['best', 'best.old.titans.tmp'], 'best'),
    ],
)
def test_shards_that_are_complete_survive_a_kill(left: list[str], kept: str, tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / CONTENT).write_text(name)
    (tmp_path / 'other.titans.tmp').mkdir()  # not complete
    assert all('tmp' not in path.name for path in checkpoints(tmp_path))
    finish_saves(tmp_path)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['best']
    assert (tmp_path / 'best' / CONTENT).read_text() == kept
