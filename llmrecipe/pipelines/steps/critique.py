"""`critique`: a judge criticises answers by principles and revises them; the revisions are rows to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.option_types import ClassVar, Field, Literal, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.feedback.judges.constitution import sample_principles
from llmrecipe.feedback.judges.feedback import Draft, judge_facts, revise_drafts
from llmrecipe.pipelines.step import Row, Step
from llmrecipe.pipelines.steps.judge_support import check_feedback, consult
from llmrecipe.recipe.step_spec import unfinished

if TYPE_CHECKING:
    from llmrecipe.data.formats.answered_prompts import Answered
    from llmrecipe.feedback.judges.constitution import Constitution, Principle
    from llmrecipe.feedback.judges.labeller import Judge
    from llmrecipe.pipelines.steps.workspace import Work

USES = ("critique", "revision")
GUESSED = 64
"""Number of example rows where the answers do not exist yet."""


@register
class Critique(Step):
    """Critique and revision, the supervised stage of Constitutional AI: y_m ~ A(x, y_{m-1}, k_m, c_m), m = 1..M.

    From an answer y_0, M rounds of k_m ~ A(x, y_{m-1}, what does c_m find wrong?) and a revision, with a principle c_m drawn
    for each round. Every revision becomes a row {prompt, completion} for supervised training, or only the last one
    (`keep: last`); words of a critique or a request that stand in a reply are cut out and counted as leaks, so that no target
    holds them. Where the judge fails, the answer's rounds end there. Rows keep round, principle and the prompt's other columns.

    Metrics: change_rate (revisions that differ from the answer before, over all and by round), distinct (share of different
    revisions: a fall tells of evasive answers that are all alike), length_ratio (words of the last revision per word of the
    first answer, mean), leaks, failures.

    Paper: Constitutional AI: Harmlessness from AI Feedback (arXiv 2212.08073).
    """

    gives: ClassVar[str] = "rows"
    needs: ClassVar[dict[str, str]] = {"answers": "rows"}

    answers: str
    """Rows with a prompt and an answer, such as `generate` leaves with n: 1."""
    judge: dict[str, Any] = Field(default_factory=lambda: {"kind": "rule"})
    """Who criticises and revises: {kind: rule | local | http, ...}."""
    constitution: str = "assistant"
    """A YAML file, or the name of a constitution of the package (assistant, manners)."""
    principles: list[str] = Field(default_factory=list)
    """Ids of the principles to draw from; all where none is named."""
    revisions: PositiveInt = 4
    """M, critiques and revisions of each answer."""
    keep: Literal["all", "last"] = "all"
    """Which revisions become rows."""
    splits: list[Literal["train", "validation", "test"]] = Field(["train"])
    """Splits of the answers; each becomes the same split of the result."""
    limit: PositiveInt | None = None
    """Maximum number of rows of each split, from the first."""
    batch: PositiveInt = 32
    """Answers sent to the judge at once."""

    def check(self, where: str) -> None:
        """Refuse a judge, a constitution or answers that cannot work."""
        check_feedback(self, USES, where)
        if not unfinished(self.answers):
            for split in self.splits:
                self._answers(split, f"{where}.answers")

    def example(self) -> Mapping[str, Sequence[Row]]:
        """Return the prompts, where they exist, with an invented revision."""
        from llmrecipe.data.formats.answered_prompts import Answered

        rows: dict[str, list[Row]] = {}
        for split in self.splits:
            known = not unfinished(self.answers)
            answered = self._answers(split) if known else [Answered(f"Example {i}.", ["a"], {}) for i in range(GUESSED)]
            rounds = range(1, self.revisions + 1) if self.keep == "all" else [self.revisions]
            texts = "This is an example of a revised answer."
            rows[split] = [self._row(a, {"revision": texts, "principle": ""}, m) for a in answered for m in rounds]
        return rows

    def run(self, work: Work) -> dict[str, Any]:
        """Criticise and revise the answers of each split."""
        judge, constitution, principles = consult(work, self.judge, self.constitution, self.principles, USES)
        facts: dict[str, Any] = {"constitution": constitution.id}
        for split in self.splits:
            answered = self._answers(split)
            revised = self._rounds(work, split, answered, judge, constitution, principles)
            rows = [self._row(a, r, m) for a, own in zip(answered, revised, strict=True) for m, r in self._kept(own)]
            if not rows:
                raise RunError(f"{split}: the judge {judge.identity} revised no answer; `llmrecipe chat` shows what it replies")
            facts[f"{split}/rows"] = work.write(rows, split)
            facts |= {f"{split}/{name}": value for name, value in revision_metrics(answered, revised).items()}
        for row in rows[:3]:
            prompt = row["prompt"]
            work.events.sample(0, prompt if isinstance(prompt, str) else prompt[-1]["content"], row["completion"])
        return {**facts, **judge_facts(judge)}

    def _answers(self, split: str, where: str = "answers") -> list[Answered]:
        from llmrecipe.data.formats.answered_prompts import read_answered

        return read_answered(self.answers, split, 1, self.limit, where)

    def _rounds(
        self,
        work: Work,
        split: str,
        answered: Sequence[Answered],
        judge: Judge,
        constitution: Constitution,
        principles: Sequence[Principle],
    ) -> list[list[dict[str, Any]]]:
        """Compute the revisions of each answer, round by round, each {critique, revision, leak, principle}."""
        done: list[list[dict[str, Any]]] = [[] for _ in answered]
        for number in range(1, self.revisions + 1):
            items: list[list[Any]] = [
                [i, own[-1]["revision"] if own else answered[i].answers[0]]
                for i, own in enumerate(done)
                if len(own) == number - 1
            ]

            def ask(part: list[list[Any]], seed: int, number: int = number) -> list[Any]:
                drawn = [sample_principles(principles, 1, work.seed, split, i, number)[0] for i, _ in part]
                drafts = [Draft(answered[i].words, text, answered[i].columns) for i, text in part]
                found = revise_drafts(judge, constitution, drafts, drawn)
                return [None if r is None else {**r, "principle": c.id} for r, c in zip(found, drawn, strict=True)]

            values = work.each(items, ask, batch=self.batch, name=f"{split}-round{number}")
            for (i, _), value in zip(items, values, strict=True):
                if value is not None:
                    done[i].append(value)
        return done

    def _kept(self, revisions: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
        numbered = list(enumerate(revisions, 1))
        return numbered if self.keep == "all" else numbered[-1:]

    def _row(self, answered: Answered, revision: dict[str, Any], number: int) -> Row:
        own = {
            "prompt": answered.prompt,
            "completion": revision["revision"],
            "round": number,
            "principle": revision["principle"],
        }
        return {**answered.columns, **own}


def revision_metrics(answered: Sequence[Answered], revised: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """Compute the metrics of the revisions (see `Critique`)."""
    changes: dict[int, list[bool]] = {}
    for a, own in zip(answered, revised, strict=True):
        before = a.answers[0].strip()
        for number, each in enumerate(own, 1):
            changes.setdefault(number, []).append(each["revision"] != before)
            before = each["revision"]
    every = [c for own in changes.values() for c in own]
    texts = [each["revision"] for own in revised for each in own]
    ends = [(a.answers[0], own[-1]["revision"]) for a, own in zip(answered, revised, strict=True) if own]
    rounds = max((len(own) for own in revised), default=0)
    return {
        "change_rate": sum(every) / max(len(every), 1),
        **{f"change_rate/round{number}": sum(own) / len(own) for number, own in changes.items()},
        "distinct": len(set(texts)) / max(len(texts), 1),
        "length_ratio": sum(len(b.split()) / max(len(a.split()), 1) for a, b in ends) / max(len(ends), 1),
        "leaks": sum(each["leak"] for own in revised for each in own),
        "cut_short": sum(len(own) < rounds for own in revised),
    }
