"""Row type: given token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.sequences import encode_sequences


@register
class Tokens(RowType):
    """Token ids that are used as given; labels of -100 are no targets.

    Canonical row: input_ids (+ labels). Token row: ids, trained.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids",)
    masks: ClassVar[tuple[str, ...]] = ("trained",)

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each row as one sequence."""
        encode_sequences(encoder, items, report)
