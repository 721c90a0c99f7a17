"""Assistant turns of a conversation, found in its token ids, never by searching text.

An assistant turn is found in one of two ways. A template with `{% generation %}` says which characters it generated;
tokens that overlap them are the turn. Any other template is rendered up to each turn: the turn starts where the ids of
"everything before, plus the assistant's header" and the ids of the whole diverge, and ends where the ids of "everything up
to and including the turn" and the ids of the whole diverge. The end-of-turn token belongs to the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.tokenize.chat_templates import Template
from llmrecipe.data.tokenize.loss_mask import Span
from llmrecipe.data.tokenize.special_tokens import Ids, Tokens

if TYPE_CHECKING:
    from tokenizers import Encoding

Place = tuple[int, int, int]
"""Index of a token, and where its characters begin and end."""


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of leading ids two sequences share."""
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
    """One conversation to be rendered and encoded."""

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
    """The ids of a header were not a prefix of the whole: the boundary moved into it."""


def find_turns(tokens: Tokens, batch: Sequence[Conversation], last_only: bool = False) -> dict[int, Turns | BadRow]:
    """Return ids and assistant turns of conversations, by `Conversation.index`.

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
        for one, spans, ids, encoding in zip(kept, marks, *tokens.rendered_encodings(texts)):
            found[one.index] = Turns(ids, [s for s in (_overlap(encoding, span) for span in spans) if s[0] < s[1]])
    return found


def _overlap(encoding: Encoding, span: Span) -> Span:
    """Return the token range that overlaps a character span."""
    start, end = span
    if start >= end:
        return (0, 0)
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:  # a character the tokenizer leaves out
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)
    # Further bytes of the last character.
    while last + 1 < len(encoding) and (place := encoding.token_to_chars(last + 1)) is not None and place[0] < end:
        last += 1
    return (first, last + 1)


def _by_prefixes(
    tokens: Tokens, template: Template, batch: Sequence[Conversation], last_only: bool
) -> dict[int, Turns | BadRow]:
    found: dict[int, Turns | BadRow] = {}
    kept: list[Conversation] = []
    plans: list[tuple[str, list[tuple[str, str]]]] = []
    for one in batch:
        try:
            plans.append(_prefix_texts(template, one, last_only))
            kept.append(one)
        except BadRow as bad:
            found[one.index] = bad
    if not kept:
        return found
    boundaries = _boundaries if tokens.fast else _boundaries_slow
    for one, (ids, spans) in zip(kept, boundaries(tokens, plans)):
        moved = any(start < length for start, _, length in spans)
        turns = [(start, _end_of_turn(tokens, ids, start, end)) for start, end, _ in spans]
        found[one.index] = Turns(ids, [(start, end) for start, end in turns if start < end], moved)
    return found


Boundaries = tuple[Ids, list[tuple[int, int, int]]]
"""Ids of a conversation, and for each turn: first token, last token + 1, length in tokens of the text before it."""


def _boundaries_slow(tokens: Tokens, plans: Sequence[tuple[str, list[tuple[str, str]]]]) -> list[Boundaries]:
    """Encode every prefix in full, which defines the boundaries."""
    texts = [text for full, turns in plans for text in (full, *(part for turn in turns for part in turn))]
    ids = iter(tokens.rendered(texts))
    found: list[Boundaries] = []
    for _, turns in plans:
        full = next(ids)
        spans = []
        for _ in turns:
            before, after = next(ids), next(ids)
            spans.append((common_prefix(before, full), common_prefix(after, full), len(before)))
        found.append((full, spans))
    return found


def _boundaries(tokens: Tokens, plans: Sequence[tuple[str, list[tuple[str, str]]]]) -> list[Boundaries]:
    """Return the same boundaries from one encoding of the whole text.

    Text never merges across an added token, and prefixes of one text find the same added tokens. So the ids of a prefix
    are those of the whole up to the last added token inside the prefix, and only what follows it has to be encoded again.
    """
    found: list[Boundaries] = []
    for (full, turns), ids, encoding in zip(plans, *tokens.rendered_encodings([full for full, _ in plans])):
        places: list[Place] = [(0, 0, 0)]
        for i, token in enumerate(ids):
            if token in tokens.special and (characters := encoding.token_to_chars(i)) is not None:
                places.append((i, *characters))

        def boundary(
            prefix: str, ids: Ids = ids, full: str = full, places: list[tuple[int, int, int]] = places
        ) -> tuple[int, int]:
            if prefix == full:
                return len(ids), len(ids)
            if not full.startswith(prefix):  # a header that is not in the whole: nothing can be reused
                own = tokens.tail(prefix)
                return common_prefix(own, ids), len(own)
            at, start, _ = next(place for place in reversed(places) if place[2] <= len(prefix))
            own = tokens.tail(prefix[start:]) if start < len(prefix) else []
            return at + common_prefix(own, ids[at:]), at + len(own)

        spans = []
        for before, after in turns:
            start, length = boundary(before)
            spans.append((start, boundary(after)[0], length))
        found.append((ids, spans))
    return found


def _prefix_texts(template: Template, one: Conversation, last_only: bool) -> tuple[str, list[tuple[str, str]]]:
    """Return the whole text, and for each assistant turn the text before it (with header) and up to its end."""
    full = template.render(one.messages, False, one.tools, one.kwargs)
    turns = [i for i, m in enumerate(one.messages) if m["role"] == "assistant"]
    pairs = []
    for i in turns[-1:] if last_only else turns:
        final = i + 1 == len(one.messages)
        after = full if final else template.render(one.messages[: i + 1], False, one.tools, one.kwargs)
        if not full.startswith(after):
            raise DataError(
                f"{one.where}: the chat template writes turn {i + 1} of {len(one.messages)} differently once the conversation "
                "goes on (it drops or rewrites earlier turns), so training on it would not match what the model sees later. "
                "Train the last turn only (objective.mask=last), or use a template that keeps turns (tokenizer.chat_template)"
            )
        before = template.render(one.messages[:i], True, one.tools, one.kwargs) if i else ""
        pairs.append((before, after))
    return full, pairs


def _end_of_turn(tokens: Tokens, ids: Ids, start: int, end: int) -> int:
    """Return the end of a turn without white space that a template writes after the end-of-turn token."""
    for i in range(end - 1, start - 1, -1):
        if ids[i] in tokens.special:
            return i + 1 if tokens.is_space(ids[i + 1 : end]) else end
    return end


def mask_bits(length: int, spans: Sequence[Span]) -> list[int]:
    """Return a 0/1 list with ones inside the spans; the first token of a document is never a target."""
    trained = [0] * length
    for start, end in spans:
        trained[start:end] = [1] * (end - start)
    if trained:
        trained[0] = 0
    return trained
