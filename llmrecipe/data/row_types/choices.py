"""Row type: answers to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.answers import encode_answers
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType


@register
class Choices(RowType):
    """A prompt with the answers to choose from, the right one first.

    Canonical row: prompt, choices. Token row: prompt_ids, choice_ids (of all choices), choice_lengths.
    """

    lists: ClassVar[tuple[str, ...]] = ("prompt_ids", "choice_ids", "choice_lengths")
    uncounted: ClassVar[tuple[str, ...]] = ("choice_lengths",)
    prompted: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode every choice after the same prompt ids."""

        def columns(row: dict[str, Any], answers: Sequence[list[int]]) -> dict[str, Any]:
            joined = [token for answer in answers for token in answer]
            return {"choice_ids": joined, "choice_lengths": [*map(len, answers)]}

        encode_answers(encoder, items, report, [item.row["choices"] for item in items], columns)
