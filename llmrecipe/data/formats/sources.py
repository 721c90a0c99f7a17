"""Opening one source of rows: a file, a folder with split files, a saved or hub data set, a built-in set."""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmrecipe.core.console import lasting
from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.core.foreign import parse_json, reading
from llmrecipe.core.path_hints import near_path
from llmrecipe.core.paths import ASSETS
from llmrecipe.data.formats.bounds import Bounds
from llmrecipe.data.formats.file_content import EXTENSIONS, is_data_file, suffix_kind
from llmrecipe.data.formats.readers import Reader, Row, open_file, without_fillers

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


BUILTIN = ASSETS / "data"
ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


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


def open_source(name: str, split: str, streaming: bool, alone: bool, bounds: Bounds) -> Reader | None:
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
        raise DataError(f"data.path: {name}: no such file or folder{near_path(path)}")
    return None


def _builtin(name: str) -> Path:
    known = sorted(p.name for p in BUILTIN.iterdir() if p.is_dir()) if BUILTIN.is_dir() else []
    if name not in known:
        raise DataError(f"data.path: no built-in set is called '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
    return BUILTIN / name


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
