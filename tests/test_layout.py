"""The walls of the house: imports go down, and heavy or optional packages stay out of `import titans_pytorch`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import titans_pytorch

PACKAGE = Path(titans_pytorch.__file__).parent

FLOORS = [
    [
        'shapes',
        'gpu',
        'checks',
        'parameters',
        'precision',
        'norms',
        'stateless',
        'kernels',
        'kernels.batch_walk',
        'kernels.connect_sequence',
        'kernels.connections',
        'kernels.decode_attention',
        'kernels.decode_retrieval',
        'kernels.ends',
        'kernels.newton_schulz',
        'kernels.once',
        'kernels.products',
        'kernels.record',
        'kernels.retrieval',
        'kernels.scan',
        'kernels.sinkhorn',
        'kernels.spectral_run',
    ],
    [
        'memory_models',
        'recurrence',
        'orthogonalize',
        'rotary',
        'gates',
        'feedforward',
        'packing',
        'sinkhorn',
        'fused_mlp',
        'spectral_run',
    ],
    ['batch_walk', 'fast_weights', 'masks', 'connections', 'decode_attention', 'retrieval'],
    ['engines', 'memory_state'],
    ['memory_layout', 'one_chunk', 'model_state', 'decode_retrieval'],
    ['neural_memory', 'attention', 'implicit_mlp_attention', 'nested_attention'],
    ['generation', 'decoding'],
    ['block'],
    ['transformer'],
    ['mac_transformer', 'hybrid_transformer'],
    ['mag_transformer', 'mal_transformer', 'lmm', 'presets'],
    ['__init__'],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ('triton', 'transformers', 'matplotlib', 'wandb')


def rooms() -> dict[str, Path]:
    paths = {path: path.relative_to(PACKAGE).with_suffix('').as_posix() for path in PACKAGE.rglob('*.py')}
    return {name.replace('/', '.').removesuffix('.__init__'): path for path, name in paths.items()}


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; without `everywhere`, only those imported together with it."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found


def test_every_room_has_a_floor():
    assert rooms().keys() == FLOOR.keys()


def test_imports_only_go_down():
    for room, path in rooms().items():
        for module in imports(path):
            other = module.removeprefix('titans_pytorch.')
            if other != module and other in FLOOR:
                assert FLOOR[other] <= FLOOR[room], f'{room} imports {other}, which is above it'


def test_kernels_import_nothing_of_ours_but_kernels():
    for room, path in rooms().items():
        if room.startswith('kernels'):
            ours = [module for module in imports(path) if module.startswith('titans_pytorch')]
            assert all(module.startswith('titans_pytorch.kernels') for module in ours)


def test_heavy_packages_are_imported_where_they_are_used():
    for room, path in rooms().items():
        if not room.startswith('kernels.'):
            found = imports(path, everywhere=False)
            assert not [module for module in found if module.split('.')[0] in HEAVY or '.kernels' in module], room


def test_import_needs_no_heavy_package():
    # third-party packages may load Triton where it is installed; where it is not, nothing must miss it
    code = f'import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import titans_pytorch'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
