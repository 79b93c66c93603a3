"""Checkpoints: files with a digest, in the format of `torch.save`, and folders that sharded models write in parallel.

Both hold a dict with at least `batch` (steps done), `model_state_dict`, `optimizer_state_dict`, `val_loss`, `config`.

        python -m titans_pytorch.training.checkpoints runs/full/checkpoint_batch_5000     # turn a folder into a file
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.training.distributed import any_rank, rank
from titans_pytorch.training.files import TEMPORARY, RunError, atomic_file, one_line, say, temporary_path

# entries that a resumed run needs, and their types
RESUMABLE: dict[str, Any] = {
    'batch': int,
    'evaluated': int,
    'val_loss': (float, type(None)),
    'best_val_loss': float,
    'config': dict,
    'model_state_dict': dict,
    'optimizer_state_dict': dict,
    'data_sha256': str,
    'random': Tensor,
    'python_random': tuple,
    'windows_random': Tensor,
    'cuda_random': (Tensor, type(None)),
}
SHARDED = ('model_state_dict', 'optimizer_state_dict')
"""Entries that a folder stores as shards."""
CONTENT = 'run.pt'
"""The file in a folder that holds the other entries; it is written last."""
DIGEST_MARK, DIGEST_LENGTH = b'sha256 ', 64


class BadCheckpoint(RunError):
    """A checkpoint that is missing, damaged or incomplete."""


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Save in the format of `torch.save`, with a sha256 of all preceding bytes as the comment of the zip archive."""
    with atomic_file(path) as file:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        buffer.seek(-2, os.SEEK_END)  # an archive without a comment ends with its length, 0
        assert buffer.read() == b'\0\0'
        buffer.seek(-2, os.SEEK_END)
        buffer.write((len(DIGEST_MARK) + DIGEST_LENGTH).to_bytes(2, 'little') + DIGEST_MARK)
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        buffer.write(digest.encode())
        file.write(buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict saved at `path` by `write_checkpoint` or `torch.save`.

    Raises:
        BadCheckpoint: if the file is missing, damaged or of another kind.
    """
    path = Path(path)
    if (path / CONTENT).exists():
        hint = f'python -m titans_pytorch.training.checkpoints {path} makes a file of them'
        raise BadCheckpoint(f'{path} holds shards; {hint}')
    if path.is_dir():
        raise BadCheckpoint(f'{path} is a folder: name a file in it')
    if path.suffix == '.safetensors' and path.exists():
        hint = f'titans_pytorch.hf.pretrained_to_run({str(path.parent)!r}, RUN) makes a run of its folder'
        raise BadCheckpoint(f'{path} holds weights alone: {hint}')
    try:
        stored = path.read_bytes()
        _check_digest(stored)
        return _loaded(stored)
    except FileNotFoundError:
        raise BadCheckpoint(f'there is no checkpoint {path}') from None
    except Exception as error:
        raise BadCheckpoint(f'{path} is corrupt, or no checkpoint: {one_line(error)}') from error


def _check_digest(stored: bytes) -> None:
    """Check the content of a file against the digest at its end, or against the checksums of an archive without one."""
    digested, digest = memoryview(stored)[:-DIGEST_LENGTH], stored[-DIGEST_LENGTH:]
    if digested[-len(DIGEST_MARK) :] == DIGEST_MARK:
        if hashlib.sha256(digested).hexdigest().encode() != digest:
            raise ValueError('its sha256 is not the stored one')
    elif zipfile.is_zipfile(io.BytesIO(stored)):  # saved by torch.save alone; its checksums omit the headers
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            if archive.testzip() is not None or archive.comment:
                raise ValueError('checksum mismatch')


def _loaded(stored: bytes) -> dict[str, Any]:
    """The dict in a file, read by a loader that runs no code from the file."""
    try:
        content = torch.load(io.BytesIO(stored), map_location='cpu', weights_only=True)
    except Exception as error:  # its message advises loading the file unsafely
        raise ValueError('it does not hold tensors and plain values alone, as torch.save writes them') from error
    if not isinstance(content, dict):
        raise TypeError(f'it holds a {type(content).__name__}')
    return content


def read_resumable(path: str | Path) -> dict[str, Any]:
    """A checkpoint with everything in `RESUMABLE`. For a folder, `shards` is its path, to be loaded by `load_shards`.

    Raises:
        BadCheckpoint: if it cannot be read or is incomplete.
    """
    path = Path(path)
    content = read_checkpoint(path / CONTENT if path.is_dir() else path)
    wanted = {key: kind for key, kind in RESUMABLE.items() if not (path.is_dir() and key in SHARDED)}
    missing = [key for key, kind in wanted.items() if key not in content or not isinstance(content[key], kind)]
    if missing:
        raise BadCheckpoint(
            f'{path} cannot be resumed, since it lacks {", ".join(missing)}; --init-from can use the weights in it'
        )
    return {**content, 'shards': path} if path.is_dir() else content


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder: files, and folders of shards."""
    shards = (content.parent for content in folder.glob(f'*/{CONTENT}'))
    return [*folder.glob('*.pt'), *(path for path in shards if not path.name.endswith(TEMPORARY))]


def steps_done(path: Path) -> int:
    """Number of optimizer steps before a checkpoint; −1 if it cannot be read or does not say."""
    peek = _peek(path)
    return -1 if peek is None else peek[0]


def _peek(path: Path) -> tuple[int, int] | None:
    """Number of steps done, and of those done at the last evaluation."""
    try:
        file = path / CONTENT if path.is_dir() else path
        peek = torch.load(file, map_location='cpu', weights_only=True, mmap=True)  # reads no tensor
        return int(peek['batch']), int(peek.get('evaluated', -1))
    except Exception:
        return None


def remove_other_form(path: str | Path) -> None:
    """Remove the checkpoint with the name of `path` in the other form: a folder if `path` is a file, or the reverse."""
    path = Path(path)
    if path.suffix == '.pt':
        if (path.with_suffix('') / CONTENT).exists():
            shutil.rmtree(path.with_suffix(''))
    else:
        path.with_name(f'{path.name}.pt').unlink(missing_ok=True)


def is_run_folder(path: str | Path) -> bool:
    """Whether `path` is a folder that may hold checkpoints, rather than a checkpoint in shards."""
    path = Path(path)
    return path.is_dir() and not (path / CONTENT).exists()


def latest_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The resumable checkpoint in `folder` with the most steps, regardless of file times."""

    def progress(path: Path) -> tuple[float, int]:
        # unreadable checkpoints are tried first, so that the output says why they are skipped
        return _peek(path) or (math.inf, 0)

    for path in sorted(checkpoints(Path(folder)), key=progress, reverse=True):
        try:
            return read_resumable(path)
        except BadCheckpoint as error:
            say(f'skipped: {error}')
    raise BadCheckpoint(f'there is no checkpoint to resume in {folder}')


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore the optimizer. Earlier versions also saved empty parameters, and saved scalars with zero dimensions."""
    (group,), state = saved['param_groups'], saved['state']
    kept = [index for index in group['params'] if index not in state or state[index]['exp_avg'].numel()]
    moments = {
        index: {key: value if key == 'step' else _like(parameter, value) for key, value in state[old].items()}
        for index, (old, parameter) in enumerate(zip(kept, optimizer.param_groups[0]['params']))
        if old in state
    }
    optimizer.load_state_dict({'state': moments, 'param_groups': [{**group, 'params': [*range(len(kept))]}]})


def _like(parameter: Tensor, moment: Tensor) -> Tensor:
    """An optimizer moment in the shape of its parameter, and sharded if the parameter is."""
    moment = moment.reshape(parameter.shape)
    if hasattr(parameter, 'device_mesh'):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        moment = distribute_tensor(moment.to(parameter.device), parameter.device_mesh, parameter.placements)
    return moment


# shards


def save_shards(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, content: dict[str, Any]
) -> None:
    """Save a sharded model, its optimizer and `content` to a new or existing folder. All ranks take part."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    folder = Path(folder)
    temporary, replaced = _temporary_shards(folder)
    shards = dict(zip(SHARDED, get_state_dict(model, optimizer)))
    dcp.save(shards, checkpoint_id=temporary)
    if rank() == 0:
        write_checkpoint(temporary / CONTENT, content)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    any_rank(False)  # wait until the folder is complete


def _temporary_shards(folder: Path) -> tuple[Path, Path]:
    """Paths for shards that are not yet complete, and for the shards they replace; the same on all ranks."""
    new, old = (folder.with_name(f'{folder.name}{word}{TEMPORARY}') for word in ('', '.old'))
    return new, old


def finish_saves(folder: str | Path) -> None:
    """Complete saves of shards that were killed between the final renames."""
    folder = Path(folder)
    for content in folder.glob(f'*{TEMPORARY}/{CONTENT}'):
        shards = folder / content.parent.name.removesuffix(TEMPORARY).removesuffix('.old')
        for complete in _temporary_shards(shards):
            if (complete / CONTENT).exists() and not shards.exists():
                complete.rename(shards)


def load_shards(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `save_shards` saved, on any number of ranks, into a sharded model or a whole one.

    Raises:
        BadCheckpoint: if the shards are damaged, or do not fit the model and the optimizer.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    with _reading(folder), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed is disabled')  # on a single process
        dcp.load(dict(zip(SHARDED, (weights, moments))), checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


@contextlib.contextmanager
def _reading(folder: str | Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
        raise BadCheckpoint(f'the shards in {folder} cannot be read, or do not fit: {one_line(error)}') from error


def consolidate(folder: str | Path, path: str | Path) -> None:
    """Write the checkpoint in a folder as one file, like one written by a run on one process.

    Raises:
        BadCheckpoint: if the folder holds no checkpoint, or a damaged one.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    content = read_checkpoint(Path(folder) / CONTENT)
    temporary = temporary_path(Path(path))
    try:
        with _reading(folder):
            dcp_to_torch_save(folder, temporary)
        stored = torch.load(temporary, weights_only=True)
    finally:
        temporary.unlink(missing_ok=True)
    weights, optimizer = (stored[key] for key in SHARDED)
    names = [name for group in optimizer['param_groups'] for name in group['params']]
    index = {name: number for number, name in enumerate(names)}
    write_checkpoint(
        path,
        {
            **content,
            'model_state_dict': {name: weights[name] for name in names},
            'optimizer_state_dict': {
                'state': {index[name]: state for name, state in optimizer['state'].items()},
                'param_groups': [
                    {**group, 'params': [index[name] for name in group['params']]}
                    for group in optimizer['param_groups']
                ],
            },
        },
    )


def main(folders: Iterable[str]) -> None:
    """Write `FOLDER.pt` for each folder."""
    for folder in map(Path, folders):
        path = folder.with_name(f'{folder.name}.pt')
        try:
            consolidate(folder, path)
        except BadCheckpoint as error:
            sys.exit(str(error))
        print(f'saved {path}')


if __name__ == '__main__':
    main(sys.argv[1:])
