"""Row type: prompts with answers to learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.sequences import encode_sequences


@register
class Dialogue(RowType):
    """Conversations, or prompts with their answers; the mask says which tokens are targets.

    Canonical row: messages, or prompt + completion (+ references), or text, or input_ids. Token row: ids, trained (+ weights,
    references, task). An assistant message may have a `weight`, a row of input_ids `weights`: how much the tokens count in the
    loss. `references` are further right answers, which generated answers are compared with (JSON text in the token row).
    """

    lists: ClassVar[tuple[str, ...]] = ("ids",)
    masks: ClassVar[tuple[str, ...]] = ("trained",)
    weights: ClassVar[tuple[str, ...]] = ("weights",)
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("task", "string"), ("references", "string"))
    prompted: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each row as one sequence."""
        encode_sequences(encoder, items, report)
