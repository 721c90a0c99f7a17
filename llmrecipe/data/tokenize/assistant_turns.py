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
from llmrecipe.data.tokenize.chat_templates import Rendered, Talk, Template
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
class Whole:
    """A text with its ids, from which those of its beginnings follow.

    Text never merges across an added token, and prefixes of one text find the same added tokens. So the ids of a prefix
    are those of the whole up to the last added token inside the prefix, and only what follows it has to be encoded again.
    """

    text: str
    ids: Ids
    places: list[Place]
    """Of its added tokens, after the beginning."""

    def cut(self, prefix: str) -> tuple[int, str]:
        """Return how many first ids a prefix shares for sure, and the text whose ids follow them in it."""
        if prefix == self.text:
            return len(self.ids), ""
        if not self.text.startswith(prefix):  # a header that is not in the whole: nothing can be reused
            return 0, prefix
        at, start, _ = next(place for place in reversed(self.places) if place[2] <= len(prefix))
        return at, prefix[start:]


def boundaries(tokens: Tokens, prefixes: Sequence[tuple[Whole, str]]) -> list[tuple[int, int]]:
    """Return for each prefix of a text how many ids of the whole it shares, and how many it has."""
    cuts = [whole.cut(prefix) for whole, prefix in prefixes]
    rests = tokens.tails(rest for _, rest in cuts if rest)
    own = [rests[rest] if rest else [] for _, rest in cuts]
    return [(at + common_prefix(ids, whole.ids[at:]), at + len(ids)) for (whole, _), (at, _), ids in zip(prefixes, cuts, own)]


def _wholes(tokens: Tokens, texts: Sequence[str]) -> list[tuple[Whole, Encoding]]:
    found = []
    for text, ids, encoding in zip(texts, *tokens.rendered_encodings(texts)):
        places: list[Place] = [(0, 0, 0)]
        for i, token in enumerate(ids):
            if token in tokens.special and (characters := encoding.token_to_chars(i)) is not None:
                places.append((i, *characters))
        found.append((Whole(text, ids, places), encoding))
    return found


@dataclass
class Conversation:
    """One conversation to be rendered and encoded."""

    index: int
    """Position in the batch."""
    messages: list[dict[str, Any]]
    tools: Any = None
    kwargs: Any = None
    where: str = ""

    def until(self, turn: int | None = None) -> Talk:
        """Return what is rendered of its first `turn` messages, of all without it."""
        return self.messages[:turn], self.tools, self.kwargs


@dataclass
class Turns:
    """The ids of a conversation and its assistant turns."""

    ids: Ids
    spans: list[Span]
    moved: bool = False
    """The ids of a header were not a prefix of the whole: the boundary moved into it."""
    whole: Whole | None = None
    """Its text; None with a slow tokenizer, which does not know where its tokens are."""


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
    for one, rendered in zip(batch, template.render_all([one.until() for one in batch], marked=True)):
        if isinstance(rendered, BadRow):
            found[one.index] = rendered
            continue
        text, spans = rendered
        kept.append(one)
        texts.append(text)
        marks.append(spans[-1:] if last_only else spans)
    if kept:
        for one, spans, (whole, encoding) in zip(kept, marks, _wholes(tokens, texts)):
            turns = [s for s in (_overlap(encoding, span) for span in spans) if s[0] < s[1]]
            found[one.index] = Turns(whole.ids, turns, whole=whole)
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
    plans: list[PrefixTexts] = []
    for one, plan in zip(batch, _prefix_texts(template, batch, last_only)):
        if isinstance(plan, BadRow):
            found[one.index] = plan
            continue
        plans.append(plan)
        kept.append(one)
    if not kept:
        return found
    wholes: list[Whole | None] = [None] * len(plans)
    if tokens.fast:
        made = [whole for whole, _ in _wholes(tokens, [full for full, _ in plans])]
        wholes, places = [*made], _boundaries(tokens, plans, made)
    else:
        places = _boundaries_slow(tokens, plans)
    for one, whole, (ids, spans) in zip(kept, wholes, places):
        moved = any(start < length for start, _, length in spans)
        turns = [(start, _end_of_turn(tokens, ids, start, end)) for start, end, _ in spans]
        found[one.index] = Turns(ids, [(start, end) for start, end in turns if start < end], moved, whole)
    return found


PrefixTexts = tuple[str, list[tuple[str, str]]]
"""The whole text of a conversation, and for each turn the text before it (with header) and up to its end."""
Boundaries = tuple[Ids, list[tuple[int, int, int]]]
"""Ids of a conversation, and for each turn: first token, last token + 1, length in tokens of the text before it."""


def _boundaries_slow(tokens: Tokens, plans: Sequence[PrefixTexts]) -> list[Boundaries]:
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


def _boundaries(tokens: Tokens, plans: Sequence[PrefixTexts], wholes: Sequence[Whole]) -> list[Boundaries]:
    """Return the same boundaries from one encoding of the whole texts."""
    requests = [(whole, part) for whole, (_, turns) in zip(wholes, plans) for turn in turns for part in turn]
    places = iter(boundaries(tokens, requests))
    found: list[Boundaries] = []
    for whole, (_, turns) in zip(wholes, plans):
        spans = []
        for _ in turns:
            (start, length), (end, _) = next(places), next(places)
            spans.append((start, end, length))
        found.append((whole.ids, spans))
    return found


def _prefix_texts(template: Template, batch: Sequence[Conversation], last_only: bool) -> list[PrefixTexts | BadRow]:
    """Return the texts of conversations with those before and after each turn, or why the template refuses one of them.

    Raises:
        DataError: the template rewrites earlier turns.
    """
    fulls = template.render_all([one.until() for one in batch])
    turns = [[i for i, m in enumerate(one.messages) if m["role"] == "assistant"] for one in batch]
    if last_only:
        turns = [places[-1:] for places in turns]
    wanted = [(n, i) for n, places in enumerate(turns) if not isinstance(fulls[n], BadRow) for i in places]
    inner = [(n, i) for n, i in wanted if i + 1 < len(batch[n].messages)]
    after = dict(zip(inner, template.render_all([batch[n].until(i + 1) for n, i in inner])))
    later = [(n, i) for n, i in wanted if i]
    before = dict(zip(later, template.render_all([batch[n].until(i) for n, i in later], prompt=True)))
    plans: list[PrefixTexts | BadRow] = [full if isinstance(full, BadRow) else (full[0], []) for full in fulls]
    for n, i in wanted:
        plan = plans[n]
        if not isinstance(plan, BadRow):
            pair = _around(batch[n], i, plan[0], before.get((n, i)), after.get((n, i)))
            plans[n] = pair if isinstance(pair, BadRow) else (plan[0], [*plan[1], pair])
    return plans


def _around(
    one: Conversation, turn: int, full: str, before: Rendered | BadRow | None, after: Rendered | BadRow | None
) -> tuple[str, str] | BadRow:
    """Return the texts before a turn and up to its end; None stands for the empty one, and for the whole one."""
    if isinstance(after, BadRow):
        return after
    closing = full if after is None else after[0]
    if not full.startswith(closing):
        raise DataError(
            f"{one.where}: the chat template writes turn {turn + 1} of {len(one.messages)} differently once the conversation "
            "goes on (it drops or rewrites earlier turns), so training on it would not match what the model sees later. "
            "Train the last turn only (objective.mask=last), or use a template that keeps turns (tokenizer.chat_template)"
        )
    if isinstance(before, BadRow):
        return before
    return "" if before is None else before[0], closing


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
