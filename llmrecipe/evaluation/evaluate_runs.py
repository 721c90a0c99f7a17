"""Scoring several finished runs into one table: a folder of runs one after another, adapters of one base together in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows

from llmrecipe.core.errors import RunError, UserError
from llmrecipe.core.foreign import read_json
from llmrecipe.core.forward_context import activate
from llmrecipe.core.tasks import Tasks


def is_folder_of_runs(path: str) -> bool:
    """Return whether a folder is not a run itself but holds finished runs (`tiny` always means the embedded model)."""
    folder = Path(path)
    return path != "tiny" and folder.is_dir() and not (folder / "status.json").exists() and bool(finished_runs(folder))


def finished_runs(folder: Path) -> list[Path]:
    """Find finished runs below a folder, at any depth, in name order."""
    found = []
    for status in sorted(folder.rglob("status.json")):
        try:
            done = read_json(status).get("status") == "done"
        except RunError:
            continue
        if done:
            found.append(status.parent)
    return found


def score_runs(path: str, overrides: list[str], split: str) -> list[dict[str, Any]]:
    """Compute metrics of every finished run of a folder; for a run that cannot be scored the row says why."""
    from llmrecipe.evaluation.evaluate_model import evaluate_path

    rows: list[dict[str, Any]] = []
    for run in finished_runs(Path(path)):
        try:
            rows.append({"run": str(run), **evaluate_path(str(run), overrides, split)})
        except UserError as error:
            rows.append({"run": str(run), "error": str(error)})
    return rows


def score_side_by_side(paths: list[str], overrides: list[str], split: str, by: str | None = None) -> list[dict[str, Any]]:
    """Compute metrics of several runs whose adapters share one base in memory.

    Each run is scored on the data of its own recipe (or of the overrides). With `by`, every row of the first run's data is
    scored by the adapter that column names, and each adapter gives one line over its own rows.

    Raises:
        UserError: an override has no effect on several runs together.
        ModelError: the runs do not share one base.
        DataError: a row names no adapter, or an unknown one.
    """
    from llmrecipe.evaluation.evaluate_model import metrics_of, subject_of, token_rows
    from llmrecipe.evaluation.open_several import SCORED, open_several

    adapters, recipes = open_several(paths, overrides, SCORED)
    subjects = {p: subject_of(r, adapters.loaded) for p, r in zip(paths, recipes, strict=True) if p == paths[0] or not by}
    scored: list[dict[str, Any]] = []
    if by is not None:
        subject = subjects[paths[0]]
        data = token_rows(subject, split, Tasks(tuple(adapters.choices), by))
        numbers = [int(data[i]["task"]) for i in range(len(data))]
        for number, (name, choice) in enumerate(adapters.choices.items()):
            rows = [i for i, n in enumerate(numbers) if n == number]
            own = TaskRows(data, rows, None if choice.task is None else [choice.task] * len(rows))
            with activate(adapters.context(name)):
                scored.append({"adapter": name, **(metrics_of(subject, own) if len(own) else {"rows": 0.0})})
        return scored
    for run, path in zip(adapters.tasks, paths, strict=True):
        data = token_rows(subjects[path], split, adapters.tasks[run])
        name, choice = next((n, c) for n, c in adapters.choices.items() if c.run == run)
        indices = list(range(len(data)))
        numbers = [] if choice.task is None else [choice.task + int(data[i].get("task", 0)) for i in indices]
        with activate(adapters.context(name)):
            scored.append({"run": path, **metrics_of(subjects[path], TaskRows(data, indices, numbers or None))})
    return scored


class TaskRows:
    """Some rows of a split, each with the number its task has in the model that holds the adapters (None: no tasks)."""

    def __init__(self, data: Rows, indices: list[int], tasks: list[int] | None):
        self.data, self.indices, self.tasks = data, indices, tasks

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {k: v for k, v in self.data[self.indices[index]].items() if k != "task"}
        return row if self.tasks is None else {**row, "task": self.tasks[index]}

    def task_numbers(self) -> list[int]:
        """Return the number of each row's task."""
        assert self.tasks is not None, "only rows of tasks are numbered"
        return self.tasks
