"""Importing a module whose name is data: a verb of the command line, or a library that need not be installed."""

from __future__ import annotations

import importlib
import importlib.util
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
