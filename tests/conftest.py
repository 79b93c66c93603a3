"""Set-up shared by all tests."""

import gc
import importlib
import os
import random
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# the tensors here are small: a second thread costs more than it brings, many times over on a busy machine
torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')

# Triton kernels are tested in its interpreter where there is no GPU; Triton reads this when it is imported
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')


def patch_triton_once_per_launch():
    """The interpreter patches `triton.language` again in each call of a device function, a quarter of a test's time."""
    from triton.runtime import interpreter

    patch_language, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch_language(function)

    def launch_afresh(*args, **kwargs):
        patched.clear()  # a launch undoes its patches at its end
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


if os.environ.get('TRITON_INTERPRET') == '1' and find_spec('triton'):
    patch_triton_once_per_launch()


def pytest_addoption(parser):
    parser.addoption('--shapes', action='store_true', help='check the shape annotations of the package')


def pytest_configure(config):
    if config.getoption('--shapes'):
        import shape_checks

        shape_checks.install()


def pytest_collection_finish():
    """Modules and tests live to the end: a traced test would otherwise have the garbage collector search them often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs that a kernel leaves unwritten show as NaN."""
    new_empty = torch.Tensor.new_empty

    def filled(like, *args, **kwargs):
        made = new_empty(like, *args, **kwargs)
        return made.fill_(float('nan')) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, 'new_empty', filled)


@pytest.fixture
def fresh_compiler():
    """A compiler that has compiled nothing yet."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Kernels run on the CPU too, in Triton's interpreter, as on the newest device that any of them needs."""
    pytest.importorskip('triton')
    from titans_pytorch.ops import _dispatch  # only now: Triton reads its settings as it is imported

    monkeypatch.setattr(_dispatch, 'compute_capability', lambda device: _dispatch.HOPPER)


@pytest.fixture
def switch_kernel(monkeypatch):
    """`switch_kernel(operation, use)`: the kernel of one operation, given as its module, runs on this device or not."""
    pytest.importorskip('triton')
    from titans_pytorch.ops import _dispatch

    def switch(operation, use):
        def use_kernel(*args, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_dispatch, 'compute_capability', lambda device: _dispatch.HOPPER)
                return use and _dispatch.use_kernel(*args, **options)

        monkeypatch.setattr(operation, 'use_kernel', use_kernel)

    return switch


@pytest.fixture
def note_launches(monkeypatch):
    """`note_launches(operation)`: a growing list of the arguments of launches of its kernel."""

    def note(operation):
        name = operation.__name__.rsplit('.')[-1]
        kernels = importlib.import_module(f'{operation.__name__}.triton')
        launches, launch = [], getattr(kernels, name)
        noted = lambda *args, **kwargs: (launches.append(args), launch(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(kernels, name, noted)
        return launches

    return note


@pytest.fixture
def launches_of(switch_kernel, note_launches):
    """`launches_of(operation)`: the same, and its kernel runs on this device too."""

    def noted(operation):
        switch_kernel(operation, True)
        return note_launches(operation)

    return noted


@pytest.fixture
def steps_compiled_eagerly(monkeypatch, request):
    """Compiled decoding steps are traced whole, but run operation by operation; the list has one entry for each.

    An indirect parameter 'aot_eager' also makes in-place writes functional, as a compiler for a device does.
    """
    compiled, real, backend = [], torch.compile, getattr(request, 'param', 'eager')

    def traced(step, options, **kwargs):
        compiled.append(step)
        return real(step, backend=backend, options={'guard_filter_fn': options['guard_filter_fn']}, **kwargs)

    monkeypatch.setattr(torch, 'compile', traced)
    return compiled


HAS_COMPILER = shutil.which('c++') is not None and Path(sysconfig.get_paths()['include'], 'Python.h').exists()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('gpu'):
            # compilers' warnings depend on the machine
            item.add_marker(pytest.mark.filterwarnings('default'))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
        if item.get_closest_marker('compiler') and not HAS_COMPILER:
            item.add_marker(pytest.mark.skip(reason='needs a C++ compiler and the headers of Python'))
