"""Truncation: cut off the end."""

from __future__ import annotations

from collections.abc import Sequence

from llmrecipe.core.errors import DataError
from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.tokenize.truncation import NO_ROOM, Limit, Piece, Truncation


@register
class KeepStart(Truncation):
    """The end is cut off: an answer may lose its end token, which the report counts."""

    def sequence(self, ids: list[int], trained: list[int], limit: Limit, where: str, plain: bool) -> list[Piece]:
        """Return the beginning."""
        return [(ids[: limit.length], trained[: limit.length])]

    def answers(
        self, prompt: list[int], answers: Sequence[list[int]], limit: Limit, where: str
    ) -> tuple[list[int], list[list[int]]]:
        """Return the prompt, and the beginning of each answer that is too long."""
        if len(prompt) >= limit.length:
            found = len(prompt) + max(map(len, answers))
            raise BadRow(NO_ROOM, f"{len(prompt)} tokens, limit {limit.length}", found)
        return prompt, [a[: limit.length - len(prompt)] for a in answers]

    def prompt(self, prompt: list[int], limit: Limit, where: str) -> list[int]:
        """Refuse: the end of a prompt stays."""
        raise DataError(
            f"{where}: data.truncation=keep_start would cut the end of a prompt, where the answer starts; "
            "use truncate_prompt_left or drop"
        )

    def shortens_texts(self, found: int, limit: Limit, where: str) -> None:
        """Allow it."""

    def reads_windows(self, found: int, limit: Limit, where: str) -> None:
        """Refuse: no part of a passage is cut off."""
        raise DataError(
            f"{where}: data.truncation=keep_start has no meaning for passages, which are read in windows; "
            "use auto, drop or error"
        )
