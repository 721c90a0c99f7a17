"""Encoding of rows that are one sequence: text, dialogues, given tokens, image captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.assistant_turns import Conversation, Turns, boundaries, common_prefix, find_turns, mask_bits
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.loss_mask import Encoded, Span
from llmrecipe.data.tokenize.text_size import TextSize
from llmrecipe.data.tokenize.truncation import fit_sequence
from llmrecipe.data.tokenize.turn_weights import checked_weight, turn_weights, weights_of_spans

NO_TARGET = "no trained token"
LARGEST = (1 << 31) - 1
"""Largest token id that a table of tokens can hold."""


def encode_sequences(encoder: Encoder, items: Sequence[Item], report: Report, measured: bool = False) -> None:
    """Fill `done` or `bad` of every item.

    Args:
        measured: rows of raw text also get the bytes and words of it that their targets stand for.
    """
    groups: dict[str, list[Item]] = {"text": [], "tokens": [], "strings": [], "prompted": [], "talks": []}
    for item in items:
        groups[_kind(item.row)].append(item)
    if groups["text"]:
        documents, encodings = encoder.tokens.document_encodings([i.row["text"] for i in groups["text"]])
        for number, (item, ids) in enumerate(zip(groups["text"], documents)):
            whole = encoder.mask.spans(Encoded(ids, 0, [(0, len(ids))]))
            framed = bool(ids) and ids[0] == encoder.tokens.bos
            encoding = encodings[number] if encodings else None
            size = TextSize(item.row["text"], len(ids), encoding, framed) if measured else None
            _finish(encoder, item, report, ids, mask_bits(len(ids), whole), plain=True, size=size)
    for item in groups["tokens"]:
        labels = item.row["labels"]
        if (most := max(item.row["input_ids"])) > LARGEST:
            raise DataError(f"{item.where}: token id {most!s:.24} is beyond any vocabulary; ids go up to {LARGEST}")
        trained = [1] * len(item.row["input_ids"]) if labels is None else [int(label != -100) for label in labels]
        given = item.row.get("weights")
        weights = given and [checked_weight(one, item.where, f"weights[{i}]") for i, one in enumerate(given)]
        _finish(encoder, item, report, item.row["input_ids"], [0, *trained[1:]], plain=labels is None, weights=weights)
    if groups["strings"]:
        _strings(encoder, groups["strings"], report)
    for name in ("prompted", "talks"):
        if groups[name]:
            turns = encoder.mask.reads_turns and (name == "talks" or encoder.mask.turns_of_prompted)
            encoder.need_template(groups[name][0].where, turns)
            (_prompted if name == "prompted" else _talks)(encoder, groups[name], report)


def _kind(row: dict[str, Any]) -> str:
    if "input_ids" in row:
        return "tokens"
    if "messages" in row:
        return "talks"
    if "text" in row:
        return "text"
    return "prompted" if isinstance(row["prompt"], list) else "strings"


def _strings(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Encode plain prompt and completion: the completion starts where the ids of the prompt and of both diverge."""
    prompts = encoder.tokens.raw_prompts([i.row["prompt"] for i in items])
    whole = encoder.tokens.documents([i.row["prompt"] + i.row["completion"] for i in items])
    for item, prompt, ids in zip(items, prompts, whole):
        _split_at_prompt(encoder, item, report, (common_prefix(prompt, ids), len(prompt)), ids)


def _split_at_prompt(
    encoder: Encoder,
    item: Item,
    report: Report,
    boundary: tuple[int, int],
    ids: list[int],
    turns: Sequence[Span] | None = None,
    weights: list[float] | None = None,
) -> None:
    """Train what the mask selects of the completion; without `turns` it is one.

    Args:
        boundary: ids that the prompt and the whole share, after which the completion starts; ids of the prompt.
    """
    start, length = boundary
    report.prompts += 1
    report.moved += start < length
    after = [(start, len(ids))] if turns is None else [(max(a, start), b) for a, b in turns if b > start]
    _finish(encoder, item, report, ids, mask_bits(len(ids), encoder.mask.spans(Encoded(ids, start, after))), weights=weights)


def _render(encoder: Encoder, items: Sequence[Item], talks: Sequence[list[dict[str, Any]]], prompt: bool) -> list[str]:
    """Return the texts of conversations, `talks[i]` of `items[i]`; an item that the template refuses becomes bad instead."""
    template = encoder.tokens.template
    assert template is not None
    requests = [(talk, item.row.get("tools"), item.row.get("kwargs")) for item, talk in zip(items, talks, strict=True)]
    texts = []
    for item, rendered in zip(items, template.render_all(requests, prompt)):
        if isinstance(rendered, BadRow):
            item.bad = rendered
        else:
            texts.append(rendered[0])
    return texts


def _prompted(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Encode prompt and completion as messages."""
    by_turns = encoder.mask.reads_turns and encoder.mask.turns_of_prompted
    prompts = _render(encoder, items, [item.row["prompt"] for item in items], True)
    kept = [item for item in items if item.bad is None]
    if not by_turns:
        wholes = _render(encoder, kept, [item.row["prompt"] + item.row["completion"] for item in kept], False)
        prompts = [prompt for item, prompt in zip(kept, prompts) if item.bad is None]
        kept = [item for item in kept if item.bad is None]
        for item, prompt, ids in zip(kept, encoder.tokens.rendered(prompts), encoder.tokens.rendered(wholes)):
            weight = _answer_weight(encoder, item)
            weights = None if weight is None else [weight] * len(ids)
            _split_at_prompt(encoder, item, report, (common_prefix(prompt, ids), len(prompt)), ids, weights=weights)
        return
    batch = [_conversation(n, item, item.row["prompt"] + item.row["completion"]) for n, item in enumerate(kept)]
    turns = find_turns(encoder.tokens, batch, last_only=encoder.mask.last_only)
    starts = _prompt_boundaries(encoder, prompts, turns)
    for n, item in enumerate(kept):
        found = _weighted_turns(encoder, item, batch[n].messages, turns[n])
        if isinstance(found, BadRow):
            item.bad = found
        else:
            _split_at_prompt(encoder, item, report, starts[n], found[0].ids, found[0].spans, found[1])


def _prompt_boundaries(
    encoder: Encoder, prompts: Sequence[str], turns: Mapping[int, Turns | BadRow]
) -> dict[int, tuple[int, int]]:
    """Return for each prompt whose conversation was encoded how many ids both share, and how many the prompt has."""
    made = {n: found for n, found in turns.items() if not isinstance(found, BadRow)}
    requests = [(found.whole, prompts[n]) for n, found in made.items() if found.whole is not None]
    if len(requests) == len(made):
        return dict(zip(made, boundaries(encoder.tokens, requests)))
    ids = encoder.tokens.rendered([prompts[n] for n in made])
    return {n: (common_prefix(own, found.ids), len(own)) for (n, found), own in zip(made.items(), ids)}


def _conversation(index: int, item: Item, messages: list[dict[str, Any]]) -> Conversation:
    return Conversation(index, messages, item.row.get("tools"), item.row.get("kwargs"), item.where)


def _talks(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    """Encode conversations without a separate prompt."""
    if not encoder.mask.reads_turns:
        _whole_talks(encoder, items, report)
        return
    batch = [_conversation(n, item, item.row["messages"]) for n, item in enumerate(items)]
    turns = find_turns(encoder.tokens, batch, last_only=encoder.mask.last_only)
    for n, item in enumerate(items):
        found = _weighted_turns(encoder, item, batch[n].messages, turns[n])
        if isinstance(found, BadRow):
            item.bad = found
            continue
        talk, weights = found
        report.prompts += 1
        report.moved += talk.moved
        spans = encoder.mask.spans(Encoded(talk.ids, None, talk.spans))
        _finish(encoder, item, report, talk.ids, mask_bits(len(talk.ids), spans), weights=weights)


def _weighted_turns(
    encoder: Encoder, item: Item, messages: list[dict[str, Any]], found: Turns | BadRow
) -> tuple[Turns, list[float] | None] | BadRow:
    """Return the turns of a conversation with the weights of its tokens, None where no message has one."""
    if isinstance(found, BadRow):
        return found
    weights = turn_weights(messages, item.where)
    if weights is None:
        return found, None
    try:
        return found, weights_of_spans(len(found.ids), found.spans, weights[-1:] if encoder.mask.last_only else weights)
    except BadRow as bad:
        return bad


def _answer_weight(encoder: Encoder, item: Item) -> float | None:
    """Return the weight of a completion that is one span; None where it has none.

    Raises:
        DataError: the mask does not tell its turns apart.
    """
    weights = turn_weights(item.row["completion"], item.where)
    if weights is not None and (len(weights) != 1 or not encoder.mask.reads_turns):
        raise _apart(encoder, item)
    return None if weights is None else weights[0]


def _apart(encoder: Encoder, item: Item) -> DataError:
    return DataError(
        f"{item.where}: messages have a weight, and objective.mask={encoder.mask.name} does not tell turns apart; use "
        "objective.mask=assistant, or data.drop_fields=[weight] to do without the weights"
    )


def _whole_talks(encoder: Encoder, items: Sequence[Item], report: Report) -> None:
    for item in items:
        if turn_weights(item.row["messages"], item.where) is not None:
            raise _apart(encoder, item)
    texts = _render(encoder, items, [item.row["messages"] for item in items], False)
    for item, ids in zip([item for item in items if item.bad is None], encoder.tokens.rendered(texts)):
        _finish(encoder, item, report, ids, mask_bits(len(ids), encoder.mask.spans(Encoded(ids, None, []))))


def _finish(
    encoder: Encoder,
    item: Item,
    report: Report,
    ids: list[int],
    trained: list[int],
    plain: bool = False,
    size: TextSize | None = None,
    weights: list[float] | None = None,
) -> None:
    """Apply the length policy, count, and keep the row.

    Args:
        weights: how much each token counts in the loss; one of weight 0 is no target.
    """
    flags = trained if weights is None else [i if flag and weights[i] else 0 for i, flag in enumerate(trained)]
    # A text whose rows are to be measured is cut by place rather than by token.
    tokens = ids if size is None else list(range(len(ids)))
    try:
        # Targets of a row with weights are numbered, so that a policy's pieces say which weights are theirs.
        pieces = fit_sequence(tokens, flags, encoder.truncation, encoder.limit, item.where, plain)
    except BadRow as bad:
        item.bad = bad
        return
    kept = [(piece, [int(flag > 0) for flag in marks], marks) for piece, marks in pieces if any(marks)]
    if not kept:
        why = f"mask '{encoder.mask.name}' selects nothing"
        if 1 in trained:
            why = "the part data.max_length leaves has none" if any(flags) else "all its targets have weight 0"
        item.bad = BadRow(NO_TARGET, why, len(ids))
        return
    cut = len(ids) - sum(len(piece[0]) for piece in kept)
    report.truncated += cut > 0
    report.tokens_lost += max(cut, 0)
    report.longest = max(report.longest, *(len(piece[0]) for piece in kept))
    for piece, piece_trained, marks in kept:
        report.tokens += len(piece)
        report.trained += sum(piece_trained)
        row: dict[str, Any] = {"ids": piece if size is None else [ids[i] for i in piece], "trained": piece_trained}
        if weights is not None:
            row["weights"] = [weights[mark] if mark else 0.0 for mark in marks]
        item.done.append({**row, "features": item.row.get("features"), **(size.of(piece, piece_trained) if size else {})})
    last_ids, last_trained = item.done[-1]["ids"], kept[-1][1]
    final = len(last_trained) - 1 - last_trained[::-1].index(1)
    encoder.note(report, item.done[0]["ids"], item.where, [last_ids[: final + 1]])
