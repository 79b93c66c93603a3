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
rounds = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20, dtype=torch.uint8)
    rounds.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(rounds))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_freed_memory_is_kept():
    def page_faults(which: str) -> int:
        # The fewest of several rounds, as a small block that splits the kept one costs the next round new pages.
        # Huge pages, where a system gives them unasked, are 512 times as large.
        command = [sys.executable, '-c', COUNT_PAGE_FAULTS, which]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert page_faults('kept') < 16
    assert page_faults('returned') >= 32
