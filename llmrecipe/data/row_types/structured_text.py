"""Row type: documents whose words and sentences are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.word_rows import encode_words


@register
class StructuredText(RowType):
    """Documents with the word and the sentence that each token belongs to, for objectives that add noise to text.

    Canonical row: text (+ outlier). Token row: ids, with the special tokens the tokenizer adds, words and sentences: one number
    per token, counted in the document; -1 for the special tokens around it, and as the word of those inside. A sentence
    ends as in row type `sentences`. Other columns are not read. `outlier` says whether a text is known not to be
    one of its kind; only evaluation reads it.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "words", "sentences")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("outlier", "bool"),)
    uncounted: ClassVar[tuple[str, ...]] = ("words", "sentences")
    takes: ClassVar[dict[str, int]] = {"text": 10}

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each document, split where `data.truncation` says so."""
        encode_words(encoder, items, report, sentences=True)
        for item in items:
            for row in item.done:
                row["outlier"] = item.row.get("outlier")
