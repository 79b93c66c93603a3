"""The code of the notebooks runs, without Jupyter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / 'docs/notebooks').glob('*.ipynb'))


def code(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
@torch.no_grad()  # restores the mode that a notebook may change
def test_notebooks_run(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(notebook.parent)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    namespace = {'__name__': '__main__'}
    for number, source in enumerate(code(notebook), start=1):
        exec(compile(source, f'{notebook.name}, code cell {number}', 'exec'), namespace)


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_assert_what_they_say(notebook: Path) -> None:
    _, *cells = code(notebook)  # the first one imports
    assert all('assert ' in source for source in cells)


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
