"""The row types: what an objective may ask for, and what the data layer hands over.

A raw row is a plain dict as it stands in a file. `formats` turns it into the canonical row of a type; `encode` turns that
into a token row. Shapes below: every `*ids` is a list of token ids, `trained` has one 0 or 1 per token, `choice_lengths`
cuts `choice_ids` into choices.

| type | canonical row | token row |
|---|---|---|
| text | text, or input_ids (+ labels) | ids, trained |
| dialogue | messages, or prompt + completion, or text, or input_ids | ids, trained |
| tokens | input_ids (+ labels) | ids, trained |
| preference | prompt, chosen, rejected (+ margin, p) | prompt_ids, chosen_ids, rejected_ids, margin, p |
| unpaired | prompt, completion, label | prompt_ids, completion_ids, label |
| choices | prompt, choices (the right one first) | prompt_ids, choice_ids (of all choices), choice_lengths |
| prompt | prompt, columns | prompt_ids, columns (JSON text of the other columns) |
| labelled | text (+ text_b), label | ids (+ type_ids), label |
| pairs | texts (two or three), score, label | ids_a, ids_b (+ ids_c), score, label |
| multimodal | image, text | ids, trained, image (a path) |

Every token row also has `row`, its position in its data set, and `source_row`, the index of the raw row it was made from;
dialogue rows of a recipe whose stack keeps tasks apart have `task` too: stored by name, handed over as its number.
`trained[0]` is always 0: the first token of a document has nothing that predicts it, so `sum(trained)` counts targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmrecipe.core.errors import DataError, did_you_mean


@dataclass(frozen=True)
class RowType:
    """One row type: its token columns and the file formats that can become it, best first."""

    name: str
    formats: tuple[str, ...]
    lists: tuple[str, ...]
    """Columns of token ids, stored as int32 lists."""
    masks: tuple[str, ...] = ()
    """Columns of 0/1 per token."""
    scalars: tuple[tuple[str, str], ...] = ()
    """(column, Arrow type name)."""


ROW_TYPES: dict[str, RowType] = {
    kind.name: kind
    for kind in (
        RowType("text", ("text", "tokens"), ("ids",), ("trained",)),
        RowType(
            "dialogue",
            ("messages", "sharegpt", "prompt_completion", "alpaca", "tokens", "text"),
            ("ids",),
            ("trained",),
            scalars=(("task", "string"),),
        ),
        RowType("tokens", ("tokens",), ("ids",), ("trained",)),
        RowType(
            "preference",
            ("preference", "preference_implicit"),
            ("prompt_ids", "chosen_ids", "rejected_ids"),
            scalars=(("margin", "float64"), ("p", "float64")),
        ),
        RowType(
            "unpaired",
            ("unpaired", "unpaired_messages", "unpaired_alpaca", "preference", "preference_implicit"),
            ("prompt_ids", "completion_ids"),
            scalars=(("label", "bool"),),
        ),
        RowType("choices", ("choices", "preference", "preference_implicit"), ("prompt_ids", "choice_ids", "choice_lengths")),
        RowType(
            "prompt",
            ("messages", "sharegpt", "alpaca", "preference_implicit", "prompt"),
            ("prompt_ids",),
            scalars=(("columns", "string"),),
        ),
        RowType("labelled", ("labelled", "labelled_pair"), ("ids", "type_ids"), scalars=(("label", "string"),)),
        RowType(
            "pairs",
            ("triples", "pairs"),
            ("ids_a", "ids_b", "ids_c"),
            scalars=(("score", "float64"), ("label", "string")),
        ),
        RowType("multimodal", ("image_text",), ("ids",), ("trained",), scalars=(("image", "string"),)),
    )
}


def row_type(name: str) -> RowType:
    """The row type of that name.

    Raises:
        DataError: there is none; the message lists them.
    """
    if name not in ROW_TYPES:
        raise DataError(f"rows: there is no row type '{name}'{did_you_mean(name, ROW_TYPES)} (known: {', '.join(ROW_TYPES)})")
    return ROW_TYPES[name]


class BadRow(Exception):
    """One row that cannot be used; it is dropped and counted under its reason.

    Args:
        reason: short and the same for all rows with this fault, since rows are counted by it.
        detail: what was found in this row.
        tokens: how many tokens are lost with it, where that is known.
    """

    def __init__(self, reason: str, detail: str = "", tokens: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.tokens = tokens
