"""Imports that wait: of modules whose name is data, of libraries that need not be installed, of many modules at once."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType


def load_module(name: str) -> ModuleType:
    """Import a module by its full name.

    Raises:
        ModuleNotFoundError: there is none.
    """
    return importlib.import_module(name)


def is_installed(name: str) -> bool:
    """Return whether a library can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Import torch and what stands on it inside the context without collecting garbage.

    Modules leave none, and every collection would walk through all that has been imported so far; nor is it walked through
    again later, not even when the program ends, which would take seconds of CPU time. Libraries that count what is left then,
    as those bound by nanobind do, report it as leaked. Nothing changes in a program that has imported torch before.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
