"""What a process sets up before it trains."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from deepdelta.training.environment import keep_freed_memory

PAGE = {page}
def held():
    return int(open("/proc/self/statm").read().split()[1]) * PAGE

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = held()
block = torch.ones(25_000_000)
assert held() - before > 90_000_000
del block
print((held() - before) // 1_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("argument", "kept"), [("keep", True), ("leave", False)])
def test_freed_memory_is_kept_only_where_asked(argument, kept):
    script = SCRIPT.format(page=os.sysconf("SC_PAGE_SIZE"))
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 90) == kept
