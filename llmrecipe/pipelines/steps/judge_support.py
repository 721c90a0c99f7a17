"""Code shared by the steps that use a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmrecipe.core.errors import DataError, RecipeError, did_you_mean
from llmrecipe.evaluation.agreement import agreement

if TYPE_CHECKING:
    from llmrecipe.data.formats.answered_prompts import Answered
    from llmrecipe.feedback.judges.constitution import Constitution, Principle
    from llmrecipe.feedback.judges.labeller import Judge
    from llmrecipe.pipelines.steps.workspace import Work


class JudgedStep(Protocol):
    """The options of a step that consults a judge by the principles of a constitution."""

    @property
    def judge(self) -> dict[str, Any]:
        """Return who judges: {kind: ..., ...}."""

    @property
    def constitution(self) -> str:
        """Return the name or file of the constitution."""

    @property
    def principles(self) -> list[str]:
        """Return the ids of the principles to draw from."""

    @property
    def splits(self) -> Sequence[str]:
        """Return the splits that are judged."""


def check_feedback(step: JudgedStep, uses: Sequence[str], where: str) -> None:
    """Refuse a judge, a constitution or principles that cannot do what a step wants.

    Args:
        step: the one that consults the judge.
        uses: texts every principle must have.

    Raises:
        RecipeError: naming the key.
    """
    from llmrecipe.feedback.judges.constitution import read_constitution
    from llmrecipe.feedback.judges.labeller import build_judge

    if not step.splits:
        raise RecipeError(f"{where}.splits: names no split; write [train]")
    judge = build_judge(step.judge, f"{where}.judge")
    judge.check(f"{where}.judge")
    if judge.shares:
        raise RecipeError(f"{where}.judge.path: must be given: a step has no model in training that could be the judge")
    read_constitution(step.constitution, f"{where}.constitution").choose(step.principles, uses, f"{where}.principles")


def consult(
    work: Work, body: dict[str, Any], constitution: str, principles: Sequence[str], uses: Sequence[str]
) -> tuple[Judge, Constitution, list[Principle]]:
    """Return the judge of a step, with the replies cached in the step's folder, its constitution and principles."""
    from llmrecipe.feedback.judges.constitution import read_constitution
    from llmrecipe.feedback.judges.labeller import build_judge

    judge = build_judge(body, "judge")
    judge.use_cache(work.journal("judge"))
    judge.open()
    read = read_constitution(constitution, "constitution")
    return judge, read, read.choose(principles, uses, "principles")


def check_truth(truth: str, where: str) -> None:
    """Refuse a truth that is neither a judge rule nor a source of rows.

    Raises:
        RecipeError: naming the rules there are.
    """
    from llmrecipe.data.formats.splits import open_split
    from llmrecipe.feedback.judges.rule import rules
    from llmrecipe.recipe.data_section import DataSection

    if truth in rules():
        return
    try:
        open_split(DataSection(path=truth), "train")
    except DataError as error:
        known = rules()
        near = did_you_mean(truth, known)
        raise RecipeError(
            f"{where}: {truth} is no judge rule{near} (known: {', '.join(sorted(known))}) "
            f"and no file of preference rows: {error}"
        ) from error


def agreement_facts(truth: str, split: str, labelled: Sequence[tuple[Answered, Sequence[int], float]]) -> dict[str, Any]:
    """Compute agreement (share), kappa and agreement_pairs between labels and the truth, without pairs either side calls a tie.

    Args:
        truth: a judge rule, or a source of preference rows.
        labelled: (row, places of its two answers, p of the first) of each pair.
    """
    from llmrecipe.feedback.judges.rule import rules

    ours: dict[Any, str] = {}
    theirs: dict[Any, str] = _by_rule(truth, labelled) if truth in rules() else _by_rows(truth, split)
    for answered, place, p in labelled:
        if p != 0.5:
            first, second = (answered.answers[k] for k in place)
            key, turned = pair_key(answered.words, first, second)
            ours[key] = "first" if (p > 0.5) != turned else "second"
    found = agreement(ours, theirs)
    if found is None:
        return {"agreement_pairs": 0}
    return {"agreement": found.share, "kappa": found.kappa, "agreement_pairs": found.items}


def pair_key(prompt: str, first: str, second: str) -> tuple[tuple[str, str, str], bool]:
    """Return a key of two answers that ignores their order, and whether the key has them in the opposite order."""
    turned = first > second
    return (prompt, *((second, first) if turned else (first, second))), turned


def _by_rule(name: str, labelled: Sequence[tuple[Answered, Sequence[int], float]]) -> dict[Any, str]:
    from llmrecipe.feedback.judges.labeller import Ask
    from llmrecipe.feedback.judges.rule import rules

    found = {}
    for answered, place, _ in labelled:
        first, second = (answered.answers[k] for k in place)
        parts = {"prompt": answered.words, "first": first, "second": second, "columns": answered.columns}
        weights = rules()[name](Ask((), "compare", parts), ("A", "B"))
        if weights is not None and weights[0] != weights[1]:
            key, turned = pair_key(answered.words, first, second)
            found[key] = "first" if (weights[0] > weights[1]) != turned else "second"
    return found


def _by_rows(source: str, split: str) -> dict[Any, str]:
    from llmrecipe.data.formats.answered_prompts import read_answered

    found = {}
    for row in read_answered(source, split, 2, where="truth"):
        key, turned = pair_key(row.words, row.answers[0], row.answers[1])
        found[key] = "second" if turned else "first"
    return found
