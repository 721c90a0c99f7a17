"""Data format: token ids, with or without labels."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row

IGNORED = -100
"""Label of a token that is no target."""


@register
class TokenIds(DataFormat):
    """Token ids, with or without labels.

    `labels` say which ids are targets: the id itself, or -100 for one that is none. They are not shifted.
    `weights`, a number from 0 up for each id, is how much it counts in the loss of `sft`.
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("input_ids",),)
    becomes: ClassVar[dict[str, int]] = {"tokens": 10, "text": 20, "dialogue": 50}
    example: ClassVar[str] = '{"input_ids": [5, 9, 2], "labels": [-100, 9, 2]}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the ids as given."""
        ids, labels = row["input_ids"], row.get("labels")
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise BadRow("'input_ids' is not a list of token ids", f"{ids!r:.80}")
        if labels is not None and len(labels) != len(ids):
            raise BadRow("'labels' and 'input_ids' differ in length", f"{len(labels)} and {len(ids)}")
        others = [i for i, label in enumerate(labels or ()) if label not in (IGNORED, ids[i])]
        if labels is not None and others:
            found = f"{labels[others[0]]!r} for {ids[others[0]]} at {others[0]}"
            raise BadRow(f"'labels' are neither {IGNORED} nor the token ids themselves", found)
        weights = row.get("weights") if conversion.weighted else None
        if weights is not None and (not isinstance(weights, list) or len(weights) != len(ids)):
            size = len(weights) if isinstance(weights, list) else repr(weights)
            raise BadRow("'weights' is not a list with a number for each of 'input_ids'", f"{size} for {len(ids)} ids")
        return [{"input_ids": ids, "labels": labels, **({} if weights is None else {"weights": weights})}]
