"""Data format: an instruction with its input, a better and a worse answer."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.conversations import alpaca_prompt, is_spoken
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.preference_pairs import answers_alone, paired


@register
class PreferenceAlpaca(DataFormat):
    """An instruction with its input, a better and a worse answer."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("instruction", "chosen", "rejected"),)
    optional: ClassVar[tuple[str, ...]] = ("input",)
    becomes: ClassVar[dict[str, int]] = {"preference": 14, "unpaired": 44, "choices": 24, "prompt": 34}
    example: ClassVar[str] = '{"instruction": "Translate into French.", "input": "blue", "chosen": "bleu", "rejected": "rouge"}'

    def fits(self, row: Row) -> bool:
        """Leave rows whose answers hold the instruction themselves to the formats of those."""
        return "prompt" not in row and answers_alone(row)

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the pair with the instruction and its input as the prompt, a message where the answers are messages."""
        spoken = conversion.spoken or any(is_spoken(row[name]) for name in ("chosen", "rejected"))
        return paired({**row, "prompt": alpaca_prompt(row, replace(conversion, spoken=spoken))}, row, conversion)
