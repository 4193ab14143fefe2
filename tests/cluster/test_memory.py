"""Freed memory that is kept is not asked of the kernel again."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from hpcguard.cluster.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():  # as a training step: tensors of 64 MB that live together, then all are freed
    return sum(float(each.sum()) for each in [torch.ones(2**24) for _ in range(4)])
for _ in range(4):  # the heap finds its shape
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_later_step_takes_no_new_pages() -> None:
    def faults(keep: bool) -> int:
        command = [sys.executable, "-c", STEPS.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults(keep=True) < 100
    assert faults(keep=False) > 50  # huge pages are 2 MB: 128 of them, else 65,536
