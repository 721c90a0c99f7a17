"""Tagging of words."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Field, Literal
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.engine.logprob import upcast
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.finetuning._engines.entities import entities_of, has_prefixes, shared


@register
class TokenClassification(Objective):
    """Token classification: L = -(1/n) sum_i log softmax(W h_i + b)[y_i], h_i the state of a word's token, y_i its tag.

    Rows are words with a tag each (named entities, parts of speech). A word is cut into several tokens: `subwords: first`
    trains and reads its first one, `all` trains all of them and still reads the first. n counts trained tokens over the whole
    step. The head is that of the family's token classifier, new, always trained and stored with any adapter.

    `accuracy` counts words. Where the tags are kinds behind B- and I-, precision = hits / found, recall = hits / there and
    F1 = 2 hits / (found + there) count whole entities over the set: the same words and the same kind, all kinds together. By
    default an I- that follows no word of its kind begins an entity, as in CoNLL's evaluation; `entities: iob2` reads the tags
    strictly. Words beyond `data.max_length` are not scored.

    Papers: BERT (arXiv 1810.04805); entities: Introduction to the CoNLL-2003 Shared Task (arXiv cs/0306050).
    """

    rows: ClassVar[str] = "tagged"
    headline: ClassVar[tuple[str, ...]] = ("f1",)
    head: ClassVar[str] = "token_classification"

    subwords: Literal["first", "all"] = "first"
    """Tokens of a word that are trained."""
    entities: Literal["conll", "iob2"] = "conll"
    """How B- and I- are read: as CoNLL's evaluation does, or strictly."""
    tags: list[str] = Field(default_factory=list)
    """Names of tags that rows give as numbers, in order."""

    def label_names(self) -> list[str] | None:
        """Return the names of the tags, where they are given.

        Raises:
            RecipeError: a name is there more than once.
        """
        if (twice := next((tag for tag in self.tags if self.tags.count(tag) > 1), None)) is not None:
            raise RecipeError(f"objective.tags: '{twice}' is named more than once; a tag's number is its place in the list")
        return self.tags or None

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay rows out with `tag` (M,) of each trained token, its `place` (M,) in the flattened states, and `first` (M,)."""
        sequences = [Sequence(r["ids"], [0] * len(r["ids"]), prompt=len(r["ids"])) for r in rows]
        batch = roles.layout(sequences, [r["row"] for r in rows])
        ends = batch.here.last.tolist()
        found: list[tuple[int, int, int, int]] = []
        for number, row in enumerate(rows):
            start = ends[number] - len(row["ids"]) + 1
            known = -1
            for place, word in enumerate(row["words"]):
                # Words come in order, so a word is new exactly where its index is the next one.
                first = word > known
                if word >= 0 and (first or self.subwords == "all"):
                    found.append((start + place, row["label"][word], int(first), number))
                known = max(known, word)
        columns = torch.tensor(found, dtype=torch.long).view(len(found), 4).unbind(1)
        return batch.with_extra(place=columns[0], tag=columns[1], first=columns[2].bool(), owner=columns[3])

    def measures(self) -> Measures:
        """Return the accuracy of words, and precision, recall and F1 of entities."""
        return {"accuracy": "max", "precision": "max", "recall": "max", "f1": "max"}

    def weight(self, batch: Batch) -> float:
        """Return the number of trained tokens, the loss denominator."""
        return float(batch.extra["tag"].numel())

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed cross-entropy of the trained tokens."""
        return self._loss(batch, self._scores(batch, roles))

    def _scores(self, batch: Batch, roles: Roles) -> Tensor:
        """Return the scores (M, C) of the trained tokens."""
        scores = roles.policy(batch, want="token_scores")["token_scores"]
        return upcast(scores.reshape(-1, scores.shape[-1])[batch.extra["place"]])

    def _loss(self, batch: Batch, scores: Tensor) -> Loss:
        tags, first = batch.extra["tag"], batch.extra["first"]
        right = (scores.argmax(-1) == tags) & first
        total = F.cross_entropy(scores, tags, reduction="sum") if tags.numel() else scores.sum() * 0.0
        return Loss(total, {"accuracy": (right.sum(), float(batch.here.extra["first"].sum()))})

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return the loss and the accuracy, and counts of entities where the tags stand for some."""
        scores = self._scores(batch, roles)
        loss = self._loss(batch, scores)
        found: dict[str, tuple[Any, float]] = {"loss": (loss.total, self.weight(batch)), **loss.metrics}
        names = roles.model.config.id2label or {}
        tags = [str(names[i]) for i in sorted(names)]
        return {**found, **self._entities(batch, scores, tags)} if has_prefixes(tags) else found

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Return 0 for shares of no entities at all."""
        return {name: 0.0 for name in ("precision", "recall", "f1") if math.isnan(sums.get(name, 0.0))}

    def _entities(self, batch: Batch, scores: Tensor, tags: list[str]) -> dict[str, tuple[Any, float]]:
        first, owner = batch.extra["first"], batch.extra["owner"]
        sentences: dict[int, tuple[list[str], list[str]]] = {}
        read = (owner[first].tolist(), batch.extra["tag"][first].tolist(), scores.argmax(-1)[first].tolist())
        for number, gold, predicted in zip(*read, strict=True):
            ours = sentences.setdefault(number, ([], []))
            ours[0].append(tags[gold])
            ours[1].append(tags[predicted])
        strict, counts = self.entities == "iob2", [0, 0, 0]
        for gold_tags, predicted_tags in sentences.values():
            there, found = entities_of(gold_tags, strict), entities_of(predicted_tags, strict)
            counts = [a + b for a, b in zip(counts, (shared(there, found), len(found), len(there)), strict=True)]
        hits, found_count, there_count = map(float, counts)
        return {
            "precision": (hits, found_count),
            "recall": (hits, there_count),
            "f1": (2.0 * hits, found_count + there_count),
        }
