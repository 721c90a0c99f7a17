"""What is raised for one row that cannot be used."""

from __future__ import annotations


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
