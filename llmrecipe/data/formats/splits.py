"""Which rows of which sources are the train, validation or test rows of a recipe: lists, weighted mixtures, shares.

A split given as a share is cut from the training rows by a stable hash of the row's content, so the same row is always on the
same side, whatever the order, and duplicates never straddle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.data.formats.bounds import Bounds
from llmrecipe.data.formats.control_rows import ControlRows
from llmrecipe.data.formats.readers import Reader, Row
from llmrecipe.data.formats.sources import ALIASES, JoinedReader, open_source
from llmrecipe.recipe.data_section import DataSection


class NoSplitError(DataError):
    """The sources have no such split."""


@dataclass(frozen=True)
class Part:
    """The rows that one source contributes to a split."""

    reader: Reader
    weight: float | None = None
    """Share of the mixture, where the recipe gives weights."""
    keep: tuple[float, float] | None = None
    """Interval of row hashes that belongs to this split; None keeps every row."""
    control: tuple[tuple[str, str], ...] = ()
    """(column, how): what does not belong to its row in a control run; see `control_rows`."""

    @cached_property
    def controlled(self) -> ControlRows | None:
        """What a control run does to rows; None where they stay as they are."""
        return ControlRows(dict(self.control), self.reader, self.chosen) if self.control else None

    def rows(self, indices: Sequence[int] | range) -> Iterator[tuple[int, Row]]:
        """Yield the rows at these indices that belong to the split, as they are to be read."""
        for index, row in zip(indices, self.reader.rows(indices)):
            if self.chosen(row):
                yield index, row if self.controlled is None else self.controlled.row(index, row)

    def chosen(self, row: Row) -> bool:
        """Return whether a row belongs to the split."""
        return self.keep is None or self.keep[0] <= unit_hash(row) < self.keep[1]


def unit_hash(row: Row) -> float:
    """Return a number in [0, 1) that depends on the row's content only, not on the order of its keys."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / float(1 << 56)


def paths_of(data: DataSection) -> dict[str, float | None]:
    """Return every source of the recipe with its weight.

    Raises:
        DataError: no path, or weights that are not positive.
    """
    if data.path is None:
        raise DataError("data.path: missing; give a file, a folder, a hub name, builtin:NAME, a list, or {path: weight}")
    if isinstance(data.path, str):
        return {data.path: None}
    if not data.path:
        raise DataError("data.path: the list of sources is empty")
    if isinstance(data.path, list):
        if twice := next((name for name in data.path if data.path.count(name) > 1), None):
            raise DataError(
                f"data.path: {twice} is listed {data.path.count(twice)} times; name it once, and give weights "
                "({file: weight}) where one source is to be read more often than another"
            )
        return dict.fromkeys(data.path)
    bad = [name for name, weight in data.path.items() if weight <= 0]
    if bad:
        raise DataError(f"data.path.{bad[0]}: weight {data.path[bad[0]]} must be larger than 0; leave the source out instead")
    return dict(data.path)


def has_split(data: DataSection, split: str) -> bool:
    """Return whether the recipe has rows for a split, without reading any."""
    try:
        return bool(open_split(data, split))
    except NoSplitError:
        return False


def open_split(data: DataSection, split: str) -> list[Part]:
    """Open the parts of a split.

    Raises:
        DataError: a source is missing or damaged, or none has the split.
    """
    if split not in ALIASES:
        raise DataError(f"split '{split}' is unknown{did_you_mean(split, ALIASES)} (known: {', '.join(ALIASES)})")
    if data.train_on != "train" and split == "train":
        return _joined_parts(data)
    if data.train_on != "train" and split == "validation":
        raise NoSplitError(f"data.train_on: {data.train_on} leaves no validation rows")
    setting = None if split == "train" else getattr(data, split)
    if isinstance(setting, str):
        reader = open_source(setting, split, data.streaming, True, bounds_of(data))
        if reader is None:
            raise DataError(f"data.{split}: {setting} has no {split} rows")
        return [Part(reader)]
    if setting is not None and not setting:
        raise NoSplitError(f"data.{split}: 0 of the rows are left for the {split} split")
    interval = _interval(data, split)
    wanted = "train" if split == "train" or setting is not None else split
    parts = []
    for name, weight in paths_of(data).items():
        reader = open_source(name, wanted, data.streaming and split == "train", False, bounds_of(data))
        if reader is not None:
            trains = split == "train"
            control = tuple(sorted(data.control.items())) if trains else ()
            parts.append(Part(reader, weight if trains else None, interval, control))
    if not parts:
        names = ", ".join(paths_of(data))
        hint = f"set data.{split}=FILE or a share such as data.{split}=0.1" if split != "train" else "name a file of rows"
        raise NoSplitError(f"data.path: {names} has no {split} split; {hint}")
    return parts


def _joined_parts(data: DataSection) -> list[Part]:
    """Open the training and the validation rows as the parts of one split.

    A source that has both is one part; rows of another file for validation are a part of their own.

    Raises:
        DataError: there are no validation rows, they are streamed, or the weights of a mixture do not say how many they are.
    """
    if data.streaming:
        raise DataError(f"data.train_on: {data.train_on} joins files, which a stream does not; set data.streaming=false")
    apart = data.model_copy(update={"train_on": "train"})
    own = open_split(apart, "validation")
    if data.validation is not None and not isinstance(data.validation, str):
        return open_split(data.model_copy(update={"train_on": "train", "validation": 0.0}), "train")
    parts = open_split(apart, "train")
    if isinstance(data.validation, str):
        if any(part.weight is not None for part in parts):
            raise DataError(
                "data.train_on: the sources of data.path have weights, and the file of data.validation has none; name it in "
                "data.path with a weight instead"
            )
        return [*parts, *own]
    held = {name: part for name in paths_of(data) for part in _validation_of(apart, name)}
    return [
        part if name not in held else replace(part, reader=_one_reader(part.reader, held[name].reader))
        for name, part in zip(paths_of(data), parts, strict=True)
    ]


def _validation_of(data: DataSection, name: str) -> list[Part]:
    """Return the validation rows of one source, if it has some."""
    try:
        return open_split(data.model_copy(update={"path": name}), "validation")
    except NoSplitError:
        return []


def _one_reader(training: Reader, validation: Reader) -> Reader:
    """Return a reader of the rows of two."""
    joined = JoinedReader(training.name, [training, validation])
    joined.ignored = training.ignored
    return joined


def _interval(data: DataSection, split: str) -> tuple[float, float] | None:
    """Return the interval of row hashes of a split: test first, then validation, the rest trains."""
    test = data.test if isinstance(data.test, float | int) else 0.0
    validation = data.validation if isinstance(data.validation, float | int) else 0.0
    if test + validation >= 1.0:
        raise DataError(f"data.validation + data.test = {test + validation:g} leaves no rows to train on")
    if split == "train":
        return (test + validation, 1.0) if test + validation else None
    share = test if split == "test" else validation
    start = 0.0 if split == "test" else test
    return (start, start + share) if share else None


def bounds_of(data: DataSection) -> Bounds:
    """Return how much the files of a recipe may ask for."""
    return Bounds(data.max_unpacked, data.max_line)
