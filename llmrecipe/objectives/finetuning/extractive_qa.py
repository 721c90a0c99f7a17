"""Extractive question answering."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.data.batch_parts import part_of_batch
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.engine.logprob import upcast
from llmrecipe.engine.packing import micro_tokens
from llmrecipe.engine.pooling import Pool, chunk_cuts
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.finetuning._engines.answer_spans import (
    SpanAnswer,
    answer_scores,
    best_spans,
    best_threshold,
    span_loss,
)

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe

TOKENS = ("ids", "type_ids", "begins", "ends")
"""Columns with an entry for each token of all windows."""
WINDOWS = ("windows", "starts", "stops", "nulls")
"""Columns with an entry for each window."""


@register
class ExtractiveQa(Objective):
    """Extractive answers: L = -(1/2n) sum_w log softmax(s)[start] + log softmax(e)[stop], s = W_1 h + b_1, e = W_2 h + b_2.

    The answer is a span of a passage. The model reads the question and then the passage; a passage longer than
    `data.max_length` is read in n windows that move on by `data.stride` tokens. A window without the whole answer points at
    the token of no answer: cls, or where there is none the last one. The head is that of the family's span model
    (AutoModelForQuestionAnswering), trained and stored with any adapter; padding has no share in the softmax.

    The answer to a question is the span i <= j < i + `max_answer` with the largest s_i + e_j of all its windows. With
    `null_threshold` it is no answer where the least s + e of that token over the windows is larger by more than the threshold.
    `exact_match` and `f1` are SQuAD's: without case, articles and punctuation, the best over a question's references. With a
    threshold they are there for questions with (`has_answer/...`) and without an answer (`no_answer/exact_match`), and
    `best_f1` is the largest that any threshold (`best_f1/threshold`) gives on these rows.

    Papers: SQuAD (arXiv 1606.05250); Know What You Don't Know (SQuAD 2.0, arXiv 1806.03822); BERT (arXiv 1810.04805).
    """

    rows: ClassVar[str] = "passages"
    headline: ClassVar[tuple[str, ...]] = ("exact_match", "f1")
    head: ClassVar[str] = "question_answering"
    resampled: ClassVar[bool] = True

    max_answer: PositiveInt = 30
    """Most tokens of an answer."""
    null_threshold: float | None = None
    """Margin by which no answer must score above the best span to be given; null: every question gets a span."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse questions without answers where every question gets one.

        Raises:
            RecipeError: naming the option to set.
        """
        count = sum(text == "[]" for text in data.column("answers"))
        if count and self.null_threshold is None:
            raise RecipeError(
                f"objective.null_threshold: {count} training questions have no answer, and without a threshold every question "
                "gets a span; set objective.null_threshold=0.0, or leave these rows out"
            )

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step; windows of a passage that is larger than one are shared out over several."""
        for rows in source:
            pieces = [piece for row in rows for piece in pieces_of(row, roles.micro_tokens)]
            yield [self.collate(part, roles) for part in roles.split(pieces)]

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out every window of every row.

        `extra` has, for W windows of at most L tokens: `place` (W, L) in the flattened states and `real` (W, L), `begins` and
        `ends` (W, L), `starts`, `stops` and `nulls` (W,), and `owner` (W,), the row; `texts` the passage and the answers.
        """
        windows = [(number, window) for number, row in enumerate(rows) for window in windows_of(row)]
        sequences = [Sequence(w["ids"], [0] * len(w["ids"]), prompt=len(w["ids"])) for _, w in windows]
        typed = bool(windows) and "type_ids" in windows[0][1]
        batch = roles.layout(sequences, [r["row"] for r in rows], packed=not typed)
        if typed:
            types = torch.zeros_like(batch.here.input_ids)
            for i, (_, window) in enumerate(windows):
                types[i, : len(window["type_ids"])] = torch.tensor(window["type_ids"])
            batch = batch.with_extra(token_type_ids=types)
        lengths = torch.tensor([len(s.ids) for s in sequences], dtype=torch.long)
        columns = torch.arange(int(lengths.max()) if windows else 0)
        real = columns < lengths[:, None]
        spans = {n: _table([w[n] for _, w in windows], len(columns)) for n in ("begins", "ends")}
        singles = {n: torch.tensor([w[n] for _, w in windows], dtype=torch.long) for n in ("starts", "stops", "nulls")}
        owner = torch.tensor([number for number, _ in windows], dtype=torch.long)
        texts = tuple((row["context"], *json.loads(row["answers"])) for row in rows)
        places = _places(batch.here.last[: len(windows)], real)
        return batch.with_texts(texts).with_extra(place=places, real=real, **spans, **singles, owner=owner)

    def measures(self) -> Measures:
        """Return the accuracy of windows, exact match and F1 of answers, and both for questions with and without one."""
        names = ("accuracy", "exact_match", "f1", "has_answer/exact_match", "has_answer/f1", "no_answer/exact_match", "best_f1")
        return {**dict.fromkeys(names, "max"), "best_f1/threshold": None}

    def weight(self, batch: Batch) -> float:
        """Return the number of windows, the loss denominator."""
        return float(len(batch.extra["owner"]))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the windows."""
        return self._loss(batch, self._scores(batch, roles))

    def _scores(self, batch: Batch, roles: Roles) -> Tensor:
        """Return s and e of every token of each window, (W, L, 2)."""
        scores = roles.policy(batch, want="token_scores")["token_scores"]
        return upcast(scores.reshape(-1, 2)[batch.extra["place"]])

    def _scores_in_parts(self, batch: Batch, roles: Roles) -> Tensor:
        """Return the same without a gradient, from passes over at most the tokens of a micro-batch, or a single window.

        A question is answered from all its windows, so its row is whole, and how many passes it takes is its process's own
        matter: none of them waits for another process.
        """
        real = batch.here.extra["real"]
        lengths = real.sum(1)
        cuts = chunk_cuts(lengths.tolist(), None, roles.micro_tokens or micro_tokens(roles.device))
        with torch.no_grad(), roles.alone():
            if not cuts:
                return self._scores(batch, roles)
            found = []
            for first, last in Pool(cuts=cuts).chunks(len(lengths)):
                part = part_of_batch(batch, first, last)
                found.append(self._scores(part.with_extra(place=_places(part.here.last, real[first:last])), roles))
            return torch.cat(found)

    def _loss(self, batch: Batch, scores: Tensor) -> Loss:
        real, starts, stops = (batch.extra[n] for n in ("real", "starts", "stops"))
        total = span_loss(scores, real, starts, stops).sum()
        if not len(scores):
            return Loss(total, {"accuracy": (0.0, 0.0)})
        first, last = scores.detach().masked_fill(~real[..., None], -torch.inf).argmax(1).unbind(-1)
        return Loss(total, {"accuracy": (((first == starts) & (last == stops)).sum(), float(len(scores)))})

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return the loss, and exact match and F1 of the best answers of all windows of each question."""
        scores = self._scores_in_parts(batch, roles)
        loss = self._loss(batch, scores)
        answers = self.answers(batch, scores)
        found = [answer_scores(a.given(self.null_threshold), texts[1:]) for a, texts in zip(answers, batch.texts, strict=True)]
        named = {name: (sum(f[i] for f in found), float(len(found))) for i, name in enumerate(("exact_match", "f1"))}
        return {"loss": (loss.total, self.weight(batch)), **loss.metrics, **named}

    def answers(self, batch: Batch, scores: Tensor) -> list[SpanAnswer]:
        """Return the best span of each question over all its windows, with the odds of no answer."""
        extra = batch.extra
        best, first, last = best_spans(scores, extra["begins"] >= 0, self.max_answer)
        none = scores.sum(-1).gather(1, extra["nulls"][:, None]).squeeze(1) if len(scores) else best
        windows = torch.arange(len(best), device=best.device)
        begins, ends = extra["begins"][windows, first].tolist(), extra["ends"][windows, last].tolist()
        found: list[SpanAnswer] = []
        owners, values, nulls = extra["owner"].tolist(), best.tolist(), none.tolist()
        for number, texts in enumerate(batch.texts):
            own = [w for w, owner in enumerate(owners) if owner == number]
            top = max(own, key=lambda w: values[w])
            text = texts[0][begins[top] : ends[top]].strip() if values[top] > float("-inf") else ""
            found.append(SpanAnswer(text, min(nulls[w] for w in own) - values[top]))
        return found

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return, with a threshold, what each question scores with its span and with no answer, and the odds of the latter."""
        if self.null_threshold is None:
            return {}
        rows = []
        for found, (_, *known) in zip(self.answers(batch, self._scores_in_parts(batch, roles)), batch.texts, strict=True):
            pairs = [answer_scores(text, known) for text in (found.given(self.null_threshold), found.text, "")]
            rows.append([found.odds, float(bool(known)), *pairs[0], pairs[1][1], pairs[2][1]])
        names = ("odds", "answerable", "exact_match", "f1", "span", "none")
        values = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(names))
        return dict(zip(names, values.unbind(1), strict=True))

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Compute scores by kind of question, and the best threshold, from the gathered values of each question."""
        if not tensors or not len(tensors["odds"]):
            return {}
        has = tensors["answerable"].bool()
        found: dict[str, float] = {}
        for kind, rows, names in (("has_answer", has, ("exact_match", "f1")), ("no_answer", ~has, ("exact_match",))):
            if rows.any():
                found |= {f"{kind}/{name}": float(tensors[name][rows].mean()) for name in names}
        best, threshold = best_threshold(tensors["odds"], tensors["span"], tensors["none"])
        return {**found, "best_f1": best, "best_f1/threshold": threshold}


def _places(last: Tensor, real: Tensor) -> Tensor:
    """Return where the tokens of each window are in the flattened states, (W, L), 0 where there is none.

    Args:
        last: (W,) the place of each window's last token.
        real: (W, L) whether a window has that many tokens.
    """
    columns = torch.arange(real.shape[1], device=real.device)
    return (last[:, None] - real.sum(1, keepdim=True) + 1 + columns).where(real, 0)


def windows_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the windows of a token row, with their tokens and places."""
    ends = list(accumulate(row["windows"]))
    for number, (length, end) in enumerate(zip(row["windows"], ends, strict=True)):
        window = {name: row[name][end - length : end] for name in TOKENS if name in row}
        yield {**window, **{name: row[name][number] for name in WINDOWS}}


def pieces_of(row: dict[str, Any], most: int | None) -> Iterator[dict[str, Any]]:
    """Yield a token row, cut into several of at most `most` tokens (or a single window) each where it has more."""
    if most is None or len(row["ids"]) <= most:
        yield row
        return
    held: list[dict[str, Any]] = []
    for window in windows_of(row):
        if held and sum(len(w["ids"]) for w in held) + len(window["ids"]) > most:
            yield _joined(row, held)
            held = []
        held.append(window)
    yield _joined(row, held)


def _joined(row: dict[str, Any], windows: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = {name: [one for w in windows for one in w[name]] for name in TOKENS if name in row}
    return {**row, **tokens, **{name: [w[name] for w in windows] for name in WINDOWS}}


def _table(rows: list[list[int]], width: int) -> Tensor:
    """Return lists as rows (W, width), -1 behind their end."""
    found = torch.full((len(rows), width), -1, dtype=torch.long)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return found
