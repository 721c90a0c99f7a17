"""The interface of a row type: what an objective may request, and what the data layer returns.

A raw row is a plain dict as in its file. A data format turns it into the canonical row of a type; the type turns
that into a token row. Shapes below: every `*ids` is a list of token ids, `trained` has one 0 or 1 per token,
`choice_lengths` cuts `choice_ids` into choices.

| type | canonical row | token row |
|---|---|---|
| text | text, or input_ids (+ labels) | ids, trained, bytes, words |
| structured_text | text (+ outlier) | ids, words, sentences, outlier |
| dialogue | messages, prompt + completion (+ references), text or input_ids (+ weights) | ids, trained, weights, references |
| tokens | input_ids (+ labels) | ids, trained |
| preference | prompt, chosen, rejected (+ margin, p) | prompt_ids, chosen_ids, rejected_ids, margin, p |
| unpaired | prompt, completion, label | prompt_ids, completion_ids, label |
| choices | prompt, choices (right one first), right | prompt_ids, choice_ids (of all), choice_lengths, choice_*, right |
| prompt | prompt, columns | prompt_ids, columns (JSON text of the other columns) |
| labelled | text (+ text_b), label | ids (+ type_ids), label |
| scored | text (+ text_b), label (a number) | ids (+ type_ids), score |
| tagged | words, tags | ids, words (of each token), label (a class index a word) |
| passages | question, context, answers | ids (of all windows), windows, begins, ends, starts, stops, nulls, answers, context |
| pairs | texts (two or three), score, label; or text (+ label) | ids_a (+ ids_b, + ids_c), score, label |
| multimodal | features (a path), text | ids, trained, features |
| pictured_words | features (a path), text (+ attributes) | ids, words (+ attribute), features |
| pictured_questions | features (a path), text, label | ids (+ type_ids), label, features |
| labelled_images | features (a path), label | features, label |

Every token row also has `row`, its position in its data set, and `source_row`, the index of the raw row it was made from;
dialogue and choices rows of a recipe that keeps tasks apart have `task` too: stored by name, returned as its index. `features`
is stored as a path and returned as `data.features.table.Features`.
`references` is JSON text: the right answers of a dialogue row besides the one that is trained, where it has several.
`weights` has a number per token, how much it counts in the loss; a token of weight 0 is no target. A row without weights has
none or an empty list.
`trained[0]` is always 0: the first token of a document has nothing that predicts it, so `sum(trained)` counts targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.core.registry import CONFIG
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item


@pydantic_dataclass(config=CONFIG, kw_only=True)
class RowType:
    """One row type: its columns, and how canonical rows become token rows."""

    group: ClassVar[str] = "row_type"
    lists: ClassVar[tuple[str, ...]]
    """Columns of token ids (or other whole numbers), stored as int32 lists."""
    masks: ClassVar[tuple[str, ...]] = ()
    """Columns of 0/1 per token."""
    weights: ClassVar[tuple[str, ...]] = ()
    """Columns of a number per token, empty for a row that has none."""
    scalars: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(column, Arrow type: string, float64, int64 or bool)."""
    uncounted: ClassVar[tuple[str, ...]] = ()
    """Those of `lists` that do not count as tokens of the row's length."""
    takes: ClassVar[dict[str, int]] = {}
    """Formats that can become this type though they do not say so themselves -> place in detection (`DataFormat.becomes`)."""
    prompted: ClassVar[bool] = False
    """Whether a row has a prompt that a model can answer."""
    numbered: ClassVar[bool] = False
    """Whether `label` is a class, numbered over all training rows."""
    keeps_columns: ClassVar[bool] = False
    """Whether the other columns of a raw row are kept."""
    windowed: ClassVar[bool] = False
    """Whether a long text is read in overlapping windows in every split; `Limit.stride` is then the recipe's own value."""
    reads_files: ClassVar[bool] = False
    """Whether rows name files next to their source, so that the same rows elsewhere are other rows."""

    @property
    def name(self) -> str:
        """Name the type is registered under."""
        return registry.name_of(type(self))

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode canonical rows: each item gets its token rows in `done`, or the reason against it in `bad`.

        Args:
            encoder: the tokenizer with its template, the mask and the length policy.
            items: rows of one batch, at least one.
            report: counts tokens, cuts and labels.

        Raises:
            DataError: something is wrong with the recipe or the template rather than with a row.
        """
        raise NotImplementedError


def row_type(name: str) -> RowType:
    """Return the row type of that name.

    Raises:
        DataError: there is none; the message lists them.
    """
    known = registry.names("row_type")
    if name not in known:
        raise DataError(f"rows: there is no row type '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
    found: RowType = registry.load_class("row_type", name)()
    return found
