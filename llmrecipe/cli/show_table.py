"""Tables on the terminal."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """A console as wide as the terminal, and wide enough for whole lines in a pipe."""
    from rich.console import Console

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False)


def value_text(value: Any) -> str:
    """A value as it is written in a recipe."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
