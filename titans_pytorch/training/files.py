"""Files that survive a kill, and one-line messages."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

TEMPORARY = '.titans.tmp'
"""Suffix of temporary files and folders."""


class RunError(Exception):
    """A failure that the user can fix. Its message is one line."""


def say(message: str) -> None:
    """Print above a progress bar instead of through it. Of several processes, only the first prints."""
    if os.environ.get('RANK', '0') == '0':
        tqdm.write(message)


def one_line(error: BaseException) -> str:
    """Type and message of an error, shortened to one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the name of the file to an OSError that lacks it, as errors from writes do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def temporary_path(path: Path) -> Path:
    """A path beside `path` that no other thread, process or machine uses."""
    return path.with_name(f'{path.name}.{secrets.token_hex(8)}{TEMPORARY}')


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Write to a temporary file and rename it once all of it is on disk: a kill leaves the old file."""
    temporary = temporary_path(Path(path))
    try:
        with naming(path):
            with open(temporary, 'xb') as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: str | Path, text: str) -> None:
    """Add text to the end of a file, in UTF-8."""
    with naming(path), open(path, 'a', encoding='utf-8') as file:
        file.write(text)


def remove_leftovers(folder: str | Path, older_than: float = 0.0) -> None:
    """Remove the temporary files and folders of killed processes; `older_than` is an age in seconds."""
    for leftover in Path(folder).glob(f'*{TEMPORARY}'):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime < older_than:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
