"""Labels that people or judges give to two answers: stored by labeller, resumable, and compared.

    <folder>/
        answers/                 rows with two answers, where a model generated them
        NAME.asked.jsonl         the replies of a judge, where labeller NAME is one
        NAME.journal.jsonl       every decision of labeller NAME in its order, an undo included; only ever appended to
        NAME.lock                held while NAME labels: one terminal at a time
        NAME.jsonl               preference rows {prompt, chosen, rejected, labeller, ...} that follow from it

A tie or a skip is recorded, so that the pair is not shown again, and gives no row. Which answer is shown first is sampled for
each labeller and pair from a seed, and recorded.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, cast

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.file_lock import hold
from llmrecipe.core.journal import Journal, json_hash
from llmrecipe.data.formats.answered_prompts import Answered, pairs_of
from llmrecipe.evaluation.agreement import agreement
from llmrecipe.feedback.judges.chosen import MIN_MASS
from llmrecipe.feedback.judges.constitution import Constitution, Principle, sample_principles
from llmrecipe.feedback.judges.feedback import AnswerPair, compare_answers
from llmrecipe.feedback.judges.labeller import Judge, short_hash
from llmrecipe.recipe.renames import new_name
from llmrecipe.runs.durable import unfinished_path

CHOICES = ("first", "second", "tie", "skip")
NAME = re.compile(r"[\w][\w .:@+-]*")
JOURNAL = ".journal.jsonl"


@dataclass(frozen=True)
class Question:
    """Two answers to one prompt."""

    row: Answered
    first: str
    second: str

    @property
    def key(self) -> str:
        """Return a digest of prompt and answers."""
        return json_hash([self.row.prompt, self.first, self.second])


def questions(rows: Sequence[Answered]) -> list[Question]:
    """Return every pair of different answers of every row, in order, each once."""
    found = [Question(row, row.answers[i], row.answers[j]) for row in rows for i, j in pairs_of(row.answers)]
    return list({q.key: q for q in found}.values())


class Labels:
    """The decisions of one labeller in a folder.

    Args:
        write: False only reads them, also while the labeller is at work.

    Raises:
        RecipeError: the name cannot be that of a file.
        RunError: the journal is damaged, or the labeller is at work in another process.
    """

    def __init__(self, folder: Path, labeller: str, seed: int = 0, write: bool = True):
        if not NAME.fullmatch(labeller):
            raise RecipeError(f"--labeller: letters, digits, spaces and . _ : @ + - make a name; got {labeller!r}")
        self.folder, self.labeller, self.seed = folder, labeller, seed
        busy, hint = f"{labeller} is labelling in {folder} already", "; end that one, or choose another name with --labeller"
        self._lock = hold(folder / f"{labeller}.lock", busy, hint) if write else None
        self.journal = Journal(folder / f"{labeller}{JOURNAL}", write)
        self.order: list[str] = []
        """Keys of the decisions in force, oldest first."""
        self.found: dict[str, dict[str, Any]] = {}
        for number in range(len(self.journal)):
            self._apply(cast(dict[str, Any], self.journal[str(number)]))

    def swapped(self, question: Question) -> bool:
        """Return whether the second answer is shown first."""
        return Random(short_hash(self.seed, self.labeller, question.key)).random() < 0.5

    def pending(self, requested: Sequence[Question]) -> list[Question]:
        """Return the questions without a decision."""
        return [q for q in requested if q.key not in self.found]

    def decide(self, question: Question, label: str, **facts: object) -> None:
        """Record a decision: `first`, `second` (in the row's order, however they were shown), `tie` or `skip`."""
        assert label in CHOICES, label
        self._add({"question": question.key, "label": label, **facts})

    def undo(self) -> str | None:
        """Undo the last decision in force; return its key, or None where there is none."""
        if not self.order:
            return None
        key = self.order[-1]
        self._add({"question": key, "label": None})
        return key

    def _add(self, entry: dict[str, Any]) -> None:
        self.journal.add(str(len(self.journal)), entry)
        self._apply(entry)

    def _apply(self, entry: dict[str, Any]) -> None:
        key = entry["question"]
        if key in self.found:
            self.order.remove(key)
            del self.found[key]
        if entry["label"] is not None:
            self.order.append(key)
            self.found[key] = entry

    def write(self, requested: Sequence[Question]) -> int:
        """Write the preference rows, whole or not at all; returns how many."""
        rows = []
        for question in requested:
            entry = self.found.get(question.key)
            if entry is not None and entry["label"] in ("first", "second"):
                rows.append(self._row(question, entry))
        path = self.folder / f"{self.labeller}.jsonl"
        aside = unfinished_path(path)
        try:
            aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            os.replace(aside, path)
        except OSError as error:
            raise RunError(
                f"cannot write {path}: {error.strerror or error}; the decisions are in {self.journal.path}"
            ) from error
        return len(rows)

    def _row(self, question: Question, entry: dict[str, Any]) -> dict[str, Any]:
        sides = (question.first, question.second)
        chosen, rejected = sides if entry["label"] == "first" else sides[::-1]
        own = {"prompt": question.row.prompt, "chosen": chosen, "rejected": rejected, "labeller": self.labeller}
        more = {new_name(k): v for k, v in entry.items() if k not in ("question", "label", "p")}
        p = {} if "p" not in entry else {"p": max(entry["p"], 1.0 - entry["p"])}
        return {**question.row.columns, **own, **p, **more}

    def close(self) -> None:
        """Close the journal and release the lock for other terminals."""
        self.journal.close()
        if self._lock is not None:
            self._lock.close()


def label_by_judge(
    labels: Labels,
    requested: Sequence[Question],
    judge: Judge,
    constitution: Constitution,
    principles: Sequence[Principle],
    batch: int,
) -> None:
    """Label everything that is pending with a judge, in both orders (see `feedback.judges.feedback.compare_answers`).

    Replies are stored as they arrive, so an interrupted call repeats no request.

    Raises:
        RunError: after all others are labelled, where the judge's replies to some hold too little of the letters.
    """
    said = Journal(labels.folder / f"{labels.labeller}.asked.jsonl")
    judge.use_cache(said)
    pending = labels.pending(requested)
    thin: list[dict[str, Any]] = []
    for start in range(0, len(pending), batch):
        part = pending[start : start + batch]
        pairs = [AnswerPair(q.row.words, q.first, q.second, q.row.columns) for q in part]
        drawn = [sample_principles(principles, 1, labels.seed, q.key) for q in part]
        for question, label in zip(part, compare_answers(judge, constitution, pairs, drawn), strict=True):
            if label is None:  # it stays pending: the next call tries again
                continue
            if label["mass"] < MIN_MASS:
                thin.append(label)
                continue
            p = label["p"]
            choice = "tie" if p == 0.5 else "first" if p > 0.5 else "second"
            labels.decide(question, choice, p=p, principles=label["principles"], judge=judge.identity)
    said.close()
    if thin:
        least = min(thin, key=lambda label: float(label["mass"]))
        raise RunError(
            f"{len(thin)} of {len(pending)} pairs have no label: less than {MIN_MASS:g} of the judge's probability lies on the "
            f"letters A and B; where it was least ({least['mass']:.3g}) it said {least['said'][:200]!r}"
        )


def facts(folder: Path, requested: Sequence[Question]) -> dict[str, Any]:
    """Return how much each labeller labelled, and how far every two agree on the pairs both labelled (skips do not count)."""
    known = {path.name.removesuffix(JOURNAL): path for path in sorted(folder.glob(f"*{JOURNAL}"))}
    judged: dict[str, dict[str, str]] = {}
    people: dict[str, Any] = {}
    for name in known:
        labels = Labels(folder, name, write=False)
        labels.close()
        current = {q.key: str(labels.found[q.key]["label"]) for q in requested if q.key in labels.found}
        counts = Counter(current.values())
        shown = [e for e in labels.found.values() if "swapped" in e and e["label"] in ("first", "second")]
        top = sum((e["label"] == "first") != e["swapped"] for e in shown)
        people[name] = {
            "labelled": len(current),
            **{choice: counts[choice] for choice in CHOICES},
            "chose_the_one_shown_first": top / len(shown) if shown else None,
        }
        judged[name] = {key: label for key, label in current.items() if label != "skip"}
    pairs = []
    for one, other in combinations(judged, 2):
        found = agreement(judged[one], judged[other])
        if found is not None:
            pairs.append({"one": one, "other": other, "items": found.items, "share": found.share, "kappa": found.kappa})
    return {"pairs": len(requested), "labellers": people, "agreement": pairs}
