"""Data format: a prompt of P3 with its target."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.conversations import with_choices
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class P3(DataFormat):
    """A prompt with its target and the answers to choose from (P3, the prompts of T0).

    A file holds the rows of one template, which is their task. Source: Multitask Prompted Training Enables Zero-Shot Task
    Generalization (arXiv 2110.08207).
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("inputs_pretokenized", "targets_pretokenized"),)
    becomes: ClassVar[dict[str, int]] = {"choices": 12, "dialogue": 26}
    file_is_task: ClassVar[bool] = True
    example: ClassVar[str] = (
        '{"inputs_pretokenized": "Is the sky blue? Yes or no?", "targets_pretokenized": "Yes", "answer_choices": ["Yes", "No"]}'
    )

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return input, target and choices without the blanks around them; one stands before each answer."""
        options = [f" {text.strip()}" for text in row.get("answer_choices") or ()]
        prompt, target = filled_text(row, "inputs_pretokenized").rstrip(), filled_text(row, "targets_pretokenized").strip()
        return [with_choices({"prompt": prompt, "completion": f" {target}", "options": options}, conversion)]
