"""Encoding of passages with questions: windows of a long passage, the characters of each token, the place of the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.truncation import Limit

if TYPE_CHECKING:
    from transformers import BatchEncoding

NO_PASSAGE = "the question fills data.max_length"
OUTSIDE = -1
"""Character of a token that stands for nothing of the passage."""
Span = tuple[int, int]
"""(first, last) character, the last one excluded."""


@dataclass(frozen=True)
class Read:
    """A question and its passage as the tokenizer joins them: tokens before the passage, its own, and those behind it."""

    before: list[int]
    passage: list[int]
    behind: list[int]
    types: tuple[list[int], list[int], list[int]] | None
    """Token types of the three."""
    spans: list[Span]
    """Characters of each token of the passage."""
    null: int
    """Place of the token that stands for no answer: from the front where it is at least 0, else from the end."""


def token_places(spans: Sequence[Span], answer: Span) -> tuple[int, int] | None:
    """Return the first and the last token that hold characters of an answer, None where no token does.

    A character of several bytes may be several tokens, which all hold it.

    Examples:
        >>> token_places([(0, 3), (3, 6), (6, 9), (9, 10), (9, 10)], (4, 10))
        (1, 4)
    """
    first, last = answer
    inside = [i for i, (a, b) in enumerate(spans) if a < last and b > first and a < b]
    return (inside[0], inside[-1]) if inside else None


def window_starts(count: int, room: int, stride: int | None) -> range:
    """Return where the windows of a passage begin, the last of which reaches its end.

    Args:
        count: tokens of the passage.
        room: tokens of it that a window holds.
        stride: tokens by which windows move on, at most `room`; default: half of it.

    Examples:
        >>> list(window_starts(10, 4, 3)), list(window_starts(3, 4, None))
        ([0, 3, 6], [0])
    """
    step = max(1, room // 2) if stride is None else min(stride, room)
    return range(0, max(count - room, 0) + step, step)


def encode_passages(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Fill `done` or `bad` of every item.

    Raises:
        DataError: the tokenizer is a slow one, which cannot say which characters a token stands for, or has no token for
            windows without the answer.
    """
    tokens, limit = encoder.tokens, encoder.limit
    if not tokens.fast:
        raise DataError("tokenizer: spans are found by a fast tokenizer (tokenizer.json), and this one is a slow one")
    found = call_tokenizer(
        tokens.tokenizer,
        [item.row["question"].strip() for item in items],
        [item.row["context"] for item in items],
        return_offsets_mapping=True,
        verbose=False,
    )
    for n, item in enumerate(items):
        try:
            _keep(encoder, item, _read(encoder, found, n, item.where), limit, report)
        except BadRow as bad:
            item.bad = bad


def _read(encoder: Encoder, found: BatchEncoding, n: int, where: str) -> Read:
    ids, sides, spans = list(found["input_ids"][n]), found.sequence_ids(n), found["offset_mapping"][n]
    own = [i for i, side in enumerate(sides) if side == 1]
    if not own:
        raise BadRow("the context has no token")
    first, last = own[0], own[-1] + 1
    kinds = found["token_type_ids"][n] if "token_type_ids" in found else None
    behind, cls = ids[last:], encoder.tokens.tokenizer.cls_token_id
    types = None if kinds is None else (kinds[:first], kinds[first:last], kinds[last:])
    if cls is not None and cls in ids[:first]:
        null = ids.index(cls)
    elif cls is not None and cls in behind:
        null = behind.index(cls) - len(behind)
    else:
        # What reads from left to right knows at the end alone that a window has no answer.
        if not behind and encoder.tokens.eos is None:
            raise DataError(
                f"{where}: a window without the answer points at a cls or an end token, and this tokenizer has neither; "
                "use one that has"
            )
        null = -1
        if not behind:
            behind = [encoder.tokens.eos]
            types = None if types is None else (types[0], types[1], types[1][-1:])
    return Read(ids[:first], ids[first:last], behind, types, [(int(a), int(b)) for a, b in spans[first:last]], null)


def _keep(encoder: Encoder, item: Item, read: Read, limit: Limit, report: Report) -> None:
    room = limit.length - len(read.before) - len(read.behind)
    if room < 1:
        raise BadRow(NO_PASSAGE, f"{len(read.before) + len(read.behind)} tokens, limit {limit.length}")
    count = len(read.passage)
    if count > room:
        encoder.truncation.reads_windows(len(read.before) + count + len(read.behind), limit, item.where)
    answers: list[tuple[str, int]] = list(zip(item.row["answers"]["text"], item.row["answers"]["answer_start"]))
    answer = None
    if answers:
        text, start = answers[0]
        answer = token_places(read.spans, (start, start + len(text)))
        if answer is None:
            raise BadRow("the answer has no token", f"{text!r:.40} at {start}")
    row: dict[str, Any] = {name: [] for name in ("ids", "type_ids", "windows", "begins", "ends", "starts", "stops", "nulls")}
    for s in window_starts(count, room, limit.stride):
        piece = slice(s, s + room)
        window = [*read.before, *read.passage[piece], *read.behind]
        spans = [span if span[0] < span[1] else (OUTSIDE, OUTSIDE) for span in read.spans[piece]]
        spans = [*[(OUTSIDE, OUTSIDE)] * len(read.before), *spans, *[(OUTSIDE, OUTSIDE)] * len(read.behind)]
        null = read.null if read.null >= 0 else len(window) + read.null
        inside = answer is not None and s <= answer[0] and answer[1] < s + room
        here = [place - s + len(read.before) for place in answer] if inside and answer is not None else [null, null]
        row["ids"] += window
        row["windows"].append(len(window))
        row["begins"] += [a for a, _ in spans]
        row["ends"] += [b for _, b in spans]
        row["starts"].append(here[0])
        row["stops"].append(here[1])
        row["nulls"].append(null)
        if read.types is not None:
            row["type_ids"] += [*read.types[0], *read.types[1][piece], *read.types[2]]
        report.tokens += len(window)
        report.trained += 2
        report.longest = max(report.longest, len(window))
        encoder.note(report, window, item.where)
    if read.types is None:
        row["type_ids"] = None
    row["answers"] = json.dumps([text for text, _ in answers], ensure_ascii=False)
    row["context"] = item.row["context"]
    item.done.append(row)
