"""The folder of a run: one run at a time, an earlier run moved aside, and the description of its model."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from titans_pytorch.training.checkpoints import checkpoints, steps_done
from titans_pytorch.training.distributed import rank
from titans_pytorch.training.files import RunError, atomic_file, one_line, remove_leftovers, say
from titans_pytorch.training.metrics import CURVE, METRICS, SAMPLES
from titans_pytorch.training.vocabulary import Vocabulary

DESCRIPTION = 'config.json'
WANDB_ID = 'wandb_id.txt'


@contextlib.contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Create `folder` if necessary, and refuse a second run in it. The lock ends with the context or with its process.
    Of several ranks, the first holds it. What this creates is removed if the context leaves nothing else.

    Raises:
        RunError: if another process holds the lock.
        OSError: if the folder cannot be written to.
    """
    folder = Path(folder)
    if rank() > 0:
        yield
        return
    new, lock = not folder.exists(), folder / 'lock'
    folder.mkdir(parents=True, exist_ok=True)
    before = {*folder.iterdir()}
    with open(lock, 'a') as file, contextlib.ExitStack() as unlock:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # releases it for forked processes too, which share it
            unlock.callback(fcntl.flock, file, fcntl.LOCK_UN)
            # another run that was refused may have removed the file since it was opened
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError
        except BlockingIOError:
            raise RunError(
                f'another run is using {folder}: wait until it has ended, or choose another folder'
            ) from None
        except (ImportError, OSError) as error:  # some platforms and file systems have no such locks
            say(f'NOTICE: {folder} cannot be locked ({one_line(error)}); a second run in it would not be refused')
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if {*folder.iterdir()} - before == {lock}:  # the run was refused before it left anything
                    lock.unlink()
                    if new:
                        folder.rmdir()


def clear_run_folder(folder: str | Path) -> None:
    """Move what an earlier run left into a folder of its own, so that a forgotten option does not overwrite work."""
    folder = Path(folder)
    remove_leftovers(folder)
    names = (METRICS, SAMPLES, CURVE, DESCRIPTION, WANDB_ID)
    earlier = [*checkpoints(folder), *(folder / name for name in names if (folder / name).exists())]
    _set_aside(folder, earlier, f'the run that was in {folder}')


def leave_later_checkpoints(folder: str | Path, batch: int) -> list[Path]:
    """Move checkpoints with more than `batch` steps into a folder of their own, because a run resumed after `batch`
    steps takes another course. Return their former paths."""
    folder = Path(folder)
    later = [path for path in checkpoints(folder) if steps_done(path) > batch]
    _set_aside(folder, later, 'later checkpoints, of the course that the run had taken')
    return later


def leave_best_checkpoint(path: str | Path) -> None:
    """Move the best checkpoint, if there is one, into a folder of its own: other validation windows chose it.

    Args:
        path: path of the file; a folder of shards has the same path without the suffix.
    """
    path = Path(path)
    forms = [form for form in dict.fromkeys((path, path.with_suffix(''))) if form.exists()]
    _set_aside(path.parent, forms, 'the best checkpoint by other validation windows')


def _set_aside(folder: Path, paths: list[Path], description: str) -> None:
    """Move files, if there are any, to a new folder within `folder`, and report that."""
    if not paths:
        return
    aside = next(path for n in itertools.count(1) if not (path := folder / f'earlier-{n}').exists())
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    say(f'moved to {aside}: {description}')


def describe_run(
    folder: str | Path, model: Mapping[str, Any], vocabulary: Vocabulary, settings: Mapping[str, Any] = {}
) -> None:
    """Write `config.json`, from which others can open the run; after resuming, it has the latest settings.

    Args:
        model: a result of `model_config`.
        settings: the settings of the script, as JSON values.
    """
    content = {'model': model, 'vocabulary': vocabulary.to_dict(), 'settings': settings}
    with atomic_file(Path(folder, DESCRIPTION)) as file:
        file.write(json.dumps(content, indent=2).encode())


def wandb_id(folder: str | Path) -> str:
    """The id of a folder's Weights & Biases run, so that a resumed run continues there."""
    path = Path(folder, WANDB_ID)
    if not path.exists():
        with atomic_file(path) as file:
            file.write(secrets.token_hex(4).encode())
    return path.read_text()
