"""Row type: answers to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.answers import encode_answers
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType

SIZES = ("choice_tokens", "choice_chars", "choice_bytes")
"""Columns with a size of each choice's text."""


def said(answer: str | list[dict[str, Any]]) -> str:
    """Return the text of an answer, plain or of its messages, without white space before it.

    Examples:
        >>> said(" Blue."), said([{"role": "assistant", "content": "Seven."}])
        ('Blue.', 'Seven.')
    """
    text = answer if isinstance(answer, str) else "".join(str(turn.get("content") or "") for turn in answer)
    return text.lstrip()


@register
class Choices(RowType):
    """A prompt with the answers to choose from, the right one first, and its place among the options as they were listed.

    No answer is cut: its likelihood and its length are those of the whole, or the row is left out.

    Canonical row: prompt, choices, right. Token row: prompt_ids, choice_ids (of all choices), choice_lengths, how many of these
    tokens are text rather than an end (choice_tokens), the characters and UTF-8 bytes of each choice's text without white space
    before it (choice_chars, choice_bytes), and right (+ task).
    """

    lists: ClassVar[tuple[str, ...]] = ("prompt_ids", "choice_ids", "choice_lengths", *SIZES)
    uncounted: ClassVar[tuple[str, ...]] = ("choice_lengths", *SIZES)
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("right", "int64"), ("task", "string"))
    prompted: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode every choice after the same prompt ids."""

        def columns(row: dict[str, Any], answers: Sequence[list[int]]) -> dict[str, Any]:
            joined = [token for answer in answers for token in answer]
            texts = [said(choice) for choice in row["choices"]]
            sizes = (map(encoder.text_tokens, answers), map(len, texts), (len(text.encode()) for text in texts))
            found = {name: [*size] for name, size in zip(SIZES, sizes, strict=True)}
            return {"choice_ids": joined, "choice_lengths": [*map(len, answers)], **found, "right": row["right"]}

        encode_answers(encoder, items, report, [item.row["choices"] for item in items], columns, uncut=True)
