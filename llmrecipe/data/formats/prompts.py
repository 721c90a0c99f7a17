"""Prompts from any source the data layer reads: a file, a folder, a built-in set, a hub data set, the rows of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats import detect
from llmrecipe.data.formats.bad_row import BadRow, need_columns
from llmrecipe.data.formats.data_format import Conversion
from llmrecipe.data.formats.splits import open_split
from llmrecipe.recipe.data_section import DataSection

ANSWERS = ("prompt", "completion", "completions", "chosen", "rejected", "label", "margin", "messages", "conversations")
"""Columns that would give a row with a new answer another format."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as in its source."""

    prompt: str | list[dict[str, Any]]
    """Text, or messages that end before the answer."""
    columns: dict[str, Any]
    """The row's other columns; an existing answer is named `reference`."""
    tools: list[Any] | None = None
    """The tools that the answer may call."""
    kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Return the prompt as messages."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt


def read_prompts(
    source: str | DataSection,
    split: str = "train",
    limit: int | None = None,
    where: str = "prompts",
    needs: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Read the prompts of a split of a source, in order.

    Args:
        source: where the rows are, as a path or as a recipe's section.
        limit: maximum number of prompts, from the first.
        where: key path for messages.
        needs: column that every row must hold -> key path of what reads it.

    Raises:
        DataError: there is no such source or split, or a row has no prompt or lacks a column.
    """
    data = DataSection(path=source) if isinstance(source, str) else source
    try:
        parts = open_split(data, split)
    except DataError as error:
        raise DataError(f"{where}: {str(error).removeprefix('data.path: ')}") from error
    found: list[Prompt] = []
    for part in parts:
        shape: Any = None
        for index, row in part.reader.stream():
            if limit is not None and len(found) >= limit:
                return found
            if not part.chosen(row):
                continue
            try:
                row = detect.map_columns(row, data.columns)
                shape = shape or detect.detect([row], "prompt", "auto", f"{where}: {part.reader.name}")
                made = [_prompt(one) for one in shape.convert(row, Conversion("prompt", template=True, spoken=True))]
                for one in made:
                    need_columns(one.columns, needs or {})
                found += made
            except BadRow as bad:
                raise DataError(
                    f"{where}: {part.reader.where(index)}: {bad.reason}{f' ({bad.detail})' if bad.detail else ''}"
                ) from bad
    if not found:
        raise DataError(f"{where}: {data.path} has no rows")
    return found


def _prompt(row: dict[str, Any]) -> Prompt:
    columns = row.get("columns", {})
    kept = {k: v for k, v in columns.items() if k not in ANSWERS}
    if isinstance(columns.get("completion"), str | list):
        kept.setdefault("reference", columns["completion"])
    return Prompt(row["prompt"], kept, row.get("tools"), row.get("kwargs"))
