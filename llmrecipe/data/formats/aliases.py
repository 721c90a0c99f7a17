"""Common other names for the columns of a format: one table, applied where no format matches the original names.

The mapping is printed with the format (`format: preference (columns: chosen <- winning_response, ...)`); several columns that
could be the same one are an error that proposes `data.columns`. The recipe's own `data.columns` take precedence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.data_format import DataFormat

Row = Mapping[str, Any]


class UnclearColumns(DataError):
    """A column that a format needs could be any of several."""


_SIDES = (
    "{}",
    "{}_response",
    "{}_answer",
    "{}_completion",
    "{}_output",
    "{}_text",
    "response_{}",
    "answer_{}",
    "completion_{}",
)


def _sided(role: str, *words: str) -> tuple[str, ...]:
    return tuple(name for word in (role, *words) for name in (form.format(word) for form in _SIDES) if name != role)


JUDGEMENTS = ("kto_tag", "liked", "desirable", "is_desirable", "thumbs_up")
"""Names of a label that say that it holds a judgement, which `label` itself may or may not be."""
ALIASES: dict[str, tuple[str, ...]] = {
    "text": (
        "content", "contents", "raw_content", "document", "body", "article", "story", "passage", "sentence", "review",
        "comment", "tweet", "utterance", "code", "raw",
    ),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": (
        "question", "query", "instruction", "input", "source", "problem", "request", "user", "human", "user_prompt",
        "user_message", "user_input", "prompt_text",
    ),
    "completion": (
        "answer", "response", "output", "target", "reply", "solution", "assistant", "gpt", "model_output", "assistant_message",
        "completion_text", "response_text", "answer_text",
    ),
    "options": ("choices", "candidates"),
    "instruction": ("question", "query", "prompt", "task"),
    "input": ("context",),
    "output": ("answer", "response", "completion", "target", "reply"),
    "chosen": (
        *_sided("chosen", "winning", "winner", "preferred", "better", "best", "accepted", "good", "positive", "win", "w"),
        "y_w", "response_j",
    ),
    "rejected": (
        *_sided("rejected", "losing", "loser", "dispreferred", "worse", "worst", "refused", "bad", "negative", "lose", "l"),
        "unpreferred", "non_preferred", "y_l", "response_k",
    ),
    "label": (
        "labels", "class", "category", "target", "y", "sentiment", "intent", "label_id", "label_name", "class_label",
        *JUDGEMENTS,
    ),
    "input_ids": ("ids", "token_ids"),
    "image": ("picture", "img", "photo", "image_path"),
    "sentence1": ("text1", "text_1", "sentence_1", "sentence_a", "s1"),
    "sentence2": ("text2", "text_2", "sentence_2", "sentence_b", "s2"),
    "score": ("similarity", "similarity_score", "relatedness_score"),
    "anchor": ("query", "question"),
    "positive": ("pos", "document", "passage", "positive_passage", "positive_document"),
    "negative": ("neg", "hard_negative", "negative_passage", "negative_document"),
}  # fmt: skip
"""Column of a format -> names it has in other data sets, in lower case with underscores."""
LISTS = ("messages", "conversations", "options", "input_ids")
"""Columns of lists; all others contain text, a message list, or one value."""


def names_of(column: str, found: DataFormat) -> tuple[str, ...]:
    """Return the names that data sets have for a column of a format."""
    return (*found.aliases.get(column, ()), *ALIASES.get(column, ()))


def normal_name(name: str) -> str:
    """Return a column name in the spelling of the table."""
    return "_".join(name.lower().replace("-", " ").replace(".", " ").replace("_", " ").split())


def recognise(
    sample: Sequence[Row], formats: Sequence[DataFormat], where: str, keeps_columns: bool = False
) -> tuple[DataFormat, dict[str, str]] | None:
    """Find the format that the columns of some rows match under other names, with the mapping {wanted: column}.

    Of several, the one with fewest unused known columns is chosen, then the one with fewest renames.

    Args:
        sample: first rows.
        formats: those that are possible, best first.
        where: place of the first row, for messages.
        keeps_columns: other columns are kept, so none is unused.

    Raises:
        UnclearColumns: a column could be any of several, and no other format fits.
    """
    known = {(role, one) for one in formats for columns in one.columns for role in (*columns, *one.optional)}
    spelled = {normal_name(alias) for role, one in known for alias in (role, *names_of(role, one))}
    row = {c: next((r[c] for r in sample if r.get(c) is not None), None) for c in sample[0]}
    found: list[tuple[int, int, DataFormat, dict[str, str]]] = []
    unclear: list[dict[str, list[str]]] = []
    for one in formats:
        for columns in one.columns:
            choices = {w: _candidates(w, row, columns, one) for w in columns if w not in row}
            if not choices or not all(choices.values()):
                continue
            if any(len(c) > 1 for c in choices.values()):
                unclear.append(choices)
                continue
            mapping = {w: c[0] for w, c in choices.items()}
            for wanted in (w for w in one.optional if w not in row):
                more = [c for c in _candidates(wanted, row, columns, one) if c not in mapping.values()]
                mapping |= {wanted: more[0]} if len(more) == 1 else {}
            if len(set(mapping.values())) < len(mapping):
                continue
            used = {*columns, *mapping.values(), *one.optional}
            unused = 0 if keeps_columns else sum(c not in used and normal_name(c) in spelled for c in row)
            found.append((unused, len(mapping), one, mapping))
    if found:
        _, _, best, mapping = min(found, key=lambda one: one[:2])
        return best, mapping
    if unclear:
        raise UnclearColumns(_unclear(unclear[0], where))
    return None


def _candidates(wanted: str, row: Row, columns: Sequence[str], found: DataFormat) -> list[str]:
    """Return columns that may be the wanted one by name and by content."""
    names = names_of(wanted, found)
    return [c for c, value in row.items() if c not in columns and normal_name(c) in (wanted, *names) and _holds(wanted, value)]


def _holds(wanted: str, value: object) -> bool:
    if wanted in LISTS:
        return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
    if wanted in ("label", "score", "image"):
        return value is not None
    messages = isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
    return isinstance(value, str) or (messages and wanted in ("prompt", "completion", "chosen", "rejected"))


def _unclear(choices: Mapping[str, list[str]], where: str) -> str:
    wanted, several = next((w, c) for w, c in choices.items() if len(c) > 1)
    ways = [{**{w: c[0] for w, c in choices.items()}, wanted: one} for one in several]
    proposals = " or ".join("data.columns='{" + ", ".join(f"{w}: {c}" for w, c in way.items()) + "}'" for way in ways)
    return f"{where}: '{wanted}' could be any of the columns {', '.join(several)}; say which: {proposals}"
