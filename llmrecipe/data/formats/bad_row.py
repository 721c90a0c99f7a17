"""What is raised for one row that cannot be used, and what every part of a row is held to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmrecipe.core.errors import did_you_mean


class BadRow(Exception):
    """One row that cannot be used; it is dropped and counted under its reason.

    Args:
        reason: short and the same for all rows with this fault, since rows are counted by it.
        detail: what was found in this row.
        tokens: how many tokens are lost with it, where that is known.
    """

    def __init__(self, reason: str, detail: str = "", tokens: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.tokens = tokens


def spelled(value: object, what: str) -> str:
    """Return a text as it is, a number spelled out.

    Args:
        what: the value, for the message.

    Raises:
        BadRow: it is anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        raise BadRow(f"{what} is not text", f"{value!r:.80}")
    return str(value)


def need_columns(columns: Mapping[str, Any], needs: Mapping[str, str]) -> None:
    """Refuse a prompt row without a column, or with null (or NaN, a null of Parquet tables of numbers) in it.

    Args:
        columns: what the row holds besides its prompt.
        needs: column -> key path of what reads it.

    Raises:
        BadRow: naming the first such column.
    """
    for name, where in needs.items():
        value = columns.get(name)
        if name not in columns:
            held = ", ".join(map(str, columns)) or "only the prompt"
            raise BadRow(f"{where}: the row has no column '{name}'", f"it has {held}{did_you_mean(name, columns)}")
        if value is None or value != value:
            raise BadRow(f"{where}: the column '{name}' is null")
