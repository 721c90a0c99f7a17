"""Encoding of prompts with answers to compare or to judge, and of prompts alone.

The prompt of a pair ends where the ids of the prompt and of either joined sequence diverge: the shorter of the two common
prefixes, so that both answers follow the same prompt ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.assistant_turns import common_prefix
from llmrecipe.data.tokenize.chat_templates import Talk
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.truncation import CUT, fit_answers, fit_prompt

Columns = Callable[[dict[str, Any], Sequence[list[int]]], dict[str, Any]]
"""(canonical row, token ids of its answers) -> columns of the token row besides `prompt_ids`."""


def encode_answers(
    encoder: Encoder,
    items: Sequence[Item],
    report: Report,
    answers: Sequence[list[Any]],
    columns: Columns,
    *,
    uncut: bool = False,
) -> None:
    """Encode prompts with one or more answers each.

    Args:
        answers: the answers of every item, all text or all messages like its prompt.
        columns: called once for every row that is kept.
        uncut: a row of which an answer would lose its end is left out.
    """
    for spoken, count in dict.fromkeys((isinstance(i.row["prompt"], list), len(a)) for i, a in zip(items, answers)):
        pairs = zip(items, answers)
        group = [(i, a) for i, a in pairs if (isinstance(i.row["prompt"], list), len(a)) == (spoken, count)]
        own = [item for item, _ in group]
        prompts, joined = (_rendered if spoken else _raw)(encoder, own, [a for _, a in group])
        for item, prompt, *whole in zip([item for item in own if item.bad is None], prompts, *joined):
            _finish(encoder, item, report, prompt, whole, columns, uncut)


def _raw(
    encoder: Encoder, items: Sequence[Item], answers: Sequence[list[Any]]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    prompts: list[str] = [item.row["prompt"] for item in items]
    joined = [[prompt + answer for prompt, answer in zip(prompts, column)] for column in zip(*answers)]
    return encoder.tokens.raw_prompts(prompts), [encoder.tokens.documents(texts) for texts in joined]


def _rendered(
    encoder: Encoder, items: Sequence[Item], answers: Sequence[list[Any]]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    encoder.need_template(items[0].where)
    template = encoder.tokens.template
    assert template is not None
    talks: list[Talk] = [(item.row["prompt"], item.row.get("tools"), item.row.get("kwargs")) for item in items]
    wholes = [
        template.render_all([(prompt + answer, *extra) for (prompt, *extra), answer in zip(talks, column)])
        for column in zip(*answers)
    ]
    texts: list[list[str]] = []
    for item, *rendered in zip(items, *wholes, template.render_all(talks, prompt=True)):
        item.bad = next((one for one in rendered if isinstance(one, BadRow)), None)
        if item.bad is None:
            *whole, prompt = (one[0] for one in rendered if not isinstance(one, BadRow))
            texts.append([prompt, *whole])
    if not texts:
        return [], [[] for _ in answers[0]]
    prompts, *joined = (encoder.tokens.rendered(list(column)) for column in zip(*texts))
    return prompts, joined


def _finish(
    encoder: Encoder,
    item: Item,
    report: Report,
    prompt: list[int],
    whole: Sequence[list[int]],
    columns: Columns,
    uncut: bool,
) -> None:
    start = min(common_prefix(prompt, ids) for ids in whole)
    report.prompts += 1
    report.moved += start < len(prompt)
    answers = [ids[start:] for ids in whole]
    before = start + sum(map(len, answers))
    try:
        if not start:
            raise BadRow("the prompt has no tokens")
        if not all(answers):
            raise BadRow("an answer has no tokens")
        longest = max(map(len, answers))
        kept, answers = fit_answers(prompt[:start], answers, encoder.truncation, encoder.limit, item.where)
        if uncut and max(map(len, answers)) < longest:
            raise BadRow(CUT, f"{longest} tokens with a prompt of {len(kept)}, limit {encoder.limit.length}", start + longest)
    except BadRow as bad:
        item.bad = bad
        return
    after = len(kept) + sum(map(len, answers))
    report.truncated += after < before
    report.tokens_lost += before - after
    report.tokens += after
    report.trained += after - len(kept)
    report.longest = max(report.longest, len(kept) + max(map(len, answers)))
    report.equal += len(answers) == 2 and answers[0] == answers[1]
    encoder.note(report, kept, item.where, answers)
    item.done.append({"prompt_ids": kept, **columns(item.row, answers)})


def encode_prompts(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Encode prompts the model will answer itself; the row's other columns are kept as JSON."""
    plain = [item for item in items if isinstance(item.row["prompt"], str)]
    for item, ids in zip(plain, encoder.tokens.raw_prompts([i.row["prompt"] for i in plain])):
        _keep_prompt(encoder, item, report, ids)
    spoken = [item for item in items if isinstance(item.row["prompt"], list)]
    if not spoken:
        return
    prompts, _ = _rendered(encoder, spoken, [[] for _ in spoken])
    for item, ids in zip([i for i in spoken if i.bad is None], prompts):
        _keep_prompt(encoder, item, report, ids)


def _keep_prompt(encoder: Encoder, item: Item, report: Report, ids: list[int]) -> None:
    try:
        if not ids:
            raise BadRow("the prompt has no tokens")
        kept = fit_prompt(ids, encoder.truncation, encoder.limit, item.where)
    except BadRow as bad:
        item.bad = bad
        return
    report.truncated += len(kept) < len(ids)
    report.tokens_lost += len(ids) - len(kept)
    report.tokens += len(kept)
    report.longest = max(report.longest, len(kept))
    encoder.note(report, kept, item.where)
    columns = json.dumps(item.row.get("columns", {}), ensure_ascii=False, default=str)
    item.done.append({"prompt_ids": kept, "columns": columns})
