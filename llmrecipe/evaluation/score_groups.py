"""Scores of a run or a model by the groups of a column, and how far the best and the worst group are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.core.tasks import natural
from llmrecipe.data.formats.splits import open_split
from llmrecipe.data.token_data import TokenData
from llmrecipe.evaluation.eval_recipe import recipe_of
from llmrecipe.evaluation.evaluate_model import metrics_of, open_subject, subject_tasks, token_rows
from llmrecipe.evaluation.evaluate_runs import TaskRows
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.training.intervals import all_ends

MOST = 50
"""Most groups that are scored one by one; a column with more values names no groups."""
GAP = "largest gap"
COUNT = "rows"


def check_column(path: str, overrides: list[str], split: str, column: str) -> None:
    """Refuse a column that the rows of a split lack, before a model is read.

    Raises:
        UserError: the path or the recipe.
        DataError: there is no such split, or no such column.
    """
    for part in open_split(recipe_of(path, overrides).recipe.data, split):
        row = next(iter(part.reader.rows(range(min(1, len(part.reader))))), None)
        if row is not None and column not in row:
            raise _missing(part.reader.where(0), column, row)


def values_of(data: DataSection, split: str, column: str, source_rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the value of a column for each token row of a split.

    Args:
        source_rows: of each source of the split, the raw row of every token row.

    Raises:
        DataError: a row lacks the column, or it has too many values to be groups.
    """
    found: list[str] = []
    for part, rows in zip(open_split(data, split), source_rows, strict=True):
        for index, row in zip(rows, part.reader.rows(list(rows)), strict=True):
            if column not in row:
                raise _missing(part.reader.where(index), column, row)
            found.append(str(row[column]))
    if len({*found}) > MOST:
        raise DataError(
            f"--groups: '{column}' has {len({*found})} values, and at most {MOST} groups are scored; name a column of kinds"
        )
    return found


def _missing(where: str, column: str, row: Mapping[str, Any]) -> DataError:
    return DataError(f"--groups: {where} has no '{column}' (columns: {', '.join(row)}){did_you_mean(column, row)}")


def score_by_group(path: str, overrides: list[str], split: str, column: str) -> list[dict[str, Any]]:
    """Compute every metric over all rows, over the rows of each value of a column, and the largest gap between two groups.

    Raises:
        UserError: as `evaluate_path`; no such column, or one with too many values.
    """
    subject = open_subject(path, overrides)
    data = token_rows(subject, split, subject_tasks(subject))
    if type(data) is not TokenData:
        raise DataError("--groups: rows that are streamed or cut into blocks of several documents belong to no group")
    values = values_of(subject.composition.recipe.data, split, column, [table.column("source_row") for table in data.tables])
    scored: list[dict[str, Any]] = [{"group": "all", **metrics_of(subject, data)}]
    groups = []
    numbers = None if data.tasks is None else data.task_numbers()
    drawn: list[dict[str, np.ndarray]] = []
    for value in sorted({*values}, key=natural):
        drawn.append({})
        rows = [i for i, own in enumerate(values) if own == value]
        tasks = None if numbers is None else [numbers[i] for i in rows]
        groups.append({"group": f"{column}={value}", **metrics_of(subject, TaskRows(data, rows, tasks), drawn[-1])})
    return [*scored, *groups, {"group": GAP, **largest_gaps(groups), **gap_ends(drawn, subject.composition.recipe.seed)}]


def largest_gaps(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return, for each metric, the largest value of a group minus the smallest one; ends of intervals are no metrics.

    Examples:
        >>> largest_gaps([{"group": "a", "rows": 4.0, "accuracy": 0.75}, {"group": "b", "rows": 2.0, "accuracy": 0.5}])
        {'accuracy': 0.25}
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for group in groups for name in group):
        values = [group[name] for group in groups if isinstance(group.get(name), float) and math.isfinite(group[name])]
        if name != COUNT and not name.endswith(("/low", "/high")) and len(values) > 1:
            found[name] = max(values) - min(values)
    return found


def gap_ends(drawn: Sequence[Mapping[str, np.ndarray]], seed: int) -> dict[str, float]:
    """Return the ends of the interval of each largest gap: each sample draws the rows of every group by themselves.

    A gap is never below 0, and groups that are equally good show one by chance: compare its lower end with the gap that groups
    drawn at random have, not with 0.

    Args:
        drawn: of each group, score -> its value in each sample, (B,).
        seed: of the order in which the samples of the groups meet.

    Examples:
        >>> gap_ends([{"f1": np.array([0.5, 0.5])}, {"f1": np.array([0.25, 0.25])}], 0)
        {'f1/low': 0.25, 'f1/high': 0.25}
    """
    gaps: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for group in drawn for name in group):
        own = [(place, group[name]) for place, group in enumerate(drawn) if name in group]
        if len(own) < 2:
            continue
        # Groups of as many rows drew the same places: in the order of the samples their scores would move together.
        mixed = np.stack([np.random.default_rng([seed, place]).permutation(values) for place, values in own])
        gaps[name] = mixed.max(0) - mixed.min(0)
    return all_ends(gaps)
