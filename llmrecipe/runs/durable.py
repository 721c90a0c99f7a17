"""Files that survive a crash: written aside, synced to disk, renamed into place.

A rename is durable once the folder that holds the name is synced. What is replaced or deleted loses its name first, so a folder
half written or half deleted is never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

ASIDE = ".writing-"
"""Prefix of a folder that is being written, or deleted."""
REPLACED = ".replaced-"
"""Prefix of a folder that a newer one of its name is about to replace: still good until that one is there."""


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable; Windows refuses folders and needs no such call."""
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make every file and name of a folder durable."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole and durably: neither a reader nor a crash meets half of it."""
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def put_in_place(aside: Path, target: Path) -> None:
    """Rename a synced folder into place; the one it replaces counts until the new one has its name."""
    replaced = target.with_name(f"{REPLACED}{target.name}")
    if target.exists():
        if replaced.exists():
            delete(replaced)
        os.rename(target, replaced)
    os.rename(aside, target)
    sync(target.parent)
    if replaced.exists():
        delete(replaced)


def delete(path: Path) -> None:
    """Take the name away first, so that a folder half deleted is never taken for a whole one."""
    aside = path.with_name(f"{ASIDE}{path.name.lstrip('.')}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)
