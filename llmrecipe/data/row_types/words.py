"""Row type: documents whose words are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.word_rows import encode_words


@register
class Words(RowType):
    """Documents with the number of the word that each token belongs to, for objectives that hide tokens or words.

    Canonical row: text. Token row: ids, with the special tokens the tokenizer adds, and words: one number per token, counted
    in the document; -1 for special tokens. Words come from the tokenizer's own splitting, whatever its kind (BPE, unigram,
    WordPiece).
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "words")
    uncounted: ClassVar[tuple[str, ...]] = ("words",)
    takes: ClassVar[dict[str, int]] = {"text": 10}

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each document, split where `data.truncation` says so."""
        encode_words(encoder, items, report)
