"""Data format: instruction, input, output, liked or not."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import is_judged, liked
from llmrecipe.data.formats.conversations import from_alpaca
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class UnpairedAlpaca(DataFormat):
    """Instruction, input, output, liked or not."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("instruction", "output", "label"),)
    optional: ClassVar[tuple[str, ...]] = ("input",)
    becomes: ClassVar[dict[str, int]] = {"unpaired": 30}
    example: ClassVar[str] = '{"instruction": "Translate into French.", "input": "blue", "output": "bleu", "label": true}'

    def claims(self, row: Row) -> bool:
        """Claim rows with a true or false: an answer that is disliked must not be learned."""
        return is_judged(row, self)

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the instruction as the prompt, the output as the answer that is judged."""
        return [{**found, "label": liked(row)} for found in from_alpaca(row, conversion)]
