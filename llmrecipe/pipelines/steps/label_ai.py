"""`label_ai`: a judge compares answers by principles; the labels are preference rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.option_types import Annotated, ClassVar, Field, Fraction, Literal, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.feedback.judges.constitution import sample_principles
from llmrecipe.feedback.judges.feedback import AnswerPair, compare_answers, judge_facts, label_metrics
from llmrecipe.pipelines.step import Row, Step
from llmrecipe.pipelines.steps.judge_support import agreement_facts, check_feedback, check_truth, consult
from llmrecipe.recipe.step_spec import unfinished

if TYPE_CHECKING:
    from llmrecipe.data.formats.answered_prompts import Answered
    from llmrecipe.feedback.judges.constitution import Constitution, Principle
    from llmrecipe.feedback.judges.labeller import Judge
    from llmrecipe.pipelines.steps.workspace import Work

USES = ("comparison",)
GUESSED = 64
"""Number of example rows where the answers do not exist yet."""


@register
class LabelAi(Step):
    """AI labels of two answers: p(y1 better) = (p_fwd + 1 - p_bwd) / 2, the judge's probability over both orders.

    p_fwd = softmax(log P("A"), log P("B"))[A] with y1 shown as A, p_bwd the same with y2 as A, so that a taste for a place
    cancels: a judge that always says A gives 1/2. One principle is drawn for each pair, or `ensemble` of them and p is the
    mean. With `cot` the judge thinks aloud before each letter and every probability is clamped, since it is nearly certain
    after that. A row is {prompt, chosen, rejected, p}: chosen is the answer of the larger p and `p` its soft label, which
    `reward` reads; DPO and KTO read the sides alone. Rows keep the raw log-probabilities of both orders, principles, judge, and
    the prompt's other columns.

    Left out and counted: answers that are the same, pairs the judge failed at, letters with less than `min_mass` of the
    probability, |p - 1/2| below `min_margin`, and with `hard` also p of exactly 1/2.

    Metrics: position_bias (comparisons whose orders name the same letter), letter_a (mean probability of A), confidence (mean
    |p - 1/2|), entropy of p, mass on the letters with its minimum, votes (share of replies read by vote), length_ratio (words
    of chosen per word of rejected, mean), agreement and kappa with `truth`, failures.

    Papers: Constitutional AI: Harmlessness from AI Feedback (arXiv 2212.08073); RLAIF vs. RLHF: Scaling Reinforcement Learning
    from Human Feedback with AI Feedback (arXiv 2309.00267).
    """

    gives: ClassVar[str] = "rows"
    needs: ClassVar[dict[str, str]] = {"answers": "rows", "truth": "rows"}

    answers: str
    """Rows with a prompt and two or more answers, such as `generate` leaves with n: 2; every two of them are compared."""
    judge: dict[str, Any] = Field(default_factory=lambda: {"kind": "rule"})
    """Who labels: {kind: rule | local | http, ...}."""
    constitution: str = "assistant"
    """A YAML file, or the name of a constitution of the package (assistant, manners)."""
    principles: list[str] = Field(default_factory=list)
    """Ids of the principles to draw from; all where none is named."""
    ensemble: PositiveInt = 1
    """Principles applied to each pair."""
    swap: bool = True
    """Compare in both orders."""
    cot: bool = False
    """Let the judge think aloud before it chooses."""
    clamp: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.4, 0.6])
    """Bounds of a probability after a chain of thought."""
    hard: bool = False
    """Write p = 1 instead of the soft label."""
    min_margin: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Least |p - 1/2| of a row."""
    min_mass: Fraction = 0.5
    """Least probability that must lie on the letters in every order (of votes, the share that name one); 0 is never enough."""
    truth: str | None = None
    """Preference rows (human labels, say) or the name of a judge rule (manners), to measure agreement with."""
    splits: list[Literal["train", "validation", "test"]] = Field(["train"])
    """Splits of the answers; each becomes the same split of the result."""
    limit: PositiveInt | None = None
    """Maximum number of rows of each split, from the first."""
    batch: PositiveInt = 32
    """Pairs sent to the judge at once."""

    def check(self, where: str) -> None:
        """Refuse a judge, a constitution, bounds or answers that cannot work."""
        check_feedback(self, USES, where)
        if self.clamp[0] > self.clamp[1] or self.clamp[0] + self.clamp[1] != 1.0:
            raise RecipeError(f"{where}.clamp: must be [c, 1 - c] with c <= 1/2, so that no side is favoured; got {self.clamp}")
        if self.truth is not None and not unfinished(self.truth):
            check_truth(self.truth, f"{where}.truth")
        if not unfinished(self.answers):
            for split in self.splits:
                self._answers(split, f"{where}.answers")

    def example(self) -> Mapping[str, Sequence[Row]]:
        """Return the prompts, where they exist, with invented answers."""
        from llmrecipe.data.formats.answered_prompts import Answered

        rows: dict[str, list[Row]] = {}
        for split in self.splits:
            known = not unfinished(self.answers)
            two = ["This is an example of an answer.", "This is another example."]
            answered = self._answers(split) if known else [Answered(f"Example {i}.", two, {}) for i in range(GUESSED)]
            label = {"p": 0.9, "principles": ["x"], "logprobs": [[[-0.1, -2.3]] * 2]}
            rows[split] = [self._row(a, (0, 1), label, "") for a in answered]
        return rows

    def run(self, work: Work) -> dict[str, Any]:
        """Compare the answers of each split."""
        judge, constitution, principles = consult(work, self.judge, self.constitution, self.principles, USES)
        facts: dict[str, Any] = {"constitution": constitution.id}
        for split in self.splits:
            answered = self._answers(split)
            places, same = self._places(answered)
            labels = self._labels(work, split, answered, places, judge, constitution, principles)
            kept, lost = self._kept(places, labels)
            rows = [self._row(answered[i], place, label, judge.identity) for (i, *place), label in kept]
            if not rows:
                raise RunError(
                    f"{split}: no pair of answers has a label; left out: {_listed({**lost, 'same': same})}{_thinnest(labels)}"
                )
            facts[f"{split}/rows"] = work.write(rows, split)
            found = label_metrics([label for label in labels if label is not None])
            found |= {f"dropped/{name}": count for name, count in {"same": same, **lost}.items()}
            found["length_ratio"] = sum(len(r["chosen"].split()) / max(len(r["rejected"].split()), 1) for r in rows) / len(rows)
            if self.truth is not None:
                found |= agreement_facts(self.truth, split, [(answered[i], place, label["p"]) for (i, *place), label in kept])
            facts |= {f"{split}/{name}": value for name, value in found.items()}
        for row in rows[:3]:
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            work.events.sample(0, prompt, row["chosen"], rejected=row["rejected"], p=row["p"])
        return {**facts, **judge_facts(judge)}

    def _answers(self, split: str, where: str = "answers") -> list[Answered]:
        from llmrecipe.data.formats.answered_prompts import read_answered

        return read_answered(self.answers, split, 2, self.limit, where)

    def _places(self, answered: Sequence[Answered]) -> tuple[list[list[int]], int]:
        """Return [row, first, second] of every pair of different answers, and how many pairs are the same answer twice."""
        from llmrecipe.data.formats.answered_prompts import pairs_of

        places = [[i, *place] for i, a in enumerate(answered) for place in pairs_of(a.answers)]
        total = sum(len(a.answers) * (len(a.answers) - 1) // 2 for a in answered)
        return places, total - len(places)

    def _labels(
        self,
        work: Work,
        split: str,
        answered: Sequence[Answered],
        places: Sequence[list[int]],
        judge: Judge,
        constitution: Constitution,
        principles: Sequence[Principle],
    ) -> list[dict[str, Any] | None]:
        def ask(part: list[list[int]], seed: int) -> list[Any]:
            pairs = [
                AnswerPair(row.words, row.answers[first], row.answers[second], row.columns)
                for row, first, second in ((answered[i], first, second) for i, first, second in part)
            ]
            drawn = [sample_principles(principles, self.ensemble, work.seed, split, place) for place in part]
            limits = (self.clamp[0], self.clamp[1])
            return compare_answers(judge, constitution, pairs, drawn, swap=self.swap, reasoning=self.cot, clamp=limits)

        def count(found: Sequence[Any]) -> dict[str, Any]:
            return label_metrics([label for label in found if label is not None])

        return work.each(list(places), ask, batch=self.batch, name=f"{split}-labels", count=count)

    def _kept(self, places: Sequence[list[int]], labels: Sequence[dict[str, Any] | None]) -> tuple[list[Any], dict[str, int]]:
        """Return the labelled pairs that become rows, and how many do not, by reason."""
        lost = {"failed": 0, "mass": 0, "margin": 0}
        kept = []
        for place, label in zip(places, labels, strict=True):
            reason = self._reason(label)
            if reason:
                lost[reason] += 1
            else:
                kept.append((place, label))
        return kept, lost

    def _reason(self, label: dict[str, Any] | None) -> str | None:
        if label is None:
            return "failed"
        if label["mass"] < self.min_mass or label["mass"] == 0.0:
            return "mass"
        gap = abs(label["p"] - 0.5)
        return "margin" if gap < self.min_margin or (self.hard and gap == 0.0) else None

    def _row(self, answered: Answered, place: Sequence[int], label: Mapping[str, Any], judge: str) -> Row:
        first, second = (answered.answers[k] for k in place)
        swapped = label["p"] < 0.5
        p = 1.0 - label["p"] if swapped else label["p"]
        own = {
            "prompt": answered.prompt,
            "chosen": second if swapped else first,
            "rejected": first if swapped else second,
            "p": 1.0 if self.hard else p,
            "swapped": swapped,
            "principles": label["principles"],
            "judge": judge,
            "logprobs": label["logprobs"],
        }
        return {**answered.columns, **own, **({"rationales": label["rationales"]} if "rationales" in label else {})}


def _thinnest(labels: Sequence[Mapping[str, Any] | None]) -> str:
    """Quote the judge's reply in which the letters had the least probability."""
    said = [label for label in labels if label is not None and label.get("said")]
    if not said:
        return ""
    label = min(said, key=lambda label: float(label["mass"]))
    return f"; the reply with the least mass on the letters ({label['mass']:.3g}) was {label['said'][:200]!r}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
