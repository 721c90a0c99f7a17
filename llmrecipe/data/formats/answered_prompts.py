"""Prompts with answers, as `generate` writes them and as data sets contain them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.prompts import ANSWERS
from llmrecipe.data.formats.splits import open_split
from llmrecipe.recipe.data_section import DataSection


@dataclass(frozen=True)
class Answered:
    """One prompt with its answers."""

    prompt: str | list[dict[str, Any]]
    """As in its source: text, or messages."""
    answers: list[str]
    columns: dict[str, Any]
    """The row's other columns."""

    @property
    def words(self) -> str:
        """Return the prompt as text: the content of a single turn, else every turn with its role."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return str(self.prompt[0].get("content", ""))
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in self.prompt)


def read_answered(source: str, split: str, least: int, limit: int | None = None, where: str = "answers") -> list[Answered]:
    """Read the rows of a split, in order: {prompt, completion}, {prompt, completions} or {prompt, chosen, rejected}.

    Args:
        least: minimum number of answers per row.
        limit: maximum number of rows, from the first.
        where: key path for messages.

    Raises:
        DataError: there is no such source or split, or a row has too few answers.
    """
    try:
        parts = open_split(DataSection(path=source), split)
    except DataError as error:
        raise DataError(f"{where}: {str(error).removeprefix('data.path: ')}") from error
    found: list[Answered] = []
    for part in parts:
        for index, row in part.reader.stream():
            if limit is not None and len(found) >= limit:
                return found
            at = f"{where}: {part.reader.where(index)}"
            found.append(_answered(row, least, at))
    if not found:
        raise DataError(f"{where}: {source} has no rows")
    return found


def _answered(row: dict[str, Any], least: int, at: str) -> Answered:
    prompt = row.get("prompt")
    if not isinstance(prompt, str | list) or not prompt:
        raise DataError(f"{at}: the row has no prompt (columns: {', '.join(row)})")
    listed = row.get("completions")
    given = listed if isinstance(listed, list) else [row[c] for c in ("completion", "chosen", "rejected") if c in row]
    answers = [text for value in given if (text := answer_text(value)) is not None]
    if len(answers) < least or len(answers) < len(given):
        wanted = "an answer (completion)" if least == 1 else f"{least} answers (completions: [...], or chosen and rejected)"
        raise DataError(f"{at}: expected {wanted} (columns: {', '.join(row)}); `llmrecipe generate n={least}` makes such rows")
    return Answered(prompt, answers, {k: v for k, v in row.items() if k not in ANSWERS})


def answer_text(value: object) -> str | None:
    """Return the text of an answer that is text or messages; None where it is neither."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value if isinstance(value, str) else None


def pairs_of(answers: Sequence[str]) -> list[tuple[int, int]]:
    """Return the indices (i, j), i < j, of every two different answers."""
    return [(i, j) for i in range(len(answers)) for j in range(i + 1, len(answers)) if answers[i] != answers[j]]
