"""A rule as the judge: no model, the same reply to the same question."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.option_types import Annotated, Field
from llmrecipe.core.registry import register
from llmrecipe.feedback.judges.labeller import Ask, Judge, Logprobs, short_hash
from llmrecipe.recipe.code_key import code_behind

RULES: dict[str, Callable[..., Any]] = {}

F = TypeVar("F", bound=Callable[..., Any])


def judge_rule(function: F) -> F:
    """Register a function as a judge under its name.

    It is called with an `Ask` and the options: it returns text where there are none, else one finite weight >= 0 per option,
    which are normalised; weights that are all 0 prefer no option. Packages named in `plugins` are searched for such functions.
    """
    RULES[function.__name__] = function
    return function


@register
class Rule(Judge):
    """A Python function as the judge: it reads the parts of a question (prompt, answers, principle), not its words.

    `manners`, the one that is built in, knows what is right in the world of the embedded data: a polite answer about the wanted
    animal and not about the other one. It criticises and revises by rule, prefers the better of two answers, and rates from
    the lowest option to the highest. `sure` is the probability it gives to what it holds to be right; between answers of equal
    worth it gives one half.
    """

    rule: str = "manners"
    """Which function."""
    sure: Annotated[float, Field(ge=0.5, le=1.0)] = 0.9
    """Probability of what the rule holds to be right."""

    def check(self, where: str) -> None:
        """Refuse a function that does not exist."""
        known = rules()
        if self.rule not in known:
            raise RecipeError(
                f"{where}.rule: no judge rule is called '{self.rule}'{did_you_mean(self.rule, known)} "
                f"(known: {', '.join(sorted(known))}); mark one with @judge_rule of llmrecipe.plugin in a package "
                "and name the package: plugins=[PACKAGE]"
            )

    @functools.cached_property
    def identity(self) -> str:
        """Return the function's name, its confidence, and a digest of its code where it comes from outside the package."""
        known = rules().get(self.rule)
        code = code_behind([known.__module__]) if known is not None else {}
        return f"rule:{self.rule}:{self.sure:g}" + (f":{short_hash(code)}" if code else "")

    def write(self, requests: Sequence[Ask]) -> Iterator[tuple[int, str | None]]:
        """Yield the function's text for each request."""
        rule = rules()[self.rule]
        for index, ask in enumerate(requests):
            text = rule(ask, ())
            yield index, text if isinstance(text, str) else None

    def choose(self, requests: Sequence[Ask], options: Sequence[str]) -> Iterator[tuple[int, Logprobs | None]]:
        """Yield the logarithms of the function's normalised weights, smoothed by its confidence.

        Raises:
            RecipeError: it returned something else than one weight an option.
        """
        rule = rules()[self.rule]
        for index, ask in enumerate(requests):
            weights = rule(ask, tuple(options))
            if weights is None:
                yield index, None
                continue
            if len(weights) != len(options) or not all(math.isfinite(w) and w >= 0 for w in weights):
                raise RecipeError(
                    f"judge: the rule '{self.rule}' returned {weights!r}; one finite weight >= 0 for each option is needed"
                )
            total = math.fsum(weights)
            yield index, soften([w / total if total else 1.0 / len(options) for w in weights], self.sure)


def soften(shares: Sequence[float], sure: float) -> Logprobs:
    """Compute log(shares (1 - e) + e / K) with e such that a share of 1 becomes `sure`; equal shares stay equal."""
    count = len(shares)
    mixed = (1.0 - sure) * count / (count - 1) if count > 1 else 0.0
    values = [share * (1.0 - mixed) + mixed / count for share in shares]
    return [math.log(v) if v > 0 else -math.inf for v in values]


def rules() -> dict[str, Callable[..., Any]]:
    """Return every registered function, those of plugins included."""
    registry.import_marked("@judge_rule")
    return RULES


@judge_rule
def manners(ask: Ask, options: Sequence[str]) -> str | list[float]:
    """Judge whether answers are polite and about the requested animal: critique and revision, comparison, rating."""
    from llmrecipe.data.toy import scorers as world

    parts = ask.parts
    prompt = str(parts.get("prompt", ""))
    if not options:
        answer = str(parts.get("answer", ""))
        if ask.task == "revise":
            return world.corrected(prompt, answer)
        return " ".join(world.critique(prompt, answer)) or "The answer is good as it is."
    if ask.task == "compare":
        first = world.prefers(prompt, str(parts["first"]), str(parts["second"]))
        return [first, 1.0 - first]
    best = round(_worth(prompt, str(parts.get("answer", ""))) * (len(options) - 1))
    return [float(i == best) for i in range(len(options))]


def _worth(prompt: str, answer: str) -> float:
    from llmrecipe.data.toy import scorers as world

    requested = world.parse_request(prompt)
    return world.polite(answer) if requested is None else world.manners(answer, *requested)
