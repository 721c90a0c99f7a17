"""Where rows come from: files, folders with split files, hub data sets, built-in sets, lists and weighted mixtures.

`open_split` determines which rows are the train (or validation, or test) rows of a recipe, and the location of each.
A split given as a share is cut from the training rows by a stable hash of the row's content, so the same row is always on
the same side, whatever the order, and duplicates never straddle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmrecipe.core.console import lasting
from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.core.foreign import parse_json, reading
from llmrecipe.core.paths import ASSETS
from llmrecipe.data.formats.bounds import Bounds
from llmrecipe.data.formats.control_rows import ControlRows
from llmrecipe.data.formats.file_content import EXTENSIONS, is_data_file, suffix_kind
from llmrecipe.data.formats.readers import Reader, Row, open_file, without_fillers
from llmrecipe.recipe.schema import DataSection

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


BUILTIN = ASSETS / "data"
ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


class NoSplitError(DataError):
    """The sources have no such split."""


class JoinedReader(Reader):
    """Several readers in sequence (the shards of a split)."""

    def __init__(self, name: str, readers: Sequence[Reader]) -> None:
        self.name, self.readers, self.base = name, list(readers), readers[0].base
        self._starts = np.cumsum([0, *map(len, self.readers)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Reader, int]:
        part = bisect_right(self._starts, index) - 1
        return self.readers[part], index - int(self._starts[part])

    def where(self, index: int) -> str:
        """Return the location of a row in its own file."""
        reader, local = self._find(index)
        return reader.where(local)

    def source(self, index: int) -> str:
        """Return the file of a row."""
        reader, local = self._find(index)
        return reader.source(local)

    def sources(self) -> list[str]:
        """Return the files of all rows."""
        return [name for reader in self.readers for name in reader.sources()]

    def rows(self, indices: Sequence[int] | range) -> list[Row]:
        """Return rows from any shard."""
        return [reader.rows([local])[0] for reader, local in map(self._find, indices)]

    def fingerprint(self, remember: bool = False) -> str:
        """Return a hash over the shards."""
        return hashlib.sha256("".join(r.fingerprint(remember) for r in self.readers).encode()).hexdigest()


class DatasetReader(Reader):
    """A `datasets` data set: from the hub, or a folder written by `save_to_disk`."""

    def __init__(self, name: str, data: Dataset) -> None:
        self.name, self.data = name, data

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, indices: Sequence[int] | range) -> list[Row]:
        """Return rows as dicts."""
        part = self.data[list(indices)]
        return without_fillers([dict(zip(part, values)) for values in zip(*part.values())])

    def fingerprint(self, remember: bool = False) -> str:
        """Return a hash of the library's own content fingerprint and the split's size."""
        return hashlib.sha256(f"{self.name}|{self.data._fingerprint}|{len(self.data)}".encode()).hexdigest()


class HubStream(Reader):
    """A streamed hub data set; only `stream` works."""

    def __init__(self, name: str, data: IterableDataset) -> None:
        self.name, self.data = name, data

    def fingerprint(self, remember: bool = False) -> str:
        """Return a hash of the name: the content of a stream is not known before it is read."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def stream(self) -> Iterator[tuple[int, Row]]:
        """Yield rows in the order of the hub."""
        yield from ((index, without_fillers([row])[0]) for index, row in enumerate(self.data))


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
        reader = _open(setting, split, data.streaming, True, bounds_of(data))
        if reader is None:
            raise DataError(f"data.{split}: {setting} has no {split} rows")
        return [Part(reader)]
    if setting is not None and not setting:
        raise NoSplitError(f"data.{split}: 0 of the rows are left for the {split} split")
    interval = _interval(data, split)
    wanted = "train" if split == "train" or setting is not None else split
    parts = []
    for name, weight in paths_of(data).items():
        reader = _open(name, wanted, data.streaming and split == "train", False, bounds_of(data))
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


def _open(name: str, split: str, streaming: bool, alone: bool, bounds: Bounds) -> Reader | None:
    """Open the rows of one source for a split; `alone` means the source was named for this split."""
    path = place(name)
    if path is None:
        return _open_hub(name, split, streaming, alone)
    if path.is_dir():
        return _open_folder(path, split, alone, bounds)
    return open_file(path, bounds) if split == "train" or alone else None


def place(name: str) -> Path | None:
    """Return the file or folder a source names; None where it can only be a hub name.

    Raises:
        DataError: no such file, folder or built-in set.
    """
    if name.startswith("builtin:"):
        return _builtin(name.removeprefix("builtin:"))
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        raise DataError(f"data.path: {name}: a link to {os.readlink(path)}, which does not exist or is a link to itself")
    if path.exists():
        raise DataError(
            f"data.path: {name}: a pipe or device, not a file; rows are read more than once, so write them to a file first"
        )
    if path.suffix or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"data.path: {name}: no such file or folder{_near_file(path)}")
    return None


def _builtin(name: str) -> Path:
    known = sorted(p.name for p in BUILTIN.iterdir() if p.is_dir()) if BUILTIN.is_dir() else []
    if name not in known:
        raise DataError(f"data.path: no built-in set is called '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
    return BUILTIN / name


def _near_file(path: Path) -> str:
    parent = path.parent
    return (
        did_you_mean(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else f"; {parent} does not exist either"
    )


def _open_folder(folder: Path, split: str, alone: bool, bounds: Bounds) -> Reader | None:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _open_saved(folder, split, alone)
    held = sorted(p for place in (folder, folder / "data") if place.is_dir() for p in place.iterdir())
    every = [p for p in held if p.is_file()]
    deeper = [p for p in held if p.is_dir() and p != folder / "data" and not p.name.startswith(".") and _has_data(p)]
    files = [path for path in every if is_data_file(path)]
    found = {name: [p for p in files if _split_of(p) == name] for name in ALIASES}
    chosen = found[split]
    if not any(found.values()) and (split == "train" or alone):
        chosen = files
    elif not chosen and alone and len([f for f in found.values() if f]) == 1:
        chosen = next(f for f in found.values() if f)
    if not chosen:
        if split == "train":
            names = ", ".join(p.name for p in files) or "nothing that can be read"
            inner = f", and rows in its folders {', '.join(p.name for p in deeper)}: name one of those" if deeper else ""
            raise DataError(
                f"{folder}: no training file (train.jsonl, .csv, .parquet, ...); the folder contains {names}{inner}"
            )
        return None
    chosen = [p for p in chosen if p.stat().st_size] or chosen
    readers = [open_file(p, bounds) for p in chosen if p.stat().st_size]
    if not readers:
        return None if split != "train" else open_file(chosen[0], bounds)
    reader = readers[0] if len(readers) == 1 else JoinedReader(str(folder), readers)
    splits = {path for paths in found.values() for path in paths}
    reader.ignored = [p.name for p in every if p not in {*chosen, *splits} and not _is_hidden(p)]
    reader.ignored += [f"{p.name}/" for p in deeper]
    return reader


def _is_hidden(path: Path) -> bool:
    """Return whether a file is one that programs leave behind (`.DS_Store`, `_SUCCESS`), which nobody misses."""
    return path.name.startswith(".") or (path.name.startswith("_") and suffix_kind(path.name) not in EXTENSIONS)


def _has_data(folder: Path) -> bool:
    try:
        return any(is_data_file(path) for path in folder.iterdir())
    except OSError:
        return False


def _split_of(path: Path) -> str | None:
    """Return the split of a file name: `train.jsonl`, `train-00000-of-00002.parquet`, `dev_1.csv`."""
    stem = path.name.lower().split(".")[0].replace("_", "-").split("-")[0]
    return next((split for split, names in ALIASES.items() if stem in names), None)


def task_of_source(name: str) -> str:
    """Return the task that a file or hub data set is named after; a file named after a split has that of its folder.

    Examples:
        >>> task_of_source("tasks/task001_quoref.json"), task_of_source("p3/ag_news_classify/train.jsonl.gz")
        ('task001_quoref', 'ag_news_classify')
        >>> task_of_source("bigscience/P3:ag_news_classify[train]")
        'ag_news_classify'
    """
    path = Path(re.sub(r"\[\w+\]$", "", name))
    own = path.parent.name if _split_of(path) is not None and path.parent.name else path.name.split(".")[0]
    return own.rpartition(":")[2]


def _open_saved(folder: Path, split: str, alone: bool) -> Reader | None:
    from datasets import DatasetDict, load_from_disk

    with reading(f"data.path: {folder}", "write it again with save_to_disk", DataError):
        for state in (folder / "state.json", *folder.glob("*/state.json")):
            for file in parse_json(state.read_bytes())["_data_files"] if state.is_file() else ():
                if not (state.parent / str(file["filename"])).resolve().is_relative_to(folder.resolve()):
                    raise DataError(f"{state}: '{file['filename']}' is outside of its folder; only files in it are read")
        data = load_from_disk(str(folder))
    if not isinstance(data, DatasetDict):
        return DatasetReader(str(folder), data) if split == "train" or alone else None
    name = next((alias for alias in ALIASES[split] if alias in data), None)
    return DatasetReader(f"{folder}[{name}]", data[name]) if name else None


def _open_hub(name: str, split: str, streaming: bool, alone: bool) -> Reader | None:
    """Open `owner/name` or `owner/name:config` through `datasets`; data scripts are never run."""
    from datasets import get_dataset_split_names, load_dataset

    path, _, config = name.partition(":")
    try:
        splits = get_dataset_split_names(path, config or None)
        found = next((alias for alias in ALIASES[split] if alias in splits), None)
        if found is None and alone and len(splits) == 1:
            found = splits[0]
        if found is None:
            if split == "train":
                raise DataError(f"data.path: {name} has the splits {', '.join(splits)} and no train split")
            return None
        with lasting(f"downloading or opening {name}"):
            data = load_dataset(path, config or None, split=found, streaming=streaming)
    except DataError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated classes
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path: '{name}' is neither a file or folder here nor a data set the hub gave ({first}); "
            "check the spelling, the network, or name a file"
        ) from error
    label = f"{name}[{found}]"
    return HubStream(label, data) if streaming else DatasetReader(label, data)
