"""The machine that a run uses."""

import platform
import subprocess
import sys

import pytest

COUNT_PAGE_FAULTS = """
import resource, sys
import torch
from titans_pytorch.training import keep_freed_memory

if sys.argv[1] == 'kept':
    assert keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_freed_memory_is_kept():
    def page_faults(which: str) -> int:
        # huge pages, where a system gives them unasked, are 512 times as large
        command = [sys.executable, '-c', COUNT_PAGE_FAULTS, which]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert page_faults('kept') < 16
    assert page_faults('returned') >= 32
