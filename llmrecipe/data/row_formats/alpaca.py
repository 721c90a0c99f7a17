"""Data format: instruction, input, output."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.conversations import from_alpaca
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Alpaca(DataFormat):
    """Instruction, input, output.

    `output` may be a list of right answers: the first is trained, and a generated answer is scored against all of them.
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("instruction", "output"),)
    optional: ClassVar[tuple[str, ...]] = ("input",)
    becomes: ClassVar[dict[str, int]] = {"dialogue": 40, "prompt": 30}
    example: ClassVar[str] = '{"instruction": "Translate into French.", "input": "blue", "output": "bleu"}'

    def fits(self, row: Row) -> bool:
        """Leave rows that also have a prompt and a completion to the format of those."""
        return "prompt" not in row or "completion" not in row

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the instruction with its input as the prompt, the output as the answer."""
        return from_alpaca(row, conversion)
