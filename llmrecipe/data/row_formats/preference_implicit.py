"""Data format: two dialogues that share their start."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.aliases import ALIASES, normal_name
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.preference_pairs import answers_alone, from_preference

ASKING = {"messages", "conversations", *ALIASES["messages"], *ALIASES["prompt"]} - {"source", "user"}
"""Columns that hold what two answers without a dialogue answer; `source` and `user` more often say where a row comes from."""


@register
class PreferenceImplicit(DataFormat):
    """Two dialogues that share their start."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("chosen", "rejected"),)
    becomes: ClassVar[dict[str, int]] = {"preference": 20, "unpaired": 50, "choices": 30, "prompt": 40}
    example: ClassVar[str] = (
        '{"chosen": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}], '
        '"rejected": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Seven."}]}'
    )

    def fits(self, row: Row) -> bool:
        """Leave rows that have a prompt of their own, under any name, to the other formats."""
        return "prompt" not in row and not (answers_alone(row) and any(normal_name(n) in ASKING for n, v in row.items() if v))

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the pair after the turns that both dialogues share."""
        return from_preference(row, conversion)
