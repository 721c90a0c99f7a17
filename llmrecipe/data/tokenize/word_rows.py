"""Encoding of documents with the word of each token, whole or cut into sentences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.special_tokens import Tokens
from llmrecipe.data.tokenize.truncation import fit_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SPECIAL = -1
"""Number of the word of a special token."""
SENTENCE_END = re.compile(r"(?:[.!?]+[\"')\]»”’]*(?=\s)|[。！？]+[」』”’]*|\n)\s*")
"""End of a sentence with the white space after it."""


def frame(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer writes before and after a document.

    Examples:
        A BERT tokenizer gives ([CLS], [SEP]), a GPT-2 tokenizer nothing on either side.
    """
    bare, framed = call_tokenizer(tokens.tokenizer, "a", add_special_tokens=False)["input_ids"], tokens.raw(["a"])[0]
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return framed[:start], framed[start + len(bare) :]


def pair_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Return the special tokens that the tokenizer writes before, between and after two texts.

    Examples:
        A BERT tokenizer gives ([CLS], [SEP], [SEP]).
    """
    bare = call_tokenizer(tokenizer, "a", add_special_tokens=False)["input_ids"]
    framed = call_tokenizer(tokenizer, "a", "a")["input_ids"]
    places = [i for i in range(len(framed)) if framed[i : i + len(bare)] == bare]
    first, second = places[0], places[-1]
    return framed[:first], framed[first + len(bare) : second], framed[second + len(bare) :]


def _need_words(tokens: Tokens) -> None:
    if not tokens.fast:
        raise DataError("tokenizer: words are read from a fast tokenizer (tokenizer.json), and this one is a slow one")


def encode_words(encoder: Encoder, items: Sequence[Item], report: Report, sentences: bool = False) -> None:
    """Fill `done` or `bad` of every item.

    Args:
        sentences: also number the sentence of each token.

    Raises:
        DataError: the tokenizer is a slow one, which cannot say where words are.
    """
    tokens = encoder.tokens
    _need_words(tokens)
    before, after = frame(tokens)
    room = replace(encoder.limit, length=encoder.limit.length - len(before) - len(after), stride=None)
    if room.length < 1:
        raise DataError(f"data.max_length: {encoder.limit.length} leaves no room for a token next to the special tokens")
    texts = [item.row["text"] for item in items]
    found = call_tokenizer(tokens.tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for n, item in enumerate(items):
        ids = list(found["input_ids"][n])
        words = [SPECIAL if word is None or token in tokens.special else word for token, word in zip(ids, found.word_ids(n))]
        named, offsets = item.row.get("attributes"), found["offset_mapping"][n]
        marks = None if named is None else tokens_of_words(texts[n], named, offsets)
        numbers = sentence_numbers(texts[n], offsets) if sentences else []
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
            own = [SPECIAL] * len(before) + [words[i] for i in part] + [SPECIAL] * len(after)
            marked = None if marks is None else [0] * len(before) + [marks[i] for i in part] + [0] * len(after)
            item.done.append({"ids": row, "words": own, "attribute": marked, "features": item.row.get("features")})
            if sentences:
                item.done[-1]["sentences"] = [SPECIAL] * len(before) + [numbers[i] for i in part] + [SPECIAL] * len(after)
            report.tokens += len(row)
            report.trained += sum(words[i] != SPECIAL for i in part)
            report.longest = max(report.longest, len(row))
        encoder.note(report, item.done[0]["ids"], item.where)


def tokens_of_words(text: str, words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return 1 for each token that holds a character of one of the words, wherever it stands whole in the text.

    Args:
        offsets: first character and the one after the last of each token.
    """
    spans = [match.span() for word in words for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    return [int(any(first < end and start < last for start, end in spans)) for first, last in offsets]


def sentence_ends(text: str) -> list[int]:
    """Return where the sentences of a text end, in characters, white space included.

    Examples:
        >>> sentence_ends('He said "stop." She left.')
        [16, 25]
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return ends if ends and ends[-1] == len(text) else [*ends, len(text)]


def sentence_numbers(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the number of the sentence that each token of a text ends in, from the characters (first, last) of each."""
    ends = iter(sentence_ends(text))
    end, number = next(ends), 0
    found = []
    for first, last in offsets:
        while max(first, last - 1) >= end:
            end, number = next(ends), number + 1
        found.append(number)
    return found


def encode_sentences(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Fill `done` or `bad` of every item: the tokens of a document, and how many belong to each of its sentences.

    Raises:
        DataError: the tokenizer is a slow one, which cannot say where words are.
    """
    tokens = encoder.tokens
    _need_words(tokens)
    texts = [item.row["text"] for item in items]
    found = call_tokenizer(tokens.tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for n, item in enumerate(items):
        ids = list(found["input_ids"][n])
        if not ids:
            item.bad = BadRow("the text has no tokens")
            continue
        words = [SPECIAL if word is None or token in tokens.special else word for token, word in zip(ids, found.word_ids(n))]
        lengths = Counter(sentence_numbers(texts[n], found["offset_mapping"][n]))
        item.done.append({"ids": ids, "words": words, "sentences": list(lengths.values())})
        report.tokens += len(ids)
        report.trained += len(ids)
        report.longest = max(report.longest, len(ids))
        encoder.note(report, ids, item.where)
