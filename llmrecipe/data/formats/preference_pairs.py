"""Pairs of a better and a worse answer, as rows of every type that can be made of them."""

from __future__ import annotations

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import number_of
from llmrecipe.data.formats.conversations import prompt_answers
from llmrecipe.data.formats.data_format import Conversion, Row
from llmrecipe.data.formats.dialogues import shared_turns
from llmrecipe.data.formats.messages import is_messages, is_transcript, messages_of, parse_transcript, shared_text


def from_preference(row: Row, conversion: Conversion) -> list[Row]:
    """Convert a pair with a separate prompt, or one whose dialogues contain it; a file may mix them."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is None or (is_transcript(chosen) and is_transcript(rejected)):
        return _from_dialogues(row, chosen, rejected, conversion)
    return _paired(row, row, conversion)


def _paired(prompt_row: Row, row: Row, conversion: Conversion) -> list[Row]:
    if conversion.rows == "prompt":
        rest = {k: v for k, v in row.items() if k != "prompt"}
        return [{**prompt_answers(prompt_row, (), conversion), "columns": rest}]
    pair = prompt_answers(prompt_row, ("chosen", "rejected"), conversion)
    soft = row.get("p")
    if conversion.rows in ("unpaired", "choices"):
        if soft not in (None, 1):
            raise DataError(
                f"'p' is {soft!r:.40}: how likely the chosen answer is the better one says nothing of an answer by itself, "
                "which is liked or not, right or wrong; write labels without it (label_ai: hard: true), or use pairs (dpo, "
                "reward)"
            )
        shared = {k: v for k, v in pair.items() if k not in ("chosen", "rejected")}
        if conversion.rows == "choices":
            return [{**shared, "choices": [pair["chosen"], pair["rejected"]]}]
        return [
            {**shared, "completion": pair["chosen"], "label": True},
            {**shared, "completion": pair["rejected"], "label": False},
        ]
    if row.get("margin") is not None:
        pair["margin"] = number_of(row, "margin")
    if soft is not None:
        pair["p"] = number_of(row, "p")
        if not 0.0 <= pair["p"] <= 1.0:
            raise BadRow("'p' is no probability that the chosen answer is the better one", f"{soft!r:.80}")
    return [pair]


def _from_dialogues(row: Row, chosen: object, rejected: object, conversion: Conversion) -> list[Row]:
    if is_transcript(chosen) and is_transcript(rejected):
        if conversion.template:
            chosen, rejected = parse_transcript(chosen), parse_transcript(rejected)
        else:
            cut = shared_text(chosen, rejected)
            cut = chosen.rfind("Assistant:", 0, cut + 1) + len("Assistant:")
            return _paired({**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}, row, conversion)
    if is_messages(chosen) and is_messages(rejected):
        chosen, rejected = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        cut = shared_turns([chosen, rejected])
        if not cut:
            raise BadRow("chosen and rejected share no prompt")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        cut = shared_text(chosen, rejected)
    else:
        raise BadRow("chosen and rejected are of different kinds", f"{type(chosen).__name__}, {type(rejected).__name__}")
    return _paired({**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}, row, conversion)
