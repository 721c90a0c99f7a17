"""Training rows of a control run: a column that no longer says what it said.

A gain counts only if it is lost when there is nothing to learn it from. `rows` gives each row the value that another row has
in the column (labels: Zhang et al. 2016, Understanding deep learning requires rethinking generalization, arXiv 1611.03530), so
that columns stay as they are by themselves and say nothing about each other. `words` fills a text with words of other rows, so
that only how often each word occurs is left. Both are the same in every run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from random import Random

import numpy as np

from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.data.formats.readers import Reader, Row

DONORS = 64
"""Most rows that the words of one text are drawn from."""


class ControlRows:
    """Rows of a source in which the named columns have values of other rows.

    Args:
        columns: column of the source -> rows or words.
        reader: the source.
        belongs: whether a row is one of the split; values of others are not used.
    """

    def __init__(self, columns: Mapping[str, str], reader: Reader, belongs: Callable[[Row], bool]) -> None:
        self.columns, self.reader, self.belongs = columns, reader, belongs

    def check(self, sample: Sequence[Row]) -> None:
        """Refuse a column that the first rows of the source lack, and words of what is no text.

        Raises:
            DataError: the column, with the nearest one, or the value.
        """
        for column, how in self.columns.items():
            values = [row[column] for row in sample if row.get(column) is not None]
            if not values:
                known = list(dict.fromkeys(name for row in sample for name in row))
                raise DataError(
                    f"data.control.{column}: {self.reader.name} has no column '{column}'{did_you_mean(column, known)} "
                    f"(columns: {', '.join(known)})"
                )
            if how == "words" and not all(isinstance(value, str) for value in values):
                raise DataError(
                    f"data.control.{column}=words: the column is no text in {self.reader.name}; set it to rows, which gives "
                    "each row the value of another"
                )

    def row(self, index: int, row: Row) -> Row:
        """Return the row at an index of the source as the control has it."""
        changed = dict(row)
        for column, how in self.columns.items():
            if how == "words" and isinstance(row.get(column), str):
                changed[column] = self._words(index, column, row[column])
            elif how == "rows" and column in row:
                changed[column] = self._other(index, column, row[column])
        return changed

    @cached_property
    def _places(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each column a random order of all rows, and the place of each row in it, (rows,) each."""
        found = {}
        for column in self.columns:
            order = np.random.default_rng(zlib.crc32(column.encode())).permutation(len(self.reader))
            place = np.empty_like(order)
            place[order] = np.arange(len(order))
            found[column] = order, place
        return found

    def _other(self, index: int, column: str, own: object) -> object:
        """Return the value of the next row of the split that has one, in the order of the column."""
        order, place = self._places[column]
        for step in range(1, len(order)):
            other = self.reader.rows([int(order[(place[index] + step) % len(order)])])[0]
            if column in other and self.belongs(other):
                return other[column]
        return own

    def _words(self, index: int, column: str, text: str) -> str:
        """Return as many words as a text has, each drawn from one of `DONORS` rows of the split."""
        count = len(text.split())
        chance = Random(f"{column} {index}")
        numbers = [chance.randrange(len(self.reader)) for _ in range(min(count, DONORS))]
        rows = [row for row in self.reader.rows(numbers) if self.belongs(row)]
        donors = [words for row in rows if isinstance(row.get(column), str) and (words := row[column].split())]
        if not donors:
            return text
        return " ".join(chance.choice(chance.choice(donors)) for _ in range(count))
