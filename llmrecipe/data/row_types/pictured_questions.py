"""Row type: questions about a picture, or about features of something else, with answers from a closed set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.labelled_rows import encode_labelled
from llmrecipe.data.tokenize.row_type import RowType


@register
class PicturedQuestions(RowType):
    """A picture or a file of features with a question and the answer, a class among those of all rows.

    Canonical row: features (a path), text, label. Token row: ids (+ type_ids), label (JSON text), features.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "type_ids")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("label", "string"), ("features", "string"))
    uncounted: ClassVar[tuple[str, ...]] = ("type_ids",)
    numbered: ClassVar[bool] = True
    reads_files: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode the questions with the special tokens the tokenizer adds."""
        encode_labelled(encoder, items, report)
        for item in items:
            for row in item.done:
                row["features"] = item.row["features"]
