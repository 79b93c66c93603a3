"""Runs that `train_mac.py` has left in folders: a checkpoint's model, its vocabulary and its text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch import configuration
from titans_pytorch.models.base import Transformer
from titans_pytorch.training import enwik8
from titans_pytorch.training.checkpoints import CONTENT, BadCheckpoint, checkpoints, read_checkpoint, steps_done
from titans_pytorch.training.data import BadData, load_data
from titans_pytorch.training.files import RunError, one_line
from titans_pytorch.training.machine import Machine, choose_machine
from titans_pytorch.training.run_folder import DESCRIPTION
from titans_pytorch.training.vocabulary import Vocabulary, vocabulary_from_dict
from titans_pytorch.utils.shapes import Int

DATA_FOLDER = Path(__file__).resolve().parents[2] / 'data'
"""Where `train_mac.py` keeps enwik8."""


class Run(NamedTuple):
    """A trained model, ready to be used."""

    model: Transformer
    """The model, in evaluation mode, on its device."""
    config: dict[str, Any]
    """The configuration from which `titans_pytorch.configuration.build_model` builds the model."""
    vocabulary: Vocabulary
    machine: Machine
    """Device and precision; calls of the model belong inside `machine.autocast()`."""
    checkpoint: Path
    steps: int
    """Number of optimizer steps before the checkpoint."""
    settings: dict[str, Any]
    """Settings of the training script."""
    data_sha256: str
    """Digest of the text that the model was trained on; empty if unknown."""


def open_run(
    path: str | Path, checkpoint: str | Path | None = None, device: str = 'auto', precision: str = 'auto'
) -> Run:
    """Open the run at `path`: a folder with a `config.json`, or a checkpoint in such a folder.

    This also sets up the whole process, as `choose_machine` does.

    Args:
        checkpoint: a name in the folder, or a path. Default: the checkpoint with the best validation loss, or, if there
            is none, the one with the most steps.
        device, precision: see `choose_machine`.

    Raises:
        RunError: if there is no such run or checkpoint, if a file is damaged, if the files do not fit together, and for
            a device that does not exist.
    """
    path = Path(path)
    if path.is_file():
        if checkpoint is not None:
            raise RunError(f'{path} and {checkpoint} are two checkpoints: name one of them, or the folder of the run')
        path, checkpoint = path.parent, path.name
    if not path.is_dir():
        raise RunError(f'there is no run in {path}: train one with train_mac.py --run-dir {path}, or name another')
    machine = choose_machine(device, precision)
    checkpoint, content = _chosen(path) if checkpoint is None else _named(path, checkpoint)
    description = _description(path)
    # what the checkpoint says comes first, as a run resumed with other settings may have rewritten config.json
    described: dict[str, Any] = description | content
    try:
        vocabulary = vocabulary_from_dict(described['vocabulary'])
        model = configuration.build_model(described['model'])
    except ModuleNotFoundError as error:
        raise RunError(str(error)) from None
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(f'{path / DESCRIPTION} describes no model: {one_line(error)}') from None
    try:
        model.load_state_dict(content['model_state_dict'])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunError(f'{checkpoint} does not fit {path / DESCRIPTION}: {one_line(error)}') from None
    return Run(
        model=model.to(machine.device).eval(),
        config=described['model'],
        vocabulary=vocabulary,
        machine=machine,
        checkpoint=checkpoint,
        steps=content.get('batch', 0),
        settings=description.get('settings', {}),
        data_sha256=content.get('data_sha256', ''),
    )


def latest_run(folder: str | Path = 'runs') -> Path:
    """The run in `folder` with the newest checkpoint.

    Raises:
        RunError: if there is none.
    """
    runs = [path.parent for path in Path(folder).glob(f'*/{DESCRIPTION}')]
    found = [path for run in runs for path in checkpoints(run)]
    if not found:
        raise RunError(f'there is no run with a checkpoint in {folder}: train one with train_mac.py, or give --run')
    return max(found, key=lambda path: path.stat().st_mtime).parent


def unseen_text(run: Run, paths: Sequence[str | Path] = ()) -> tuple[Int[Tensor, ' n'], str]:
    """Tokens that the model was not trained on, memory-mapped where possible, and where they come from.

    For the text that the run was trained on, these are the test split, the last 5 %; for any other text, all tokens.

    Args:
        paths: files and folders. Default: the text that the run was trained on.

    Raises:
        BadData: if the text cannot be read or found, and for a part of the text that the run was trained on.
    """
    read = paths or _trained_on(run.settings)
    try:
        data = load_data(read, run.vocabulary, cache=run.settings.get('CACHE_DIR') or None) if read else None
    except (OSError, ValueError) as error:
        other = '' if paths else '; name it, or another text, with --data'
        raise BadData(f'the data cannot be read: {one_line(error)}{other}') from None
    if data is not None and data.sha256 == run.data_sha256:
        return data.test, f'test split of {data.source}'
    if data is None or not paths:
        raise BadData(f'the text that {run.checkpoint} was trained on is not here: name it, or another, with --data')
    trained_on = [path.resolve() for path in _trained_on(run.settings)]
    for path in (Path(given).resolve() for given in paths):
        if any(path == seen or path in seen.parents or seen in path.parents for seen in trained_on):
            raise BadData(f'{path} is, or was, part of the text that {run.checkpoint} was trained on: name other text')
    return torch.cat(data[:3]), data.source


def _trained_on(settings: Mapping[str, Any]) -> list[Path]:
    """The files that a run was trained on; empty if its settings do not say."""
    if 'DATA' not in settings or settings['DATA']:
        return [*map(Path, settings.get('DATA', ()))]
    downloaded = DATA_FOLDER / 'enwik8.gz'
    return [downloaded] if downloaded.exists() else enwik8.standard_library()


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        hint = f'python train_mac.py --resume latest --run-dir {folder}' if any(folder.glob('*.pt')) else 'train_mac.py'
        raise RunError(f'there is no {path}, which describes the model: it is written by {hint}') from None
    except (OSError, ValueError) as error:
        raise RunError(f'{path} cannot be read: {one_line(error)}') from None
    if not isinstance(description, dict):
        raise RunError(f'{path} describes no model: it holds a {type(description).__name__}')
    return description


def _chosen(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The best checkpoint that can be read, or else the latest."""
    best = [*folder.glob('*_best.pt')]
    for path in [*best, *sorted({*folder.glob('*.pt')} - {*best}, key=steps_done, reverse=True)]:
        try:
            return path, _weights(path)
        except BadCheckpoint as error:
            print(f'skipped: {error}', file=sys.stderr)
    sharded = [content.parent for content in folder.glob(f'*/{CONTENT}')]
    latest = max(sharded, key=steps_done, default=None)
    hint = f'; python -m titans_pytorch.training.checkpoints {latest} makes one' if latest else ''
    raise BadCheckpoint(f'there is no checkpoint in {folder}{hint}')


def _named(folder: Path, checkpoint: str | Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint given by its name in the folder or by its path."""
    in_run, elsewhere = folder / checkpoint, Path(checkpoint)
    path = elsewhere if elsewhere.exists() and not in_run.exists() else in_run
    return path, _weights(path)


def _weights(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    if not isinstance(content.get('model_state_dict'), dict):
        raise BadCheckpoint(f'{path} is no checkpoint of a run: it has no model_state_dict')
    return content
