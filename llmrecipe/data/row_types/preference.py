"""Row type: a better and a worse answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.answers import encode_answers
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType


@register
class Preference(RowType):
    """A prompt with a better and a worse answer.

    Canonical row: prompt, chosen, rejected (+ margin, p). Token row: prompt_ids, chosen_ids, rejected_ids, margin, p.
    """

    lists: ClassVar[tuple[str, ...]] = ("prompt_ids", "chosen_ids", "rejected_ids")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("margin", "float64"), ("p", "float64"))
    prompted: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode both answers after the same prompt ids."""

        def columns(row: dict[str, Any], answers: Sequence[list[int]]) -> dict[str, Any]:
            chosen, rejected = answers
            return {"chosen_ids": chosen, "rejected_ids": rejected, "margin": row.get("margin"), "p": row.get("p")}

        encode_answers(encoder, items, report, [[item.row["chosen"], item.row["rejected"]] for item in items], columns)
