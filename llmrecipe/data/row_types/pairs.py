"""Row type: texts to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.labelled_rows import encode_pairs
from llmrecipe.data.tokenize.row_type import RowType


@register
class Pairs(RowType):
    """One to three texts, each a sequence of its own, with a score or a label if any.

    Canonical row: texts, score, label; or one text, with a label if any. Token row: ids_a (+ ids_b, + ids_c), score, and label
    (JSON text).
    """

    lists: ClassVar[tuple[str, ...]] = ("ids_a", "ids_b", "ids_c")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("score", "float64"), ("label", "string"))
    numbered: ClassVar[bool] = True
    takes: ClassVar[dict[str, int]] = {"text": 30, "labelled": 25}

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each text on its own."""
        for item in items:
            if "texts" not in item.row:
                item.row = {"texts": [item.row["text"]], "score": None, "label": item.row.get("label")}
        encode_pairs(encoder, items, report)
