"""Named tasks: rows say which task they belong to, and methods with per-task parameters get the index of each row's task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmrecipe.core.errors import DataError, did_you_mean

SHOWN = 20
"""Names shown in a message."""


@dataclass(frozen=True)
class Tasks:
    """The tasks of one batch, in the order of their numbers."""

    names: tuple[str, ...] | None = None
    """Task names; None reads them from the training rows, in natural order (`task 2` before `task 10`)."""
    field: str = "task"
    """Column that names a row's task: a name, or its number in the list of names."""
    unseen: bool = False
    """Whether the rows of other splits may belong to other tasks than the training rows."""

    def of_other_split(self) -> Tasks:
        """Return the tasks by which the rows of another split are read: the same, or those that its own rows name."""
        return replace(self, names=None) if self.unseen else self

    def number(self, value: str | None, where: str) -> int:
        """Return the index of a row's task.

        Raises:
            DataError: the row names no task, or one that is not in the list.
        """
        names = self.names or ()
        if value is None:
            raise DataError(f"{where}: column '{self.field}' names no task in some rows (tasks: {', '.join(names[:SHOWN])})")
        if value in names:
            return names.index(value)
        if value.isdigit() and int(value) < len(names):
            return int(value)
        raise DataError(
            f"{where}: column '{self.field}' names task '{value}', which is not among the tasks of the recipe"
            f"{did_you_mean(value, names)} (tasks: {', '.join(names[:SHOWN])})"
        )

    def resolve(self, values: Iterable[str | None], where: str) -> Tasks:
        """Return the tasks with their names, once the distinct values of the column are known.

        Raises:
            DataError: no row names a task, or the values do not fit the names.
        """
        found = set(values)
        named = sorted((v for v in found if v is not None), key=natural)
        if not named:
            raise DataError(
                f"{where}: no row names its task; the recipe keeps tasks apart and reads the task from column "
                f"'{self.field}' (choose another column with task_field)"
            )
        resolved = self if self.names is not None else replace(self, names=tuple(named))
        for value in [*named, *([None] if None in found else [])]:
            resolved.number(value, where)
        return resolved


def natural(text: str) -> list[tuple[int, float, str]]:
    """Return a sort key under which '2' comes before '10'."""
    pieces = re.split(r"(-?\d+(?:\.\d+)?)", text)
    return [(0, float(p), "") if i % 2 else (1, 0.0, p) for i, p in enumerate(pieces) if p]


def common(wanted: Sequence[tuple[str, Tasks]]) -> Tasks | None:
    """Merge the tasks of several methods into one list: a batch has one list of tasks.

    Args:
        wanted: (the method's name in the stack, its tasks).

    Raises:
        DataError: two lists of names, or two columns, differ.
    """
    if not wanted:
        return None
    named = [(name, tasks) for name, tasks in wanted if tasks.names is not None] or list(wanted)
    first, kept = named[0]
    for name, tasks in [*named[1:], *wanted]:
        if tasks.field != kept.field or (tasks.names is not None and tasks.names != kept.names):
            raise DataError(
                f"'{first}' and '{name}' have different tasks: column '{kept.field}' with "
                f"{', '.join(kept.names or ('any names',))}, and column '{tasks.field}' with "
                f"{', '.join(tasks.names or ('any names',))}; a row has one task, so give both the same tasks in the same order"
            )
    return kept
