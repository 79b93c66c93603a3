"""enwik8, downloaded and verified, and a text for trying things out where there is no network."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import sysconfig
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import IO

from tqdm import tqdm

from titans_pytorch.training.data import BadData
from titans_pytorch.training.files import atomic_file, remove_leftovers, say, temporary_path

URL = 'https://mattmahoney.net/dc/enwik8.zip'
ZIP_SHA256 = '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc'
BYTES = 100_000_000
SHA256 = '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8'


def download_enwik8(path: str | Path) -> bool:
    """Download enwik8 to `path`, gzipped. Return False if the network cannot be reached.

    Raises:
        BadData: if the download fails in any other way. Nothing of it is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, older_than=3600.0)
    archive = temporary_path(path.with_name('enwik8.zip'))
    try:
        response = urllib.request.urlopen(URL, timeout=30)
    except urllib.error.HTTPError as error:  # a server answered, so there is a network
        error.close()
        raise BadData(f'the download of {URL} was refused ({error}); give a file with --data') from None
    except OSError as error:
        say(f'no network: {URL} is out of reach ({getattr(error, "reason", error)})')
        return False
    try:
        with response, open(archive, 'wb') as zipped:
            _copy_verified(response, zipped, response.length or 0, ZIP_SHA256, 'enwik8.zip')
        with (
            zipfile.ZipFile(archive) as unpacked,
            unpacked.open('enwik8') as text,
            atomic_file(path) as file,
            gzip.GzipFile('', 'wb', compresslevel=1, fileobj=file, mtime=0) as packed,
        ):
            _copy_verified(text, packed, unpacked.getinfo('enwik8').file_size, SHA256, 'enwik8')
        return True
    except (OSError, http.client.HTTPException) as error:
        raise BadData(f'the download of {URL} failed ({error}); nothing was kept. Try again, or use --data') from None
    finally:
        archive.unlink(missing_ok=True)


def _copy_verified(source: IO[bytes], target: IO[bytes] | gzip.GzipFile, size: int, sha256: str, name: str) -> None:
    digest, length = hashlib.sha256(), 0
    with tqdm(total=size or None, unit='B', unit_scale=True, desc=name) as bar:
        while block := source.read(1 << 18):
            length += len(block)
            if length > BYTES:  # a limit for the archive too, which is smaller than the text
                raise _corrupt(name, f'it exceeds {BYTES:,} bytes')
            target.write(block)
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != sha256:
        raise _corrupt(name, f'its sha256 is {digest.hexdigest()}, not {sha256}')


def _corrupt(name: str, reason: str) -> BadData:
    return BadData(
        f'{name} from {URL} is corrupt: {reason}. Nothing of it was kept; try again, or give a file with --data'
    )


def standard_library() -> list[Path]:
    """Source files of Python's standard library, ordered by a hash of their names so that the splits are mixed."""
    root = Path(sysconfig.get_paths()['stdlib'])
    skip = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__'}
    names = [path.relative_to(root) for path in root.rglob('*.py')]
    names = [name for name in names if not skip.intersection(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [root / name for name in names]
