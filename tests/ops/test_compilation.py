"""Kernels compile for a GPU, also where there is none: the interpreter accepts more than the compiler does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    'gate_products.triton': ('_backward_kernel', '_forward_kernel'),
    'gated_heads.triton': ('_backward_kernel', '_forward_kernel'),
    'inverse.triton': ('_kernel',),
    'head_norm.triton': ('_backward_kernel', '_forward_kernel'),
    'linear_memory_scan.triton': ('_backward_kernel', '_backward_scan_kernel', '_forward_kernel', '_inverse_kernel'),
    'memory_batch_scan.triton_on_chip': ('_backward_kernel', '_forward_kernel'),
    'short_convolution.triton': ('_activation_backward_kernel', '_convolution_backward_kernel', '_forward_kernel'),
}


def test_kernels_compile_for_hopper() -> None:
    pytest.importorskip('triton')
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parent.parent, here.parent, here, os.environ.get('PYTHONPATH', ''))))
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run(
        [sys.executable, here / 'compile_kernels.py'],
        env={**environment, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line for line in done.stdout.splitlines() if line.startswith('titans_pytorch.ops.')}
    assert compiled == {f'titans_pytorch.ops.{file} {name}' for file, names in KERNELS.items() for name in names}
