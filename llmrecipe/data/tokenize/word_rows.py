"""Encoding of documents with the word of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.special_tokens import Tokens
from llmrecipe.data.tokenize.truncation import fit_sequence

SPECIAL = -1
"""Number of the word of a special token."""


def frame(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer writes before and after a document.

    Examples:
        A BERT tokenizer gives ([CLS], [SEP]), a GPT-2 tokenizer nothing on either side.
    """
    bare, framed = tokens.tokenizer("a", add_special_tokens=False)["input_ids"], tokens.raw(["a"])[0]
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return framed[:start], framed[start + len(bare) :]


def encode_words(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Fill `done` or `bad` of every item.

    Raises:
        DataError: the tokenizer is a slow one, which cannot say where words are.
    """
    tokens = encoder.tokens
    if not tokens.fast:
        raise DataError("tokenizer: words are read from a fast tokenizer (tokenizer.json), and this one is a slow one")
    before, after = frame(tokens)
    room = replace(encoder.limit, length=encoder.limit.length - len(before) - len(after))
    if room.length < 1:
        raise DataError(f"data.max_length: {encoder.limit.length} leaves no room for a token next to the special tokens")
    found = tokens.tokenizer([item.row["text"] for item in items], add_special_tokens=False, verbose=False)
    for n, item in enumerate(items):
        ids = list(found["input_ids"][n])
        words = [SPECIAL if word is None or token in tokens.special else word for token, word in zip(ids, found.word_ids(n))]
        try:
            # Cut together: the second list takes the place of a mask, whose first entry a split resets.
            places = fit_sequence(list(range(len(ids))), [1] * len(ids), encoder.truncation, room, item.where, plain=True)
        except BadRow as bad:
            item.bad = bad
            continue
        kept = [part for part, _ in places if any(words[i] != SPECIAL for i in part)]
        if not kept:
            item.bad = BadRow("no token that is not special", "", len(ids))
            continue
        lost = len(ids) - sum(map(len, kept))
        report.truncated += lost > 0
        report.tokens_lost += lost
        for part in kept:
            row = [*before, *(ids[i] for i in part), *after]
            item.done.append({"ids": row, "words": [SPECIAL] * len(before) + [words[i] for i in part] + [SPECIAL] * len(after)})
            report.tokens += len(row)
            report.trained += sum(words[i] != SPECIAL for i in part)
            report.longest = max(report.longest, len(row))
        encoder.note(report, item.done[0]["ids"], item.where)
