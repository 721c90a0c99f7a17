"""Which tokens are targets. Decided on token ids, never by searching text.

| mask | trained |
|---|---|
| completion | what follows the prompt; in a conversation without a separate prompt, every assistant turn |
| assistant | assistant turns (of the completion, where there is a prompt) |
| last | the last assistant turn |
| all | everything |

An assistant turn is found in one of two ways. A template with `{% generation %}` says which characters it generated;
tokens that overlap them are the turn. Any other template is rendered up to each turn: the turn starts where the ids of
"everything before, plus the assistant's header" and the ids of the whole part, and ends where the ids of "everything up
to and including the turn" and the ids of the whole part. The end-of-turn token belongs to the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmrecipe.data.rows import BadRow
from llmrecipe.data.templates import Template
from llmrecipe.data.tokens import Ids, Tokens
from llmrecipe.errors import DataError

MASKS = ("completion", "assistant", "last", "all")
Span = tuple[int, int]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    low, high = 0, limit  # first[:low] is shared, first[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low


@dataclass
class Conversation:
    """One rendered conversation on its way to ids."""

    index: int
    """Position in the batch."""
    messages: list[dict[str, Any]]
    tools: Any = None
    kwargs: Any = None
    where: str = ""


@dataclass
class Turns:
    """The ids of a conversation and its assistant turns."""

    ids: Ids
    spans: list[Span]
    moved: bool = False
    """The ids of a header were no prefix of the whole: the boundary moved into it."""


def find_turns(tokens: Tokens, batch: Sequence[Conversation], last_only: bool = False) -> dict[int, Turns | BadRow]:
    """Ids and assistant turns of conversations, by `Conversation.index`.

    Raises:
        DataError: the template rewrites earlier turns, so their ids in a conversation are not those at inference.
    """
    assert tokens.template is not None
    if tokens.template.marks and tokens.fast:
        return _by_marks(tokens, tokens.template, batch, last_only)
    return _by_prefixes(tokens, tokens.template, batch, last_only)


def _by_marks(tokens: Tokens, template: Template, batch: Sequence[Conversation], last_only: bool) -> dict[int, Turns | BadRow]:
    found: dict[int, Turns | BadRow] = {}
    kept, texts, marks = [], [], []
    for one in batch:
        try:
            text, spans = template.render_marked(one.messages, one.tools, one.kwargs)
        except BadRow as bad:
            found[one.index] = bad
            continue
        kept.append(one)
        texts.append(text)
        marks.append(spans[-1:] if last_only else spans)
    if kept:
        for one, spans, ids, offsets in zip(kept, marks, *tokens.rendered_with_offsets(texts)):
            found[one.index] = Turns(ids, [s for s in (_overlap(offsets, span) for span in spans) if s[0] < s[1]])
    return found


def _overlap(offsets: Sequence[tuple[int, int]], span: Span) -> Span:
    """Token range that overlaps a character span; offsets rise, so a bisection finds both ends."""
    start, end = span

    def first(test: Any) -> int:
        low, high = 0, len(offsets)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if test(offsets[middle]) else (middle + 1, high)
        return low

    return first(lambda o: o[1] > start), first(lambda o: o[0] >= end)


def _by_prefixes(
    tokens: Tokens, template: Template, batch: Sequence[Conversation], last_only: bool
) -> dict[int, Turns | BadRow]:
    found: dict[int, Turns | BadRow] = {}
    texts: list[str] = []
    plans: list[tuple[Conversation, int, list[tuple[int, int]]]] = []
    for one in batch:
        try:
            full, turns = _prefix_texts(template, one, last_only)
        except BadRow as bad:
            found[one.index] = bad
            continue
        whole = len(texts)
        texts.append(full)
        places = []
        for before, after in turns:
            texts.append(before)
            places.append((len(texts) - 1, whole if after == full else len(texts)))
            if after != full:
                texts.append(after)
        plans.append((one, whole, places))
    ids = tokens.rendered(texts)
    for one, whole, places in plans:
        found[one.index] = _turns_from_prefixes(tokens, ids, whole, places)
    return found


def _prefix_texts(template: Template, one: Conversation, last_only: bool) -> tuple[str, list[tuple[str, str]]]:
    """The whole text, and for each assistant turn the text before it (with header) and up to its end."""
    full = template.render(one.messages, False, one.tools, one.kwargs)
    turns = [i for i, m in enumerate(one.messages) if m["role"] == "assistant"]
    pairs = []
    for i in turns[-1:] if last_only else turns:
        final = i + 1 == len(one.messages)
        after = full if final else template.render(one.messages[: i + 1], False, one.tools, one.kwargs)
        if not full.startswith(after):
            raise DataError(
                f"{one.where}: the chat template writes turn {i + 1} of {len(one.messages)} differently once the conversation "
                "goes on (it drops or rewrites earlier turns), so training on it would not be what the model meets later. "
                "Train the last turn only (objective.mask=last), or use a template that keeps turns (tokenizer.chat_template)"
            )
        before = template.render(one.messages[:i], True, one.tools, one.kwargs) if i else ""
        pairs.append((before, after))
    return full, pairs


def _turns_from_prefixes(tokens: Tokens, ids: list[Ids], whole: int, places: Sequence[tuple[int, int]]) -> Turns:
    full, spans, moved = ids[whole], [], False
    for before, after in places:
        start, end = common_prefix(ids[before], full), common_prefix(ids[after], full)
        moved |= start < len(ids[before])
        end = _end_of_turn(tokens, full, start, end)
        if start < end:
            spans.append((start, end))
    return Turns(full, spans, moved)


def _end_of_turn(tokens: Tokens, ids: Ids, start: int, end: int) -> int:
    """Leaves out white space a template writes behind the end-of-turn token."""
    for i in range(end - 1, start - 1, -1):
        if ids[i] in tokens.special:
            return i + 1 if tokens.is_space(ids[i + 1 : end]) else end
    return end


def bits(length: int, spans: Sequence[Span]) -> list[int]:
    """A 0/1 list with ones inside the spans; the first token of a document is never a target."""
    trained = [0] * length
    for start, end in spans:
        trained[start:end] = [1] * (end - start)
    if trained:
        trained[0] = 0
    return trained
