"""Truncation: what suits the rows."""

from __future__ import annotations

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.truncation import Limit, Piece, Truncation, split_plain


@register
class Auto(Truncation):
    """Plain text is split into consecutive rows, as no answer stands out in it; longer rows of other kinds are left out."""

    def sequence(self, ids: list[int], trained: list[int], limit: Limit, where: str, plain: bool) -> list[Piece]:
        """Return the pieces of plain text; leave others out."""
        if not plain:
            raise self.refuse(len(ids), limit, where)
        return split_plain(ids, trained, limit)

    def reads_windows(self, found: int, limit: Limit, where: str) -> None:
        """Allow it."""
