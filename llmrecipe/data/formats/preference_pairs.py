"""Pairs of a better and a worse answer, as rows of every type that can be made of them."""

from __future__ import annotations

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import number_of
from llmrecipe.data.formats.conversations import prompt_answers
from llmrecipe.data.formats.data_format import Conversion, Row
from llmrecipe.data.formats.dialogues import shared_turns
from llmrecipe.data.formats.messages import ROLES, is_messages, is_transcript, messages_of, parse_transcript, shared_text


def from_preference(row: Row, conversion: Conversion) -> list[Row]:
    """Convert a pair with a separate prompt, or one whose dialogues contain it; a file may mix them."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is None and "prompt" in row and answers_alone(row):
        raise BadRow("'prompt' is null, and the answers do not hold it")
    if row.get("prompt") is None or (is_transcript(chosen) and is_transcript(rejected)):
        return _from_dialogues(row, chosen, rejected, conversion)
    return paired(row, row, conversion)


def answers_alone(row: Row) -> bool:
    """Tell whether the two answers of a pair begin with the answer, so that their prompt must be in another column."""
    return not any(_is_whole(row[name]) for name in ("chosen", "rejected"))


def _is_whole(side: object) -> bool:
    """Return whether an answer holds the dialogue before it: a transcript, or messages of which the first is no answer."""
    if is_messages(side):
        return str(side[0].get("role", side[0].get("from"))).lower() not in ANSWERING
    return is_transcript(side)


def paired(prompt_row: Row, row: Row, conversion: Conversion) -> list[Row]:
    """Return the rows of a pair: itself, its prompt, or its two answers as rows or choices of their own.

    Args:
        prompt_row: has the prompt and both answers, of which the prompt may be messages and the answers text.
        row: the raw row.

    Raises:
        BadRow: prompt, answers or numbers that cannot be used.
        DataError: what the recipe wants cannot be made of pairs with probabilities.
    """
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
            # A pair lists no options in an order; after the other one, the right answer does not win by a tie.
            return [{**shared, "choices": [pair["chosen"], pair["rejected"]], "right": 1}]
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


ANSWERING = frozenset(name for name, role in ROLES.items() if role in ("assistant", "tool"))
"""Roles, as written, of the turns that an answer consists of."""


def _from_dialogues(row: Row, chosen: object, rejected: object, conversion: Conversion) -> list[Row]:
    if is_transcript(chosen) and is_transcript(rejected):
        if conversion.template:
            chosen, rejected = parse_transcript(chosen), parse_transcript(rejected)
        else:
            cut = shared_text(chosen, rejected)
            cut = chosen.rfind("Assistant:", 0, cut + 1) + len("Assistant:")
            return paired({**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}, row, conversion)
    if is_messages(chosen) and is_messages(rejected):
        chosen, rejected = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        cut = shared_turns([chosen, rejected])
    elif isinstance(chosen, str) and isinstance(rejected, str):
        cut = shared_text(chosen, rejected)
    else:
        raise BadRow("chosen and rejected are of different kinds", f"{type(chosen).__name__}, {type(rejected).__name__}")
    if not chosen[:cut]:
        raise BadRow("chosen and rejected share no prompt")
    return paired({**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}, row, conversion)
