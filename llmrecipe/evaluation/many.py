"""Scoring a folder of finished runs, one after another, into one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def is_folder_of_runs(path: str) -> bool:
    """Whether a folder is not a run itself but holds finished runs (`tiny` always means the embedded model)."""
    folder = Path(path)
    return path != "tiny" and folder.is_dir() and not (folder / "status.json").exists() and bool(finished_runs(folder))


def finished_runs(folder: Path) -> list[Path]:
    """Finished runs below a folder, at any depth, in name order."""
    found = []
    for status in sorted(folder.rglob("status.json")):
        try:
            done = json.loads(status.read_text(encoding="utf-8")).get("status") == "done"
        except (OSError, ValueError):
            continue
        if done:
            found.append(status.parent)
    return found


def score_runs(path: str, overrides: list[str], split: str) -> list[dict[str, Any]]:
    """Metrics of every finished run of a folder; a run that cannot be scored says why and the others go on."""
    from llmrecipe.errors import UserError
    from llmrecipe.evaluation.standalone import evaluate_path

    rows: list[dict[str, Any]] = []
    for run in finished_runs(Path(path)):
        try:
            rows.append({"run": str(run), **evaluate_path(str(run), overrides, split)})
        except UserError as error:
            rows.append({"run": str(run), "error": str(error)})
    return rows


def show_scores(rows: list[dict[str, Any]]) -> None:
    """Print scores as a table, a run a row."""
    from rich.table import Table

    from llmrecipe.cli.show_table import console

    names = list(dict.fromkeys(k for row in rows for k in row))
    table = Table(*names, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(f"{v:.6g}" if isinstance(v := row.get(n, ""), float) else str(v) for n in names))
    console().print(table)
