"""Truncation: cut plain text up."""

from __future__ import annotations

from collections.abc import Sequence

from llmrecipe.core.errors import DataError
from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.truncation import Limit, Piece, Truncation, split_plain


@register
class Split(Truncation):
    """Plain text becomes consecutive rows of `max_length` tokens; other rows are refused."""

    def sequence(self, ids: list[int], trained: list[int], limit: Limit, where: str, plain: bool) -> list[Piece]:
        """Return consecutive pieces (see `split_plain`)."""
        if not plain:
            raise self._plain_only(where)
        return split_plain(ids, trained, limit)

    def answers(
        self, prompt: list[int], answers: Sequence[list[int]], limit: Limit, where: str
    ) -> tuple[list[int], list[list[int]]]:
        """Refuse: an answer is no plain text."""
        raise self._plain_only(where)

    def prompt(self, prompt: list[int], limit: Limit, where: str) -> list[int]:
        """Refuse: the end of a prompt stays."""
        raise DataError(
            f"{where}: data.truncation=split would cut the end of a prompt, where the answer starts; "
            "use truncate_prompt_left or drop"
        )

    def check_texts(self, where: str) -> None:
        """Refuse rows that have one label as a whole."""
        raise DataError(f"{where}: data.truncation=split has no meaning for these rows; use drop, keep_start or error")

    def reads_windows(self, found: int, limit: Limit, where: str) -> None:
        """Allow it."""

    def _plain_only(self, where: str) -> DataError:
        return DataError(f"{where}: data.truncation=split cuts plain text only; use drop, keep_start or truncate_prompt_left")
