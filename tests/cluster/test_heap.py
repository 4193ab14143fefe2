"""Freed memory that is kept is not asked of the kernel again, and is given back in the end."""

import json
import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import json, re, resource, torch
from contextlib import nullcontext
from hpcguard.cluster.heap import freed_memory_kept

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def mb(kind):
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10

def step():  # as a training step: tensors that live together, then all are freed
    return sum(float(each.sum()) for each in [torch.ones(2**24) for _ in range(4)])

found, begun = {}, mb("VmRSS")
with freed_memory_kept() if {keep} else nullcontext():
    for _ in range(4):  # the heap finds its shape
        step()
    before = faults()
    step()
    found["faults"] = faults() - before
    found["held"] = mb("VmRSS") - begun
    empty = mb("VmData")
    blocks = [torch.empty(2**24) for _ in range(48)]  # 3 GB, of which nothing is touched
    del blocks
    found["kept"] = mb("VmData") - empty
found["left"] = mb("VmRSS") - begun
print(json.dumps(found))
"""


def measured(keep: bool, **environment: str) -> dict[str, int]:
    command = [sys.executable, "-c", STEPS.replace("{keep}", str(keep))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_later_step_takes_no_new_pages() -> None:
    ours, default = measured(keep=True), measured(keep=False)
    assert ours["faults"] < 100
    assert ours["kept"] > 2500
    assert ours["held"] > 200
    assert ours["left"] < 100
    assert default["faults"] > 100  # of 4 KB 65,536, of 2 MB 128
    assert default["kept"] < 200
    told = measured(keep=True, MALLOC_ARENA_MAX="2")
    assert told["kept"] < 200  # whoever tunes malloc is left alone
