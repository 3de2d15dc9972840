"""Memory that is freed and needed again."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource
import torch
from sbac import TD3
from sbac.memory import keep_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(f"n{k}", ctypes.c_size_t) for k in range(10)]

tell = ctypes.CDLL(None).mallinfo2
tell.restype = Info

held = []

def is_from_the_system():
    # Whether a block of 20 MB comes from the system, to which it would go back when it is freed.
    before = tell().n3
    held.append(torch.empty(20_000_000, dtype=torch.uint8))
    return tell().n3 - before

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def blocks():
    # As a large update has them: 16 MiB in four, freed together.
    [torch.zeros(2**20) for _ in range(4)]

first, start = is_from_the_system(), faults()
MAKE
itself, then = faults() - start, is_from_the_system()
for _ in range(5):
    blocks()
start = faults()
blocks()
print(first, itself, then, faults() - start)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="of glibc from 2.33 on")
@pytest.mark.parametrize("make", ["keep_freed_memory()", "TD3('MlpPolicy', 'Pendulum-v1')"])
def test_blocks_that_are_freed_are_there_for_the_next(make: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.replace("MAKE", make)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, itself, then, of_blocks = map(int, done.stdout.split())
    assert (first, then) == (1, 0)
    assert of_blocks < 100  # of 4096 pages
    if make == "keep_freed_memory()":
        assert itself < 100  # it takes no memory of its own, which would be 7936 pages
