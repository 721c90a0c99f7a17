"""Feedback from judges: critiques with revisions, and comparisons of two answers.

A comparison is made in both orders, since models prefer a place:

    p_fwd = softmax(log P("A"), log P("B"))[A] with y1 as A, p_bwd the same with y2 as A; p(y1 better) = (p_fwd + 1 - p_bwd) / 2

A judge that always says A gives exactly 1/2, and swapping the answers maps p to 1 - p.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.feedback.judges.chosen import Choice
from llmrecipe.feedback.judges.constitution import Constitution, Principle
from llmrecipe.feedback.judges.labeller import Ask, Judge, Logprobs

LETTERS = ("A", "B")
LEAKS = re.compile(r"(?:^|\n|(?<=[.!?] ))\s*(?:critique|revision|critique request|revision request|new answer)\s*:\s*", re.I)
"""Matches labels of a critique or a request inside a text that should be an answer."""


@dataclass(frozen=True)
class Draft:
    """An answer to be revised."""

    prompt: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to be compared."""

    prompt: str
    first: str
    second: str
    columns: Mapping[str, Any] = field(default_factory=dict)


def revise_drafts(
    judge: Judge, constitution: Constitution, drafts: Sequence[Draft], principles: Sequence[Principle]
) -> list[dict[str, Any] | None]:
    """Return {critique, revision, leak} of each draft by its principle; None where the judge failed at either.

    `leak` tells whether words of the critique stood in the reply; they are not in the revision.
    """
    requests = [constitution.ask_critique(c, d.prompt, d.answer, d.columns) for d, c in zip(drafts, principles, strict=True)]
    critiques = judge.generate(requests)
    known = [i for i, critique in enumerate(critiques) if critique is not None]
    again = [
        constitution.ask_revision(principles[i], drafts[i].prompt, drafts[i].answer, str(critiques[i]), drafts[i].columns)
        for i in known
    ]
    found: list[dict[str, Any] | None] = [None] * len(drafts)
    for i, text in zip(known, judge.generate(again), strict=True):
        revision, leak = answer_of(text or "")
        if revision:
            found[i] = {"critique": critiques[i], "revision": revision, "leak": leak}
    return found


def answer_of(text: str) -> tuple[str, bool]:
    """Extract (answer, whether something leaked) from a reply to a revision request.

    A label in front, such as `Revision:`, is taken off; from a critique or a request further on everything is cut.
    """
    text = text.strip()
    start = LEAKS.match(text)
    if start:
        label = start[0].strip().lower()
        text = text[start.end() :] if label.startswith(("revision:", "new answer:")) else _after_revision(text)
    inside = LEAKS.search(text)
    return (text[: inside.start()] if inside else text).strip(), bool(start or inside)


def _after_revision(text: str) -> str:
    """Return the text after `Revision:` in a reply that begins with a critique; an empty text where there is none."""
    found = [m for m in LEAKS.finditer(text) if m[0].strip().lower().startswith(("revision:", "new answer:"))]
    return text[found[-1].end() :] if found else ""


def compare_answers(
    judge: Judge,
    constitution: Constitution,
    pairs: Sequence[AnswerPair],
    principles: Sequence[Sequence[Principle]],
    *,
    swap: bool = True,
    reasoning: bool = False,
    clamp: tuple[float, float] = (0.4, 0.6),
) -> list[dict[str, Any] | None]:
    """Return the judge's label of each pair by its principles; None where it failed at any of them.

    Args:
        principles: of each pair; p is the mean over them.
        swap: compare in both orders.
        reasoning: let the judge think aloud first; then each order's probability is clamped, since a letter after a chain of
            thought is nearly certain.

    Returns:
        {p, forward, backward: p_fwd and p_bwd of each principle, logprobs: [principle][order][letter], mass: least probability
        that lay on the letters, said: the reply it belongs to, votes: share of replies read by vote, principles, rationales}.
    """
    requests: list[Ask] = []
    for pair, own in zip(pairs, principles, strict=True):
        for principle in own:
            orders = [(pair.first, pair.second), (pair.second, pair.first)][: 2 if swap else 1]
            requests += [constitution.ask_comparison(principle, pair.prompt, *o, pair.columns, reasoning) for o in orders]
    rationales: list[str | None] = [None] * len(requests)
    if reasoning:
        rationales = judge.generate(requests)
        requests = [constitution.ask_verdict(ask, text or "") for ask, text in zip(requests, rationales, strict=True)]
    replies = judge.decide(requests, LETTERS)
    found: list[dict[str, Any] | None] = []
    at = 0
    for own in principles:
        count = len(own) * (2 if swap else 1)
        part, thoughts = replies[at : at + count], rationales[at : at + count]
        at += count
        failed = any(reply is None for reply in part) or (reasoning and any(text is None for text in thoughts))
        limits = clamp if reasoning else (0.0, 1.0)
        label = None if failed else _label([r for r in part if r is not None], 2 if swap else 1, limits)
        if label is not None:
            label |= {"principles": [p.id for p in own], **({"rationales": thoughts} if reasoning else {})}
        found.append(label)
    return found


def _label(replies: Sequence[Choice], orders: int, limits: tuple[float, float]) -> dict[str, Any]:
    """Compute one pair's label from the choices for its principles and orders."""
    thinnest = min(replies, key=lambda reply: reply.mass)
    shares = [min(max(first_share(reply.logprobs), limits[0]), limits[1]) for reply in replies]
    forward = shares[::orders]
    backward = shares[1::2] if orders == 2 else []
    each = [(f + 1.0 - b) / 2.0 for f, b in zip(forward, backward, strict=True)] if backward else forward
    return {
        "p": math.fsum(each) / len(each),
        "forward": forward,
        "backward": backward,
        "logprobs": [[list(r.logprobs) for r in replies[i : i + orders]] for i in range(0, len(replies), orders)],
        "mass": thinnest.mass,
        "said": thinnest.said,
        "votes": sum(reply.how == "votes" for reply in replies) / len(replies),
    }


def first_share(reply: Logprobs) -> float:
    """Compute softmax(log P(A), log P(B))[A]."""
    gap = reply[1] - reply[0]
    return 1.0 / (1.0 + math.exp(gap)) if gap < 0 else math.exp(-gap) / (1.0 + math.exp(-gap))


def label_metrics(labels: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute statistics of a judge from its labels.

    position_bias: share of comparisons whose two orders name the same letter, so different answers; letter_a: mean probability
    of the letter A; confidence: mean |p - 1/2|; entropy: mean of -p log p - (1 - p) log(1 - p); mass: mean of the least
    probability on the letters, mass_min: its least; votes: share of replies that were read by vote.
    """
    if not labels:
        return {}
    orders = [(f, b) for label in labels for f, b in zip(label["forward"], label["backward"])]
    found = {
        "confidence": math.fsum(abs(label["p"] - 0.5) for label in labels) / len(labels),
        "entropy": math.fsum(entropy(label["p"]) for label in labels) / len(labels),
        "mass": math.fsum(label["mass"] for label in labels) / len(labels),
        "mass_min": min(label["mass"] for label in labels),
        "votes": math.fsum(label.get("votes", 0.0) for label in labels) / len(labels),
    }
    if orders:
        found["position_bias"] = sum((f - 0.5) * (b - 0.5) > 0 for f, b in orders) / len(orders)
        found["letter_a"] = math.fsum(f + b for f, b in orders) / (2 * len(orders))
    return found


def entropy(p: float) -> float:
    """Compute the entropy of a Bernoulli variable with probability p, in nats."""
    return -math.fsum(q * math.log(q) for q in (p, 1.0 - p) if q > 0.0)


def judge_facts(judge: Judge) -> dict[str, Any]:
    """Return a judge's request counts, for the facts of a step."""
    count = judge.count
    facts: dict[str, Any] = {"judge": judge.identity, "asked": count.requested, "failures": count.failures}
    how = ("by_logprobs", "by_votes", "stray_votes", "draws", "logprob_requests", "vote_requests")
    facts |= {name: getattr(count, name) for name in how if getattr(count, name)}
    if count.prompt_tokens or count.completion_tokens:
        facts |= {"prompt_tokens": count.prompt_tokens, "completion_tokens": count.completion_tokens}
    return facts | ({"cost": count.cost} if count.cost else {})
