"""Files saved by earlier versions: they load, and continuing from them gives the stored numbers.

`fixtures/make_saved_states.py` wrote them, before any module was moved. The classes in a file are found under the names
that they had then; nothing but `import titans_pytorch` makes them known to `torch.load(..., weights_only=True)`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import all_in_float64, assert_same
from fixtures import make_saved_states as fixtures

from titans_pytorch import ModelState, NeuralMemState

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.stem: path for path in sorted(fixtures.FOLDER.glob('*.pt'))}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}

CONTINUED: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    'memory-': fixtures.continued,
    'weight-residual-': fixtures.continued_residual,
    'store-memories': fixtures.continued_store,
    'model-': fixtures.continued_model,
    'attention-': fixtures.continued_attention,
}


def named(prefix: str) -> list[str]:
    return [name for name in FILES if name.startswith(prefix)]


def load(name: str) -> Any:
    return torch.load(FILES[name], weights_only=True)


@pytest.mark.parametrize('name', [name for prefix in CONTINUED for name in named(prefix)])
def test_continuing_gives_the_stored_numbers(name: str) -> None:
    saved = load(name)
    (continued,) = (function for prefix, function in CONTINUED.items() if name.startswith(prefix))
    if name.startswith(('model-', 'attention-')):
        with all_in_float64():
            came = continued(fixtures.restored(saved), saved)
    else:
        came = continued(fixtures.restored(saved), saved)
    assert_same(came, saved['expected'], TOLERANCE[saved['dtype']])


@pytest.mark.parametrize('name', named('memory-'))
def test_memory_states_are_of_their_class(name: str) -> None:
    for state in load(name)['states'].values():
        assert type(state) is NeuralMemState


@pytest.mark.parametrize('name', named('model-'))
def test_model_states_are_of_their_class(name: str) -> None:
    saved = load(name)
    for state in saved['state'], saved['cache']:
        assert type(state) is ModelState
        assert all(type(memory) is NeuralMemState for memory in state.memories)


def test_a_state_dict_in_the_reference_format_restores_the_model() -> None:
    saved = load('model-mac')
    with all_in_float64():
        model = fixtures.restored({**saved, 'state_dict': saved['reference']})
        assert_same(fixtures.continued_model(model, saved), saved['expected'], TOLERANCE[torch.float64])


def test_every_form_of_a_pending_segment_is_among_the_files() -> None:
    """Each field of `PendingSegment` filled in some state, beside the bare tensor."""
    filled, bare = set(), False
    for name in named('memory-'):
        for state in load(name)['states'].values():
            pending = state.cache_store_segment
            bare = bare or isinstance(pending, torch.Tensor)
            if isinstance(pending, tuple):
                filled |= {field for field, value in zip(pending._fields, pending) if value is not None}
    assert bare and filled == {'tokens', 'mask', 'queries', 'before'}


def test_files_load_in_a_process_that_imports_only_the_package() -> None:
    """Also mapped into memory, and by the plain unpickler, which imports the modules that a file names."""
    program = (
        'import sys, torch, titans_pytorch\n'
        'for path in sys.argv[1:]:\n'
        '    torch.load(path, weights_only=True)\n'
        '    torch.load(path, weights_only=True, mmap=True)\n'
        '    torch.load(path, weights_only=False)\n'
    )
    paths = [str(FILES[name]) for name in FILES]
    done = subprocess.run([sys.executable, '-c', program, *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / 'checkpoint.pt'
    shutil.copy(FILES['train-mac-checkpoint'], checkpoint)
    came, expected = fixtures.resumed(checkpoint, tmp_path, 6), load('train-mac-continuation')
    assert came.keys() == expected.keys()
    for key, losses in expected.items():
        assert came[key] == pytest.approx(losses, rel=1e-5), key
