"""Encoding of texts with labels, and of text pairs and triples. Raw text, with the special tokens the tokenizer adds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.encoder import Encoder, Item

if TYPE_CHECKING:
    from transformers import BatchEncoding


LIST_COLUMNS = ("ids_a", "ids_b", "ids_c")


def _encode(encoder: Encoder, first: Sequence[str], second: Sequence[str] | None, cut: bool) -> BatchEncoding:
    return call_tokenizer(
        encoder.tokens.tokenizer,
        first,
        second,
        return_attention_mask=False,
        truncation="longest_first" if cut else False,
        max_length=encoder.limit.length if cut else None,
        verbose=False,
    )


def encode_labelled(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Encode one text, or two joined as the tokenizer does, with a label; keep_start shortens the longer of two texts."""
    encode_texts(encoder, items, report)
    for item in items:
        for row in item.done:
            _count_label(report, item.row["label"])
            row["label"] = json.dumps(item.row["label"], ensure_ascii=False)


def encode_scored(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Encode one text, or two joined as the tokenizer does, with a number."""
    for item in items:
        label = item.row["label"]
        if isinstance(label, list) or not math.isfinite(number := _number(label)):
            item.bad = BadRow("'label' is not a number", f"{label!r:.80}")
            continue
        item.row = {**item.row, "label": number}
    encode_texts(encoder, [item for item in items if item.bad is None], report)
    for item in items:
        for row in item.done:
            row["score"] = item.row["label"]


def _number(value: str | float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def encode_texts(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Encode one text, or two joined as the tokenizer does; keep_start shortens the longer of two."""
    if not items:
        return
    encoder.truncation.check_texts(items[0].where)
    for paired in (False, True):
        group = [item for item in items if ("text_b" in item.row) is paired]
        if not group:
            continue
        second = [i.row["text_b"] for i in group] if paired else None
        found = _encode(encoder, [i.row["text"] for i in group], second, cut=False)
        types = found.get("token_type_ids")
        for n, item in enumerate(group):
            _keep_text(encoder, item, report, found["input_ids"][n], types[n] if types else None)


def _keep_text(encoder: Encoder, item: Item, report: Report, ids: list[int], types: list[int] | None) -> None:
    try:
        shortened = encoder.shortens(ids, item.where, report)
    except BadRow as bad:
        item.bad = bad
        return
    if shortened:
        second = [item.row["text_b"]] if "text_b" in item.row else None
        cut = _encode(encoder, [item.row["text"]], second, cut=True)
        ids, types = cut["input_ids"][0], cut["token_type_ids"][0] if types else None
    if not ids:
        item.bad = BadRow("the text has no tokens")
        return
    report.tokens += len(ids)
    report.longest = max(report.longest, len(ids))
    encoder.note(report, ids, item.where)
    item.done.append({"ids": ids, "type_ids": types})


def _count_label(report: Report, label: object) -> None:
    for one in label if isinstance(label, list) else [label]:
        report.labels[str(one)] += 1


def encode_pairs(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Encode one to three texts, each on its own."""
    encoder.truncation.check_texts(items[0].where)
    ids = iter(encoder.tokens.raw([text for item in items for text in item.row["texts"]]))
    for item in items:
        texts = [next(ids) for _ in item.row["texts"]]
        try:
            kept = [_fit(encoder, one, item.where, report) for one in texts]
        except BadRow as bad:
            item.bad = bad
            continue
        for one in kept:
            encoder.note(report, one, item.where)
        report.tokens += sum(map(len, kept))
        report.longest = max(report.longest, *map(len, kept))
        label = item.row["label"]
        if label is not None:
            _count_label(report, label)
        done: dict[str, Any] = dict(zip(LIST_COLUMNS, kept))
        text_label = None if label is None else json.dumps(label, ensure_ascii=False)
        item.done.append({**done, "score": item.row["score"], "label": text_label})


def _fit(encoder: Encoder, ids: list[int], where: str, report: Report) -> list[int]:
    return ids[: encoder.limit.length] if encoder.shortens(ids, where, report) else ids
