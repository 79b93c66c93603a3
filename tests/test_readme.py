"""The README: its Python runs as it stands, it names every constructor argument, and a newcomer finds two commands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from titans_pytorch import MemoryAsContextTransformer, NeuralMemory

README = Path(__file__).resolve().parents[1] / 'README.md'
TEXT = README.read_text(encoding='utf-8')


def blocks(language: str, text: str = TEXT) -> list[tuple[int, str]]:
    """Fenced blocks of a language: the line each begins on, and what it holds."""
    found = re.finditer(rf'^```{language}\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [(text.count('\n', 0, match.start(1)) + 1, match[1]) for match in found]


def section(heading: str) -> str:
    """The text under a heading of this depth, up to the next heading of at most this depth."""
    depth = len(heading) - len(heading.lstrip('#'))
    found = re.search(rf'^{re.escape(heading)}\n(.*?)(?=^#{{1,{depth}}} |\Z)', TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None, f'README.md has no section {heading!r}'
    return found[1]


PYTHON = blocks('python')


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 8
    assert TEXT.count('```python') == len(PYTHON)  # none that the pattern misses
    assert TEXT.count('```') == 2 * sum(len(blocks(language)) for language in ('python', 'sh', 'text'))


@pytest.mark.parametrize(('line', 'code'), PYTHON, ids=[f'line_{line}' for line, _ in PYTHON])
def test_example_runs(line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # blank lines in front, so that a traceback shows the line of README.md
    exec(compile('\n' * (line - 1) + code, str(README), 'exec'), {'__name__': '__main__'})


@pytest.mark.parametrize(('line', 'code'), PYTHON, ids=[f'line_{line}' for line, _ in PYTHON])
def test_example_states_what_it_gives_and_keeps_the_style(line: int, code: str) -> None:
    assert 'assert ' in code
    assert '"' not in code


@pytest.mark.parametrize('cls', [NeuralMemory, MemoryAsContextTransformer])
def test_every_constructor_argument_has_a_row(cls: type) -> None:
    rows = re.findall(r'^\| `(\w+)` \|', section(f'### `{cls.__name__}`'), re.MULTILINE)
    assert rows == list(inspect.signature(cls).parameters)


def test_newcomers_find_exactly_two_commands() -> None:
    newcomers = section('## Two commands')
    assert [code.split('\n') for _, code in blocks('sh', newcomers)] == [['make train', 'make test', '']]
    assert set(re.findall(r'\bmake (\w+)', newcomers)) == {'train', 'test'}


def test_links_within_the_readme_lead_somewhere() -> None:
    headings = re.findall(r'^#+ (.*)$', TEXT, re.MULTILINE)
    anchors = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
    assert set(re.findall(r'\]\(#([^)]*)\)', TEXT)) <= anchors


def test_files_it_names_exist() -> None:
    named = re.findall(r'`([\w/]+\.(?:py|md|txt))`', TEXT)
    assert named
    assert [name for name in named if not (README.parent / name).exists()] == []
