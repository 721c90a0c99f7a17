"""What an error says of a path that is not what it was given for: the nearest name, the runs inside, the path behind a key."""

from __future__ import annotations

from pathlib import Path

from llmrecipe.core.errors import did_you_mean


def near_path(path: Path) -> str:
    """Return what lies near a path that does not exist: the nearest name in its folder, or that the folder is missing too."""
    parent = path.parent
    if not parent.is_dir():
        return f"; {parent} does not exist either"
    try:
        return did_you_mean(path.name, [entry.name for entry in parent.iterdir()])
    except OSError:
        return ""


def plain_path(path: str) -> str:
    """Return what to say of a path that was given as `KEY=PATH` where it stands alone; an empty string for any other."""
    key, equals, rest = path.partition("=")
    return f"; it stands here without '{key}=': {rest}" if equals and key.replace(".", "").isidentifier() and rest else ""


def runs_inside(folder: Path) -> str:
    """Return what to say of a folder that holds runs and is none itself: how many, and the newest; else an empty string.

    Runs lie directly in it, or one level deeper, as under `run.root`.
    """
    try:
        found = sorted(
            (status.stat().st_mtime_ns, status.parent)
            for pattern in ("*/status.json", "*/*/status.json")
            for status in folder.glob(pattern)
            if (status.parent / "recipe.yaml").is_file()
        )
    except OSError:
        return ""
    if not found:
        return ""
    newest = found[-1][1]
    return f"; it holds the run {newest}" if len(found) == 1 else f"; it holds {len(found)} runs, the newest {newest}"
