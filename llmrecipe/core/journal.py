"""An append-only file of answers already paid for, which makes a restart cheap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import parse_json


def json_hash(value: object) -> str:
    """Return a 16-hex-digit hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """Key -> JSON value in an append-only file: a line is written whole or, after a kill, left out.

    A line that was cut short is the last one and is removed when the file is opened again to be written.
    """

    def __init__(self, path: Path, write: bool = True):
        self.path = path
        self._values: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b" if write else "rb")  # noqa: SIM115 (see close)
        self._file.seek(0)
        good = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                entry = parse_json(line)
                self._values.update(entry["values"] if "values" in entry else {entry["key"]: entry["value"]})
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{path}: the line after byte {good} is damaged ({error}); delete the file to request the answers again"
                ) from error
            good += len(line)
        if write:
            self._file.truncate(good)
            self._file.seek(good)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        """Yield the keys in the order in which they were added."""
        return iter(list(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: str) -> object:
        return self._values[key]

    def add(self, key: str, value: object) -> None:
        """Keep a value.

        Raises:
            RunError: the disk refuses it.
        """
        self._values[key] = self._write({"key": key, "value": value})["value"]

    def add_together(self, values: Mapping[str, object]) -> None:
        """Keep several values in one line: after a kill all of them are there, or none.

        Raises:
            RunError: the disk refuses them.
        """
        self._values.update(self._write({"values": dict(values)})["values"])

    def _write(self, entry: dict[str, object]) -> dict[str, Any]:
        """Write a line and return it as it will be read."""
        line = json.dumps(entry, ensure_ascii=False, default=str) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}; what was written before is kept") from error
        written: dict[str, Any] = json.loads(line)
        return written

    def close(self) -> None:
        """Close the file."""
        self._file.close()
