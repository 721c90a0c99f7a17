"""Memory that is freed in a training stays with the process until its end."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

from llmrecipe.runtime import kept_memory

BLOCK, BLOCKS, STEPS = 8 << 20, 12, 4
PAGES = STEPS * BLOCKS * BLOCK // resource.getpagesize()
FAULTS = f"""
import ctypes, resource, sys
from llmrecipe.runtime.kept_memory import kept_memory

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]

def faults(steps={STEPS}):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        blocks = [library.malloc(ctypes.c_size_t({BLOCK})) for _ in range({BLOCKS})]
        for block in blocks:
            ctypes.memset(block, 1, {BLOCK})
        for block in blocks:
            library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with kept_memory(sys.argv[1]):
    faults(1)
    inside, kept = faults(), held()
print(inside, kept - held(), faults())
"""


def counted(kind: str, **environment: str) -> tuple[int, int, int]:
    """Return the page faults of four steps inside, the bytes given back on exit, and the faults of four steps after it."""
    found = subprocess.run([sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, check=True, env=environment)
    inside, back, after = map(int, found.stdout.split())
    return inside, back, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_inside_and_given_back_after() -> None:
    inside, back, after = counted("cpu")
    assert inside < PAGES // 4
    assert back > BLOCKS * BLOCK // 2
    assert after >= PAGES // 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(
    ("kind", "environment"),
    [("cuda", {}), ("cpu", {"MALLOC_TOP_PAD_": "131072"}), ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"})],
    ids=["another device", "a variable", "a tunable"],
)
def test_another_device_and_an_allocator_tuned_from_outside_stay_as_they_are(kind: str, environment: dict[str, str]) -> None:
    inside, back, _ = counted(kind, **environment)
    assert inside >= PAGES // 2
    assert back < BLOCK


@pytest.mark.parametrize("missing", [OSError, TypeError, None])
def test_without_glibc_nothing_is_set(monkeypatch: pytest.MonkeyPatch, missing: type[Exception] | None) -> None:
    def opened(name: object) -> object:
        if missing is not None:
            raise missing
        return object()

    monkeypatch.setattr(kept_memory.ctypes, "CDLL", opened)
    entered = False
    with kept_memory.kept_memory("cpu"):
        entered = True
    assert entered
