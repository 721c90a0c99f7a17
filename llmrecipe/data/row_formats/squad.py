"""Data format: questions about a passage, answered by spans of it."""

from __future__ import annotations

from typing import Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.conversations import prompt_answers, right_answers
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


def spans_of(row: Row) -> tuple[list[str], list[int]]:
    """Return the answers of a row and where each begins in its context, as a mapping of lists or a list of mappings.

    Raises:
        BadRow: they have another shape, or a span of the context is not the answer it stands for.

    Examples:
        >>> spans_of({"context": "Oslo is in Norway.", "answers": {"text": ["Norway"], "answer_start": [11]}})
        (['Norway'], [11])
    """
    given: Any = row["answers"]
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {key: [one.get(key) for one in given] for key in ("text", "answer_start")}
    texts, starts = (given.get("text"), given.get("answer_start")) if isinstance(given, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise BadRow("'answers' are not texts with their places", f"got {given!r:.80}")
    context = str(row["context"])
    for text, start in zip(texts, starts):
        if not isinstance(text, str) or not isinstance(start, int) or context[start : start + len(text)] != text:
            raise BadRow("a span of the context is not its answer", f"{text!r:.40} at {start!r}")
    return texts, starts


@register
class Squad(DataFormat):
    """A passage, a question, and the spans that answer it (SQuAD).

    As prompt and completion the first span is trained, a generated answer is scored against all of them, and a question without
    one is dropped. Rows of prompts keep the passage, the question and all spans in their columns, with the first as `answer`
    (empty where there is none).
    Source: SQuAD: 100,000+ Questions for Machine Comprehension of Text (arXiv 1606.05250).
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("context", "question", "answers"),)
    becomes: ClassVar[dict[str, int]] = {"dialogue": 25, "prompt": 25, "passages": 10}
    example: ClassVar[str] = (
        '{"context": "Oslo is in Norway.", "question": "Where is Oslo?", "answers": {"text": ["Norway"], "answer_start": [11]}}'
    )

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return passage and question as the prompt, the first span as the answer."""
        texts, starts = spans_of(row)
        if conversion.rows == "passages":
            answers = {"text": texts, "answer_start": starts}
            return [{"question": filled_text(row, "question"), "context": filled_text(row, "context"), "answers": answers}]
        prompt = f"{filled_text(row, 'context')}\n\n{filled_text(row, 'question')}"
        if conversion.rows == "prompt":
            rest = {k: v for k, v in row.items() if k != "answers"}
            kept = {**rest, "answers": {"text": texts, "answer_start": starts}, "answer": texts[0] if texts else ""}
            return [{**prompt_answers({"prompt": prompt}, (), conversion), "columns": kept}]
        if not texts:
            raise BadRow("the question has no answer in its context")
        return [right_answers({"prompt": prompt}, texts, conversion)]
