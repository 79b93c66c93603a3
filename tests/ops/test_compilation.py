"""All kernels compile for a GPU, also where there is none: the interpreter accepts more than the compiler does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import titans_pytorch

OPERATIONS = Path(titans_pytorch.__file__).parent / 'ops'
SHARED_MEMORY = {89: 99 * 1024, 90: 227 * 1024}
"""Bytes that a program may have, by compute capability: those of consumer GPUs (Ampere and Ada), and of Hopper."""

NEED_HOPPER = {'newton_schulz/triton.py', 'spectral_update/triton.py'}


def kernels() -> set[tuple[str, str]]:
    """File and name of every kernel in the package."""
    found = set()
    for file in OPERATIONS.glob('*/triton*.py'):
        names = re.findall(r'^def (_(?:\w+_)?kernel)\(', file.read_text(), flags=re.MULTILINE)
        found |= {(f'{file.parent.name}/{file.name}', name) for name in names}
    return found


def output(script: str, *arguments: str, **variables: str) -> list[str]:
    """Lines that a script of this folder prints, run without Triton's interpreter."""
    pytest.importorskip('triton')
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parent.parent, here.parent, here, os.environ.get('PYTHONPATH', ''))))
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run(
        [sys.executable, here / script, *arguments],
        env={**environment, 'PYTHONPATH': path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize('capability', SHARED_MEMORY)
def test_kernels_compile_and_fit_the_shared_memory(capability: int) -> None:
    lines = [line.split() for line in output('compile_kernels.py', str(capability)) if 'triton' in line.split(' ')[0]]
    shared = {(file, name): int(size) for file, name, size in lines}
    missing = kernels() - shared.keys()
    assert len(kernels()) > 40  # so that a change of names does not empty the search
    assert shared.keys() <= kernels()
    assert not missing if capability == 90 else {file for file, _ in missing} == NEED_HOPPER
    assert {kernel: size for kernel, size in shared.items() if size > SHARED_MEMORY[capability]} == {}


@pytest.mark.parametrize('of', ['training', 'decoding'])
def test_kernels_compiled_together_are_those_that_are_launched(of: str, tmp_path: Path) -> None:
    in_context, after = map(json.loads, output('launch_kernels.py', of, TRITON_CACHE_DIR=str(tmp_path)))
    assert in_context['launched'] == after['compiled'] == []
    assert sorted(in_context['compiled']) == sorted({*after['launched']})
