"""Reading single cells: text, labels, the columns of two texts."""

from __future__ import annotations

import math
from typing import Any

from llmrecipe.data.formats.aliases import JUDGEMENTS, names_of, normal_name
from llmrecipe.data.formats.bad_row import BadRow, spelled
from llmrecipe.data.formats.data_format import DataFormat, Row


def text_of(row: Row, column: str) -> str:
    """Return a cell as text; numbers are spelled out.

    Raises:
        BadRow: it is neither.
    """
    return spelled(row.get(column), f"'{column}'")


def filled_text(row: Row, column: str) -> str:
    """Return a cell as text that is more than white space.

    Raises:
        BadRow: it is empty or no text.
    """
    value = text_of(row, column)
    if not value.strip():
        raise BadRow(f"'{column}' is empty")
    return value


def optional_text(row: Row, column: str) -> str:
    """Return a cell as text, empty where it is missing or null (NaN, as tables of numbers write it).

    Raises:
        BadRow: it is neither text nor a number.
    """
    value = row.get(column)
    return "" if value is None or value != value else text_of(row, column)


TRUTHS: dict[Any, bool] = {1: True, 0: False, "true": True, "false": False, "1": True, "0": False, "good": True, "bad": False}


def liked(row: Row) -> bool:
    """Tell whether the label of a row says that its answer is liked.

    Raises:
        BadRow: it is neither true nor false.
    """
    label = row["label"]
    label = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(label, bool | int | str) or label not in TRUTHS:
        raise BadRow("'label' is neither true nor false", f"{row['label']!r:.80}")
    return TRUTHS[label]


def number_of(row: Row, column: str) -> float:
    """Return a cell as a number.

    Raises:
        BadRow: it is none, or not finite.
    """
    value = row[column]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise BadRow(f"'{column}' is not a finite number", f"{value!r:.80}")
    return number


def is_judged(row: Row, found: DataFormat) -> bool:
    """Tell whether a row says with true or false whether its answer is liked.

    Args:
        found: the format of such rows, of whose other columns the row must have one alternative under any of their names.
    """
    held = {normal_name(name) for name in row}
    judged = any(_judges(normal_name(name), value) for name, value in row.items())
    return judged and any(
        all(name in row or held & {*names_of(name, found)} for name in names if name != "label") for names in found.columns
    )


def _judges(name: str, value: object) -> bool:
    text = value.strip().lower() if isinstance(value, str) else value
    if name == "label":
        return text in ("true", "false") or isinstance(value, bool)
    return name in JUDGEMENTS and isinstance(text, bool | int | str) and text in TRUTHS


def label_of(row: Row) -> int | float | str | list[Any]:
    """Return the label of a row.

    Raises:
        BadRow: there is none, or it is no label.
    """
    label = row["label"]
    if label is None:
        raise BadRow("'label' is missing")
    if not isinstance(label, bool | int | float | str | list):
        raise BadRow("'label' is neither text nor a number, nor a list of those", f"{label!r:.80}")
    for one in label if isinstance(label, list) else [label]:
        if isinstance(one, float) and not math.isfinite(one):
            raise BadRow("'label' is not a finite number", f"{label!r:.80}")
    return int(label) if isinstance(label, bool) else label


PAIR_COLUMNS = (("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))


def pair_names(row: Row) -> tuple[str, str]:
    """Return the names of the two columns of text that a row has."""
    return next(names for names in PAIR_COLUMNS if all(n in row for n in names))
