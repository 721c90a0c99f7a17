"""A judge that rates answers as a reward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.option_types import Annotated, ClassVar, Field, Fraction
from llmrecipe.core.registry import register
from llmrecipe.feedback.judges.choice import holds, thin
from llmrecipe.feedback.judges.labeller import build_judge
from llmrecipe.objectives.reward_interface import Answer, Reward

if TYPE_CHECKING:
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.feedback.judges.chosen import Choice
    from llmrecipe.feedback.judges.constitution import Constitution, Principle
    from llmrecipe.feedback.judges.labeller import Judge
    from llmrecipe.recipe.schema import ModelSection


@register
class JudgeReward(Reward):
    """Direct feedback (d-RLAIF): a judge rates answers from 1 to S; score = sum_i i P(i) / sum_i P(i), rescaled to [-1, 1].

    P(i) is the judge's probability of the number i as its reply, so no preference model is trained and none grows stale. With
    several principles the score is the mean over those it rated by. The judge is `{kind: rule | local | http, ...}`;
    `{kind: local}` without a path is the policy's own model as it was at step 0. Of an answer it rated by no principle it has
    no opinion; `unrated` is the share of the principles by which an answer was not rated. Where it rates none, or a reply has
    less than `min_mass` on the numbers, the run stops. Up to a scale of 9 no number begins another, so that a server needs one
    request for each rating.

    Paper: RLAIF vs. RLHF: Scaling Reinforcement Learning from Human Feedback with AI Feedback (arXiv 2309.00267).
    """

    judge: dict[str, Any] = Field(default_factory=lambda: {"kind": "rule"})
    """Who rates."""
    constitution: str = "assistant"
    """A YAML file, or the name of a constitution of the package (assistant, manners)."""
    principles: list[str] = Field(default_factory=list)
    """Ids of the principles to rate by; all where none is named."""
    scale: Annotated[int, Field(ge=2, le=100)] = 10
    """S, the best rating."""
    min_mass: Fraction = 0.5
    """Least probability that must lie on the numbers (of votes, the share that name one); 0 is never enough."""
    measures: ClassVar[tuple[str, ...]] = ("mass", "unrated", "votes")

    @functools.cached_property
    def labeller(self) -> Judge:
        """Hold the judge, ready once `open` was called."""
        return build_judge(self.judge, "objective.reward.judge.judge")

    @functools.cached_property
    def by(self) -> tuple[Constitution, list[Principle]]:
        """Hold the constitution and the principles to rate by."""
        from llmrecipe.feedback.judges.constitution import read_constitution

        made = read_constitution(self.constitution, "objective.reward.judge.constitution")
        return made, made.choose(self.principles, ["rating"], "objective.reward.judge.principles")

    def check(self, columns: Sequence[str], where: str) -> None:
        """Run the judge's own check, and check the constitution and the principles."""
        from llmrecipe.feedback.judges.constitution import read_constitution

        build_judge(self.judge, f"{where}.judge").check(f"{where}.judge")
        made = read_constitution(self.constitution, f"{where}.constitution")
        made.choose(self.principles, ["rating"], f"{where}.principles")

    def held_models(self, policy: ModelSection, frozen: bool) -> list[ModelSection]:
        """Return the model of a judge that has one of its own."""
        return self.labeller.held_models()

    def open(self, roles: Roles) -> None:
        """Prepare the judge; a local one without a path is the policy of step 0."""
        self.labeller.open(roles)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """Rate answers, in [-1, 1]; None where the judge rated one by no principle.

        Raises:
            RunError: the judge could rate none of the answers, or said something else than a number.
        """
        constitution, principles = self.by
        requests = [constitution.ask_rating(c, a.prompt, a.text, self.scale, a.columns) for a in answers for c in principles]
        replies = self.labeller.decide(requests, [str(i) for i in range(1, self.scale + 1)])
        if requests and all(reply is None for reply in replies):
            raise RunError(f"objective.reward: the judge {self.labeller.identity} could rate none of {len(answers)} answers")
        for ask, reply in zip(requests, replies, strict=True):
            if reply is not None and not holds(reply, self.min_mass):
                raise thin("objective.reward", self.labeller, ask, reply, "min_mass of the judge", self.min_mass)
        width = len(principles)

        by_answer = [replies[i : i + width] for i in range(0, len(replies), width)]
        rated = [[reply for reply in own if reply is not None] for own in by_answer]

        def mean(of: Callable[[Choice], float]) -> list[float | None]:
            return [math.fsum(map(of, own)) / len(own) if own else None for own in rated]

        self.measured["mass"] = mean(lambda reply: reply.mass)
        self.measured["unrated"] = [1.0 - len(own) / width for own in rated]
        self.measured["votes"] = mean(lambda reply: float(reply.how == "votes"))
        return mean(lambda reply: expected_rating(reply.logprobs))


def expected_rating(logprobs: Sequence[float]) -> float:
    """Compute the mean rating of 1..S under softmax(logprobs), rescaled so that 1 is -1 and S is 1."""
    most = max(logprobs)
    weights = [math.exp(value - most) for value in logprobs]
    mean = math.fsum(i * w for i, w in enumerate(weights)) / math.fsum(weights)
    return 2.0 * mean / (len(weights) - 1) - 1.0
