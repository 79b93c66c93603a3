"""Dependency rules: imports follow the order of the layers, and optional packages are imported only where needed."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import titans_pytorch

PACKAGE = Path(titans_pytorch.__file__).parent

# from the bottom up: a module may import from its own layer's package and from the layers before it
LAYERS = [
    {'utils'},
    {'ops'},
    {'memory_models'},
    {'memory'},
    {'neural_memory'},
    {'attention'},
    {'generation'},
    {'models'},
    {'mac_transformer', 'mag_transformer', 'mal_transformer', 'lmm', 'implicit_mlp_attention', 'nested_attention'},
    {'configuration', 'presets'},
    {'training'},
    {'commands', 'hf'},
    {'titans_pytorch', '__main__'},
]
LAYER = {name: index for index, names in enumerate(LAYERS) for name in names}
OPTIONAL = ('triton', 'transformers', 'accelerate', 'tokenizers', 'matplotlib', 'wandb')


def modules() -> dict[str, Path]:
    """Files of the package by module name, without the name of the package itself."""
    names = {path: '.'.join(path.relative_to(PACKAGE).with_suffix('').parts) for path in PACKAGE.rglob('*.py')}
    return {name.removesuffix('.__init__'): path for path, name in names.items()}


MODULES = modules()


def imports(path: Path, nested: bool = True) -> Iterator[str]:
    """Full names of modules that a file imports; without `nested`, only those imported together with it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f'{path}: imports are absolute'
            inner = [f'{node.module}.{alias.name}' for alias in node.names]
            own = [name for name in inner if name.removeprefix('titans_pytorch.') in MODULES]
            yield from own
            if len(own) < len(inner):
                yield node.module


def own_imports(name: str, nested: bool = True) -> set[str]:
    """Modules of this package that one of them imports."""
    found = {module for module in imports(MODULES[name], nested) if module.split('.')[0] == 'titans_pytorch'}
    return {module.removeprefix('titans_pytorch.') for module in found}


def layer(name: str) -> str:
    first = name.split('.')[0]
    return 'titans_pytorch' if first == '__init__' else first


def test_every_file_belongs_to_a_layer():
    assert {layer(name) for name in MODULES} == LAYER.keys()


@pytest.mark.parametrize('name', MODULES)
def test_imports_follow_the_order_of_the_layers(name):
    for other in own_imports(name):
        if layer(other) != layer(name):
            assert LAYER[layer(other)] < LAYER[layer(name)], f'{name} must not import {other}'


def test_modules_do_not_import_each_other_in_a_cycle():
    # raises CycleError, which names the modules of the cycle
    TopologicalSorter({name: own_imports(name) - {name} for name in MODULES}).prepare()


@pytest.mark.parametrize('name', [name for name in MODULES if name.split('.')[-1].startswith('triton')])
def test_kernels_import_only_kernels(name):
    # of proximal steps, their limits
    allowed = ('triton', '_triton', '_registration', '_streams', 'proximal_steps')
    for other in own_imports(name):
        assert other.split('.')[-1].startswith(allowed), f'{name} must not import {other}'


@pytest.mark.parametrize('name', [name for name in MODULES if layer(name) != 'ops'])
def test_operations_are_imported_from_their_folder_alone(name):
    for other in own_imports(name):
        parts = other.split('.')
        assert parts[0] != 'ops' or len(parts) <= 2, f'{name} must import from ops.{parts[1]}, not from {other}'


@pytest.mark.parametrize('name', MODULES)
def test_optional_packages_are_imported_where_they_are_used(name):
    if name.split('.')[-1].startswith(('_triton', 'triton')) or layer(name) == 'hf':
        return
    found = {*imports(MODULES[name], nested=False)}
    kernels = {module for module in found if module.split('.')[-1].startswith('triton')}
    assert not kernels | {module for module in found if module.split('.')[0] in OPTIONAL}, name


def test_the_package_imports_without_optional_packages():
    # third-party packages may load Triton where it is installed; without it, nothing may fail
    run(f'import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import titans_pytorch')


def test_the_package_does_not_load_the_packages_of_its_extra():
    run("""
        import sys, titans_pytorch
        assert not {'transformers', 'accelerate', 'tokenizers', 'peft', 'datasets'} & sys.modules.keys()
    """)


def run(code: str) -> None:
    command = [sys.executable, '-c', textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_every_operation_with_a_kernel_is_in_the_table():
    _, table = (PACKAGE / 'ops' / 'README.md').read_text().split('| operation |')
    lines = table.split('\n\n')[0].splitlines()
    rows = [line.strip('|').split(' | ') for line in lines if line.startswith('| `')]
    assert all(len(row) == 4 for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    folders = {path.parent.name for path in (PACKAGE / 'ops').glob('*/__init__.py')}
    assert {row[3].strip(' `') for row in rows} == folders
