"""Data format: a prompt, its answer, and the answers to choose from."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.conversations import prompt_answers
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Choices(DataFormat):
    """A prompt, its answer, and the answers to choose from."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "completion", "options"), ("prompt", "completion"))
    becomes: ClassVar[dict[str, int]] = {"choices": 10}
    example: ClassVar[str] = '{"prompt": "Which is a colour?", "completion": "Blue.", "options": ["Blue.", "Seven."]}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the right answer and the other options, each once; a row without options has one choice."""
        others = row.get("options")
        if others is None:
            others = []
        if not isinstance(others, list):
            raise BadRow("'options' is not a list", f"{others!r:.80}")
        every = {"completion": row["completion"]}
        every |= {f"options[{i}]": o for i, o in enumerate(others) if o != row["completion"] and o not in others[:i]}
        found = prompt_answers({**row, **every}, tuple(every), conversion)
        return [{**{k: v for k, v in found.items() if k not in every}, "choices": [found[name] for name in every]}]
