"""Documentation: its Python runs, it covers every constructor argument and module, and its links lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import titans_pytorch
from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    NeuralMemory,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(titans_pytorch.__file__).parent
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').rglob('*.md'))]
TEXT = {page: page.read_text(encoding='utf-8') for page in PAGES}

# a block that cannot run everywhere has its reason on the line above: <!-- not run: needs two GPUs -->
NOT_RUN = re.compile(r'<!-- not run: .+ -->\n\Z')
MAX_NOT_RUN = 3


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str, text: str | None = None) -> list[tuple[int, str]]:
    """Fenced blocks of a language: the line each begins on, and its content. Those marked as not run are left out."""
    text = TEXT[page] if text is None else text
    found = re.finditer(rf'^```{language}\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [
        (text.count('\n', 0, match.start(1)) + 1, match[1])
        for match in found
        if not NOT_RUN.search(text[: match.start()])
    ]


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next heading of at most this depth."""
    depth = len(heading) - len(heading.lstrip('#'))
    pattern = rf'^{re.escape(heading)}\n(.*?)(?=^#{{1,{depth}}} |\Z)'
    found = re.search(pattern, TEXT[page], re.DOTALL | re.MULTILINE)
    assert found is not None, f'{name_of(page)} has no section {heading!r}'
    return found[1]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs both make them."""
    outside_code = re.sub(r'^```.*?^```$', '', TEXT[page], flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r'^#+ (.*)$', outside_code, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


WITH_PYTHON = [page for page in PAGES if blocks(page, 'python')]
HYPERPARAMETERS = ROOT / 'docs/guides/hyperparameters.md'


def test_there_are_examples() -> None:
    assert README in WITH_PYTHON
    assert sum(len(blocks(page, 'python')) for page in PAGES) >= 40
    marked = sum(text.count('<!-- not run: ') for text in TEXT.values())
    assert marked <= MAX_NOT_RUN
    # none that the pattern misses
    assert sum(text.count('```python') for text in TEXT.values()) == marked + sum(
        len(blocks(page, 'python')) for page in PAGES
    )
    for page, text in TEXT.items():
        known = sum(len(re.findall(rf'^```{name}$', text, re.MULTILINE)) for name in ('python', 'sh', 'text'))
        assert text.count('```') == 2 * known, name_of(page)


@pytest.mark.parametrize('page', WITH_PYTHON, ids=name_of)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {'__name__': '__main__'}
    for line, code in blocks(page, 'python'):
        # blank lines in front, so that a traceback shows the line of the page
        exec(compile('\n' * (line - 1) + code, str(page), 'exec'), namespace)


@pytest.mark.parametrize('page', WITH_PYTHON, ids=name_of)
def test_examples_assert_their_results_and_keep_the_style(page: Path) -> None:
    for line, code in blocks(page, 'python'):
        assert 'assert ' in code, f'line {line}'
        assert '"' not in code, f'line {line}'
        assert max(map(len, code.splitlines())) <= 120, f'line {line}'


@pytest.mark.parametrize('cls', [NeuralMemory, MemoryAsContextTransformer])
def test_every_constructor_argument_has_a_row(cls: type) -> None:
    rows = re.findall(r'^\| `(\w+)` \|', section(HYPERPARAMETERS, f'## `{cls.__name__}`'), re.MULTILINE)
    assert rows == list(inspect.signature(cls).parameters)


@pytest.mark.parametrize('cls', [MemoryAsGateTransformer, MemoryAsLayerTransformer, LongTermMemoryModel])
def test_the_arguments_of_the_other_models_are_named(cls: type) -> None:
    text = section(HYPERPARAMETERS, '## The sliding-window models')
    arguments = inspect.signature(cls).parameters.keys()
    assert arguments == {name for name in re.findall(r'`(\w+)`', text) if name in arguments}


def test_the_readme_is_short() -> None:
    assert TEXT[README].count('\n') <= 150


def test_newcomers_find_exactly_two_commands() -> None:
    newcomers = section(README, '## Two commands')
    assert [code.split('\n') for _, code in blocks(README, 'sh', newcomers)] == [['make train', 'make test', '']]
    assert set(re.findall(r'\bmake (\w+)', newcomers)) == {'train', 'test'}


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md'], ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text(encoding='utf-8')):
        if re.match(r'https?://', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        # the site holds the pages alone
        assert page not in PAGES or page == README or target.is_relative_to(ROOT / 'docs'), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_files_named_in_the_text_exist(page: Path) -> None:
    named = re.findall(r'`([\w/]+\.(?:py|md|txt|png))`', TEXT[page])
    assert [name for name in named if not any((folder / name).exists() for folder in (ROOT, PACKAGE))] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r'^ +- (\S+\.md)$', (ROOT / 'mkdocs.yml').read_text(), re.MULTILINE))
    assert listed == {page.relative_to(ROOT / 'docs').as_posix() for page in PAGES if page != README}


def tree(text: str) -> set[Path]:
    """Paths in a file tree: each line holds paths, indented by two spaces per level, and after two more a comment."""
    paths, parents = set(), [ROOT]
    for line in text.splitlines():
        indent, names = re.match(r'( *)(.*?)(?:  |$)', line).groups()
        level = len(indent) // 2
        for name in names.split(', '):
            paths.add(parents[level] / name)
        parents[level + 1 :] = [parents[level] / names]
    return paths


@pytest.mark.parametrize(('page', 'heading'), [(README, '## Files'), (ROOT / 'docs/architecture.md', '## Layout')])
def test_file_trees_are_complete(page: Path, heading: str) -> None:
    """A tree names files that exist, and every part of the package: its public modules, its folders, or all modules."""
    ((_, text),) = blocks(page, 'text', section(page, heading))
    named = tree(text)
    assert [str(path) for path in named if not path.exists()] == []
    if page == README:
        parts = {path for path in PACKAGE.glob('*.py') if not path.name.startswith('_')}
        parts |= {path.parent for path in PACKAGE.glob('*/__init__.py')}
    else:
        parts = {path for path in PACKAGE.rglob('*.py') if path.name != '__init__.py' and 'ops' not in path.parts}
        parts |= {path.parent for path in PACKAGE.rglob('ops/*/__init__.py')}
        parts |= {*PACKAGE.glob('ops/*.py')} - {PACKAGE / 'ops/__init__.py'}
    assert sorted(str(path.relative_to(ROOT)) for path in parts - named) == []
