"""How much a file of data may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmrecipe.core.errors import DataError


@dataclass(frozen=True)
class Bounds:
    """How much a file may ask for: a small compressed file, or one without line ends, can fill any memory."""

    unpacked: int = 1 << 30
    """Bytes of a compressed file once unpacked (`data.max_unpacked`)."""
    line: int = 1 << 26
    """Bytes of one line (`data.max_line`)."""

    def check_line(self, size: int, where: str) -> None:
        """Refuse a line that is too long.

        Raises:
            DataError: it names the key that raises the bound.
        """
        if size > self.line:
            raise DataError(f"{where}: a line of more than {self.line:,} bytes; data.max_line=BYTES allows longer ones")

    def check_unpacked(self, size: int, path: Path) -> None:
        """Refuse a compressed file that is too large.

        Raises:
            DataError: it names the key that raises the bound.
        """
        if size > self.unpacked:
            raise DataError(
                f"{path}: more than {self.unpacked:,} bytes once unpacked; if that is right, data.max_unpacked=BYTES allows it"
            )


BOUNDS = Bounds()
