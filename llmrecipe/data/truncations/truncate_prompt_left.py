"""Truncation: cut off the beginning of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.errors import DataError
from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.tokenize.truncation import NO_ROOM, Limit, Piece, Truncation


@register
class TruncatePromptLeft(Truncation):
    """The prompt loses its beginning; BOS, the assistant's header and the answer stay."""

    keeps_header: ClassVar[bool] = True

    def sequence(self, ids: list[int], trained: list[int], limit: Limit, where: str, plain: bool) -> list[Piece]:
        """Return the end; where the last answer alone is too long, its header and its beginning; of text, the beginning."""
        if plain:
            return [(ids[: limit.length], trained[: limit.length])]
        bos = int(limit.bos is not None and ids[0] == limit.bos)
        room = limit.length - bos
        last = len(ids) - 1
        while last > 0 and not trained[last]:
            last -= 1
        while last > 0 and trained[last - 1]:
            last -= 1
        start = min(len(ids) - room, max(last - max(limit.header, 1), bos))
        kept = slice(start, start + room)
        return [(ids[:bos] + ids[kept], [0] * (bos + 1) + trained[kept][1:])]

    def answers(
        self, prompt: list[int], answers: Sequence[list[int]], limit: Limit, where: str
    ) -> tuple[list[int], list[list[int]]]:
        """Return the end of the prompt, its header at least, and what then fits of each answer."""
        bos = int(limit.bos is not None and bool(prompt) and prompt[0] == limit.bos)
        least = min(len(prompt), bos + max(limit.header, 1))
        if least >= limit.length:
            raise BadRow(NO_ROOM, f"the header alone has {least} tokens, limit {limit.length}")
        kept = limit.prompt(prompt, max(limit.length - max(map(len, answers)), least))
        return kept, [a[: limit.length - len(kept)] for a in answers]

    def prompt(self, prompt: list[int], limit: Limit, where: str) -> list[int]:
        """Return the end of the prompt."""
        return limit.prompt(prompt, limit.length)

    def check_texts(self, where: str) -> None:
        """Refuse rows without prompts."""
        raise DataError(
            f"{where}: data.truncation=truncate_prompt_left has no meaning for these rows; use drop, keep_start or error"
        )

    def reads_windows(self, found: int, limit: Limit, where: str) -> None:
        """Refuse: no part of a passage is cut off."""
        raise DataError(
            f"{where}: data.truncation=truncate_prompt_left has no meaning for passages, which are read in windows; "
            "use auto, drop or error"
        )
