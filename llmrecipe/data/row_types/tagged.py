"""Row type: words with their tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.tagged_rows import encode_tagged


@register
class Tagged(RowType):
    """Words, joined by spaces, with the word of each token and a tag a word.

    Canonical row: words, tags. Token row: ids, with the special tokens the tokenizer adds, words (the index of each token's
    word, -1 for special tokens), label (JSON text: the tags of the words that have a token).
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "words")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("label", "string"),)
    uncounted: ClassVar[tuple[str, ...]] = ("words",)
    numbered: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode the words as one text; those beyond `data.max_length` are cut off with their tags."""
        encode_tagged(encoder, items, report)
