"""The features of a source's rows: every file once, prepared, in one memory-mapped file of the cache.

The key of a table is a hash of the content of all files and of what prepares them, so a changed picture is prepared again
though the rows that name it are the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrecipe.core.cache_sweep import LOCK, UNFINISHED, mark_used, sweep
from llmrecipe.core.console import Pace
from llmrecipe.core.errors import DataError
from llmrecipe.core.file_hashes import sha256_of
from llmrecipe.core.file_lock import hold
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.paths import cache_root

if TYPE_CHECKING:
    from llmrecipe.data.features.read_file import FeatureReader

VALUES, FACTS = "values.bin", "facts.json"

logger = logging.getLogger("llmrecipe")


@dataclass(frozen=True)
class Features:
    """The features of one row; the array is read when it is used."""

    table: FeatureTable
    index: int
    slots: int
    """Places of a model's input they take."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.table.shapes[self.index]

    @property
    def path(self) -> str:
        """File they come from."""
        return self.table.paths[self.index]

    @property
    def key(self) -> str:
        """Hash of the file's content."""
        return self.table.contents[self.index]

    def load(self) -> np.ndarray:
        """Return the float32 array: (C, H, W) of a picture, (m, d) of vectors."""
        start, shape = int(self.table.starts[self.index]), self.shape
        return np.array(self.table.values[start : start + int(np.prod(shape))]).reshape(shape)


class FeatureTable:
    """The prepared files of one source."""

    def __init__(
        self,
        key: str,
        paths: list[str],
        contents: list[str],
        shapes: list[tuple[int, ...]],
        values: np.ndarray,
        reader: FeatureReader,
    ) -> None:
        self.key, self.paths, self.contents = key, paths, contents
        self.shapes, self.values, self.reader = shapes, values, reader
        self.starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        self._places = {path: index for index, path in enumerate(paths)}

    def of(self, path: str) -> Features:
        """Return the features of the file that a row names."""
        index = self._places[path]
        return Features(self, index, self.reader.slots(self.shapes[index]))

    def digest(self, path: str) -> int:
        """Return 64 bits of the hash of a file's content."""
        return int(self.contents[self._places[path]][:16], 16)


def feature_table(named: Iterable[tuple[str, str]], reader: FeatureReader, cached: bool, name: str) -> FeatureTable:
    """Prepare the files that rows name, or open the table in which they are.

    Args:
        named: (path, place of a row that names it).
        cached: whether the table is kept on disk.
        name: of the source, for messages.

    Raises:
        DataError: a file is missing, damaged or too large; the message has its row.
    """
    first = dict(reversed(list(named)))
    paths = sorted(first)
    contents = [_content(Path(path), first[path]) for path in paths]
    key = hashlib.sha256(json.dumps([contents, reader.fingerprint, reader_version()]).encode()).hexdigest()
    folder = cache_root() / "features" / key[:2] / key
    if cached and (kept := _open(folder)) is not None:
        return FeatureTable(key, paths, contents, kept[0], kept[1], reader)
    pace = Pace(f"preparing the pictures or features of {name}", len(paths))
    shapes: list[tuple[int, ...]] = []
    parts: list[np.ndarray] = []
    with _Writer(folder if cached else None) as writer:
        for number, path in enumerate(paths, 1):
            array = reader.read(Path(path), first[path])
            shapes.append(array.shape)
            writer.add(array) if cached else parts.append(array.ravel())
            pace.at(number)
        if cached:
            writer.finish(shapes)
    if not cached:
        values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return FeatureTable(key, paths, contents, shapes, values, reader)
    kept = _open(folder)
    assert kept is not None, "a table that was just written is intact"
    sweep((cache_root() / "features").glob("*/*"))
    return FeatureTable(key, paths, contents, *kept, reader)


def _content(path: Path, where: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(
            f"{where}: the file {path} cannot be read ({error.strerror}); put it there, or take the row out"
        ) from error


class _Writer:
    """Writes a table aside and renames it, so that a reader finds all of it or none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.aside = None if folder is None else folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{UNFINISHED}")
        self.file: Any = None
        self.lock: Any = None

    def __enter__(self) -> _Writer:
        if self.aside is not None:
            try:
                self.aside.mkdir(parents=True)
                self.lock = hold(self.aside / LOCK, f"{self.aside}: another process writes it")
                self.file = (self.aside / VALUES).open("wb")
            except OSError as error:
                raise self._no_room(error) from error
        return self

    def add(self, array: np.ndarray) -> None:
        """Append an array."""
        try:
            self.file.write(array.tobytes())
        except OSError as error:
            raise self._no_room(error) from error

    def finish(self, shapes: list[tuple[int, ...]]) -> None:
        """Close the table and rename it to its final name."""
        assert self.aside is not None and self.folder is not None, "tables in memory are not written"
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            facts = {"shapes": shapes, "sha256": sha256_of(self.aside / VALUES)}
            (self.aside / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            self._unlock()
            self.aside.rename(self.folder)
        except OSError as error:
            if _open(self.folder) is None:  # else another process was first; its table is the same
                raise self._no_room(error) from error

    def __exit__(self, *_: object) -> None:
        if self.aside is not None:
            if self.file is not None:
                self.file.close()
            self._unlock()
            shutil.rmtree(self.aside, ignore_errors=True)

    def _unlock(self) -> None:
        if self.lock is not None and self.aside is not None:
            (self.aside / LOCK).unlink(missing_ok=True)
            self.lock.close()
            self.lock = None

    def _no_room(self, error: OSError) -> DataError:
        return DataError(
            f"{self.folder}: the cache of prepared files cannot be written ({error.strerror or error}); free some space, set "
            "LLMRECIPE_CACHE to another folder, or set data.cache=false"
        )


def _open(folder: Path) -> tuple[list[tuple[int, ...]], np.ndarray] | None:
    """Return shapes and values of a table; None where there is none, or after removing a damaged one."""
    if not folder.exists():
        return None
    try:
        facts = parse_json((folder / FACTS).read_bytes())
        shapes = [tuple(map(int, shape)) for shape in facts["shapes"]]
        size = sum(int(np.prod(shape)) for shape in shapes)
        if (folder / VALUES).stat().st_size != 4 * size or sha256_of(folder / VALUES) != facts["sha256"]:
            raise ValueError("its checksums differ")
        mark_used(folder)
        values = np.memmap(folder / VALUES, np.float32, "r", shape=(size,)) if size else np.zeros(0, np.float32)
        return shapes, values
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: these prepared files are damaged (%s); they are prepared again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


@functools.cache
def reader_version() -> str:
    """Return a hash of the modules that read files, and of the versions of the libraries that do."""
    import PIL
    import transformers

    digest = hashlib.sha256(f"{PIL.__version__} {transformers.__version__} {np.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
