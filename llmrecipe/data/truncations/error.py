"""Truncation: stop at the row."""

from __future__ import annotations

from llmrecipe.core.errors import DataError
from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.truncation import Limit, Truncation


@register
class Error(Truncation):
    """The run stops at the first row that is too long."""

    def refuse(self, found: int, limit: Limit, where: str) -> DataError:
        """Return the error that names the row."""
        return DataError(
            f"{where}: the row has {found} tokens, data.max_length is {limit.length} and data.truncation is error; "
            "raise data.max_length or choose another data.truncation"
        )
