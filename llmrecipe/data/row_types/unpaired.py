"""Row type: an answer that is liked or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.answers import encode_answers
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType


@register
class Unpaired(RowType):
    """A prompt with one answer and whether it is liked.

    Canonical row: prompt, completion, label. Token row: prompt_ids, completion_ids, label.
    """

    lists: ClassVar[tuple[str, ...]] = ("prompt_ids", "completion_ids")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("label", "bool"),)
    prompted: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode the answer after its prompt, and count the labels."""

        def columns(row: dict[str, Any], answers: Sequence[list[int]]) -> dict[str, Any]:
            report.labels[str(row["label"]).lower()] += 1
            return {"completion_ids": answers[0], "label": row["label"]}

        encode_answers(encoder, items, report, [[item.row["completion"]] for item in items], columns)
