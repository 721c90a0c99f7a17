"""Row type: pictures with their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.sequences import encode_sequences


@register
class Multimodal(RowType):
    """Pictures with their text.

    Canonical row: features (a path), text. Token row: ids, trained, features.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids",)
    masks: ClassVar[tuple[str, ...]] = ("trained",)
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("features", "string"),)
    reads_files: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each row as one sequence."""
        encode_sequences(encoder, items, report)
