"""Row type: prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.answers import encode_prompts
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType


@register
class Prompt(RowType):
    """Prompts that the model answers itself; the other columns of a row are kept as JSON.

    Canonical row: prompt, columns. Token row: prompt_ids, columns (JSON text).
    """

    lists: ClassVar[tuple[str, ...]] = ("prompt_ids",)
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("columns", "string"),)
    prompted: ClassVar[bool] = True
    keeps_columns: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each prompt up to where the answer begins."""
        encode_prompts(encoder, items, report)
