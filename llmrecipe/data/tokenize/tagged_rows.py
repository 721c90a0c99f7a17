"""Encoding of words with tags: which word each token belongs to, from the characters it stands for."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.word_rows import SPECIAL


def words_of_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the word of each token, -1 where it stands for none of their characters.

    A token belongs to the word of its first character that is not a space.

    Args:
        words: joined by single spaces they are the text.
        spans: (first, last) character of each token, the last excluded; empty for special tokens.

    Examples:
        >>> words_of_tokens(["red", "hens"], [(0, 0), (0, 3), (3, 6), (6, 8)])
        [-1, 0, 1, 1]
    """
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    found = []
    for first, last in spans:
        place = bisect_right(starts, first) - 1
        # The space behind a word counts to the next one: tokens of byte-level tokenizers begin with it.
        if place < len(words) and first == starts[place] + len(words[place]):
            place, first = place + 1, first + 1
        found.append(place if first < last and place < len(words) else SPECIAL)
    return found


def encode_tagged(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Fill `done` or `bad` of every item.

    Raises:
        DataError: the tokenizer is a slow one, which cannot say which characters a token stands for.
    """
    tokens, limit = encoder.tokens, encoder.limit
    if not tokens.fast:
        raise DataError("tokenizer: words are found by a fast tokenizer (tokenizer.json), and this one is a slow one")
    encoder.truncation.check_texts(items[0].where)
    texts = [" ".join(item.row["words"]) for item in items]
    found = call_tokenizer(tokens.tokenizer, texts, return_offsets_mapping=True, verbose=False)
    for n, item in enumerate(items):
        words, tags = item.row["words"], item.row["tags"]
        ids, owners = list(found["input_ids"][n]), words_of_tokens(words, found["offset_mapping"][n])
        try:
            shortened = encoder.shortens(ids, item.where, report)
        except BadRow as bad:
            item.bad = bad
            continue
        if shortened:
            cut = call_tokenizer(
                tokens.tokenizer, texts[n], return_offsets_mapping=True, truncation=True, max_length=limit.length, verbose=False
            )
            ids, owners = list(cut["input_ids"]), words_of_tokens(words, cut["offset_mapping"])
        kept = sorted({word for word in owners if word != SPECIAL})
        if not kept:
            item.bad = BadRow("no word has a token")
            continue
        place = {word: i for i, word in enumerate(kept)}
        for word in kept:
            report.labels[str(tags[word])] += 1
        label = json.dumps([tags[word] for word in kept], ensure_ascii=False)
        item.done.append({"ids": ids, "words": [place.get(word, SPECIAL) for word in owners], "label": label})
        report.tokens += len(ids)
        report.trained += len(kept)
        report.longest = max(report.longest, len(ids))
        encoder.note(report, ids, item.where)
