"""Token rows of a split, read like a list from memory-mapped tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from llmrecipe.core.tasks import Tasks
from llmrecipe.data.cache import TokenTable
from llmrecipe.data.features.read_file import FeatureReader
from llmrecipe.data.token_report import Report

Row = dict[str, Any]


class TokenData(Sequence[Row]):
    """Token rows of a split, read from memory-mapped tables.

    `data[i]` is a dict of Python lists and scalars (`data.tokenize.row_type` has the columns) with `row` = i. `labels` are the
    class names in the order of their ids; None where labels are real numbers or there are none. `tasks` are the tasks for which
    the stack has separate parameters, if any.
    """

    def __init__(
        self,
        tables: Sequence[TokenTable],
        weights: Sequence[float] | None,
        key: str,
        report: Report,
        labels: Sequence[str] | None,
        tasks: Tasks | None = None,
    ) -> None:
        self.tables, self.weights, self.key, self.report = list(tables), weights, key, report
        self.labels: list[str] | None = None
        self._numbers: dict[str, int] = {}
        if labels is not None:
            self.number_labels(labels)
        self.tasks = tasks
        self.starts = np.cumsum([0, *map(len, self.tables)])

    def number_labels(self, names: Sequence[str]) -> None:
        """Give labels the numbers of their places in a list."""
        self.labels, self._numbers = list(names), {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.read(at)

    def read(self, at: int) -> Row:
        """Return the row of a running number that exists."""
        part = int(np.searchsorted(self.starts, at, side="right")) - 1 if len(self.tables) > 1 else 0
        row = self.tables[part][at - int(self.starts[part])]
        if isinstance(row.get("label"), str):
            row["label"] = self.label(row["label"])
        if self.tasks is not None:
            row["task"] = self.tasks.number(row.get("task"), self.report.source)
        row["row"] = at
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def content(self) -> list[str]:
        """Return the hash of each source's content, as it was read."""
        return [table.content for table in self.tables]

    def column(self, name: str) -> list[Any]:
        """Return a whole stored column of texts, numbers or lists of numbers; None where a row has no value."""
        return [value for table in self.tables for value in table.column(name)]

    def task_numbers(self) -> list[int]:
        """Return the index of each row's task, read from their column alone."""
        assert self.tasks is not None, "only rows of tasks are numbered"
        names = self.column("task")
        numbers = {name: self.tasks.number(name, self.report.source) for name in dict.fromkeys(names)}
        return [numbers[name] for name in names]

    def shapes(self) -> set[tuple[int, ...]]:
        """Return the shapes of the arrays that the files of the rows hold."""
        return {shape for table in self.tables if table.features is not None for shape in table.features.shapes}

    @property
    def reader(self) -> FeatureReader | None:
        """How the files that rows name were read; None where they name none."""
        return self.tables[0].features.reader if self.tables and self.tables[0].features is not None else None

    def label(self, text: str) -> int | float | list[int]:
        """Return a stored label (JSON text) as a class index, a list of them, or a number."""
        value = json.loads(text)
        if self.labels is None:
            number: int | float = value
            return number
        if isinstance(value, list):
            return [self._number(one) for one in value]
        return self._number(value)

    def _number(self, label: str | int) -> int:
        """Return the class index of a label: the place of its name, or the number that stands for one."""
        return self._numbers[str(label)] if str(label) in self._numbers else int(label)

    def lengths(self) -> np.ndarray:
        """Return the total number of tokens of each row, (rows,)."""
        return np.concatenate([t.lengths() for t in self.tables])

    def source_rows(self) -> list[int]:
        """Index of the raw row each token row was made from."""
        return [self[i]["source_row"] for i in range(len(self))]
