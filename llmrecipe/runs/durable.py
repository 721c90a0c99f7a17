"""Crash-safe files: written under a temporary name, synced to disk, then renamed.

A rename is durable once the folder that contains the name is synced. What is replaced or deleted is renamed first, so a folder
half written or half deleted is never mistaken for a complete one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

ASIDE = ".writing-"
"""Prefix of a folder that is being written, or deleted."""
REPLACED = ".replaced-"
"""Prefix of a folder that a newer one of its name is about to replace: valid until that one exists."""


def sync(path: Path) -> None:
    """Sync the content of a file, or the names in a folder, to disk; Windows cannot sync folders and needs no such call."""
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync every file and name of a folder to disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def unfinished_path(path: Path) -> Path:
    """Return the name under which a text file is written before it gets its own."""
    return path.with_name(f".{path.name}.writing")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically and durably: neither a reader nor a crash leaves half of it."""
    aside = unfinished_path(path)
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def share_as_folder(folder: Path) -> None:
    """Give every file of a folder the permissions that the umask gave the folder; safetensors writes for the owner alone."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            follow_folder(path, folder)


def follow_folder(path: Path, folder: Path) -> None:
    """Give a file the permissions that the umask gave a folder."""
    path.chmod(folder.stat().st_mode & 0o666)


def put_in_place(aside: Path, target: Path) -> None:
    """Rename a synced folder to its final name; the one it replaces stays valid until then."""
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
    """Delete a link, or a folder after renaming it, so that a half deleted one is never mistaken for a complete one."""
    if path.is_symlink():  # the best run of a search: its folder is another's
        path.unlink()
        return
    aside = path.with_name(f"{ASIDE}{path.name.lstrip('.')}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written or half deleted in a folder that nobody is writing to."""
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path)
    for path in folder.glob(".*.writing"):
        path.unlink()
    for path in folder.glob(f"{REPLACED}*"):
        if (folder / path.name.removeprefix(REPLACED)).exists():
            delete(path)
