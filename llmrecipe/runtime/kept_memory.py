"""Memory that a training on a CPU frees is kept by the C library for its next step.

By default glibc gives back the free end of its heap, so that a step pays again for the pages of its activations and gradients:
the kernel clears each at its first use. Blocks above 32 MiB are mapped apart and given back at once, here as everywhere: in the
heap they would leave holes that no other block fits into.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

TRIM, MAP = -1, -3
"""Parameters of glibc's mallopt: the free bytes above which the heap shrinks, and the size from which blocks are mapped."""
NEVER, AFTERWARDS = -1, 64 << 20
"""The former in a training and after it; the latter is what glibc sets by itself once a program has freed a block of 32 MiB."""
MAPPED = 32 << 20
"""The latter, likewise. Whoever sets one of them sets both, because glibc adapts neither any more."""
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
"""Environment variables by which a user decides the same."""


@contextlib.contextmanager
def kept_memory(kind: str) -> Iterator[None]:
    """Keep freed memory inside the context, and give it back on exit.

    Nothing changes without glibc, on other devices than a CPU, and where the environment tunes the C library's allocator.

    Args:
        kind: type of the device that trains.
    """
    library = _glibc() if kind == "cpu" else None
    if library is None:
        yield
        return
    library.mallopt(MAP, MAPPED)
    library.mallopt(TRIM, NEVER)
    try:
        yield
    finally:
        library.mallopt(TRIM, AFTERWARDS)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process; None where it is no glibc, or its allocator is tuned from outside."""
    if any(name in os.environ for name in VARIABLES) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # the last: Windows opens no library without a name
        return None
    return library if all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
