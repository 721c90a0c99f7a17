"""Row type: pictures, or features of something else, with texts whose words are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.word_rows import encode_words


@register
class PicturedWords(RowType):
    """A picture or a file of features with a text, and the number of the word that each of its tokens belongs to.

    Canonical row: features (a path), text (+ attributes, words of the text). Token row: ids, with the special tokens the
    tokenizer adds; words, as in `words`; attribute, 1 for the tokens of the attributes; features.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "words")
    masks: ClassVar[tuple[str, ...]] = ("attribute",)
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("features", "string"),)
    uncounted: ClassVar[tuple[str, ...]] = ("words",)
    reads_files: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each text, split where `data.truncation` says so; every part keeps the picture."""
        encode_words(encoder, items, report)
