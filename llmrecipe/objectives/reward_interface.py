"""The interface of a reward, and the weighted sum of several."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, RunError, did_you_mean
from llmrecipe.core.registry import CONFIG
from llmrecipe.recipe.validate import build_component

if TYPE_CHECKING:
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.recipe.schema import ModelSection
    from llmrecipe.runs.open_model import LoadedModel


@dataclass(frozen=True)
class Answer:
    """One sampled answer with everything a reward may look at."""

    prompt: str
    """Text of the prompt, without special tokens."""
    text: str
    """Text of the answer, cut at its end token."""
    columns: Mapping[str, Any]
    """The prompt row's other columns (`answer`, `topic`, ...)."""
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    """Token ids of the answer, its end token included where it was reached."""
    finished: bool
    """Whether the answer ended by itself."""


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Reward:
    """Base class of a reward, which scores answers. Fields are the options under `objective.reward.NAME`."""

    group: ClassVar[str] = "reward"
    measures: ClassVar[tuple[str, ...]] = ()
    """Names of what `score` leaves in `measured`, reported as rewards/NAME/MEASURE."""
    builtin_rows_only: ClassVar[bool] = False
    """Whether it scores only sentences of the built-in sets; a recipe that names it drops it when the rows are other ones."""

    @functools.cached_property
    def measured(self) -> dict[str, Sequence[float | None]]:
        """Hold measure -> one number for each answer of the last call of `score`, None where the answer has none."""
        return {}

    def needs(self) -> Sequence[str]:
        """Name the columns every prompt row must hold; rows without one, or with null in it, are never scored."""
        return ()

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse options this reward cannot score with, before any weight is read.

        Args:
            columns: what the prompt rows hold besides the prompt.
            where: key path of this reward.

        Raises:
            RecipeError: naming the option.
        """

    def prepare(self, loaded: LoadedModel, frozen: bool) -> None:
        """Mount what scoring needs on the policy's freshly loaded base, before the policy's own stack is attached.

        Args:
            frozen: whether the policy leaves the weights of its base as they are.
        """

    def held_models(self, policy: ModelSection, frozen: bool) -> list[ModelSection]:
        """Return the models that scoring holds in memory in addition to the policy, for the memory estimate.

        Args:
            frozen: whether the policy leaves the weights of its base as they are.
        """
        return []

    def open(self, roles: Roles) -> None:
        """Load what scoring needs; called once, before the first answer."""

    def score(self, answers: Sequence[Answer]) -> Sequence[Any]:
        """Return one score for each answer, larger is better: a number of any type, or None for no opinion."""
        raise NotImplementedError


class Rewards:
    """Weighted sum of rewards, score(answer) = sum_i weight_i * score_i(answer).

    Args:
        section: name -> {kind, weight, options}; the kind is the name where it is not given, the weight is 1.
        where: key path of the section.

    Raises:
        RecipeError: there is no reward, or an option is wrong.
    """

    def __init__(self, section: Mapping[str, Any], where: str = "objective.reward"):
        known = registry.names("reward")
        if not section:
            raise RecipeError(
                f"{where}: no reward is given to score the answers; add one of {', '.join(known)}: '+{where}.exact_match={{}}'"
            )
        self.parts: dict[str, tuple[Reward, float]] = {}
        self.where = where
        self._opened = False
        for name, body in section.items():
            self.parts[str(name)] = _part(str(name), body, f"{where}.{name}")

    def needs(self) -> dict[str, str]:
        """Column that every prompt row must hold -> key path of the first reward that reads it."""
        found: dict[str, str] = {}
        for name, (reward, _) in self.parts.items():
            for column in reward.needs():
                found.setdefault(column, f"{self.where}.{name}")
        return found

    def check(self, columns: Sequence[str]) -> None:
        """Check the options of every reward, and that the rows have the columns it reads.

        Raises:
            RecipeError: naming the option or the column.
        """
        for name, (reward, _) in self.parts.items():
            reward.check(columns, f"{self.where}.{name}")
            for column in reward.needs():
                need_column(column, columns, f"{self.where}.{name}")

    def prepare(self, loaded: LoadedModel, frozen: bool) -> None:
        """Run the preparation of every reward."""
        for reward, _ in self.parts.values():
            reward.prepare(loaded, frozen)

    def held_models(self, policy: ModelSection, frozen: bool) -> list[ModelSection]:
        """Return the models that all rewards hold in memory in addition to the policy."""
        return [section for reward, _ in self.parts.values() for section in reward.held_models(policy, frozen)]

    def open(self, roles: Roles) -> None:
        """Load what every reward needs, once."""
        if not self._opened:
            for reward, _ in self.parts.values():
                reward.open(roles)
            self._opened = True

    @property
    def names(self) -> list[str]:
        """Return the names of the scores and measures that `score` returns besides the sums."""
        measures = [f"{name}/{measure}" for name, (reward, _) in self.parts.items() for measure in reward.measures]
        return [*self.parts, *measures]

    def score(self, answers: Sequence[Answer]) -> tuple[list[float | None], dict[str, list[float | None]]]:
        """Return the weighted sums, and the unweighted scores and measures of each reward by name.

        A reward without an opinion of an answer (None) is left out of that answer's sum, which is None where no reward has one.

        Raises:
            RunError: a score is no finite number, or there are too few scores.
        """
        own: dict[str, list[float | None]] = {}
        for name, (reward, _) in self.parts.items():
            scores = reward.score(answers) if answers else []
            if len(scores) != len(answers):
                raise RunError(f"{self.where}.{name}: {len(scores)} scores for {len(answers)} answers")
            own[name] = [_number(score, a, f"{self.where}.{name}") for score, a in zip(scores, answers, strict=True)]
        sums = [self._sum({name: own[name][i] for name in self.parts}) for i in range(len(answers))]
        for name, (reward, _) in self.parts.items():
            for measure in reward.measures:
                own[f"{name}/{measure}"] = [*reward.measured[measure]] if answers else []
        return sums, own

    def _sum(self, scores: Mapping[str, float | None]) -> float | None:
        """Return the weighted sum of the scores that are there; None where there is none."""
        given = [(weight, score) for name, (_, weight) in self.parts.items() if (score := scores[name]) is not None]
        return sum(weight * score for weight, score in given) if given else None

    def without_opinion(self, answers: Sequence[Answer]) -> RunError:
        """Return the error for answers of which no reward has an opinion, showing the first."""
        shown = "".join(f", such as {a.text!r:.300} to {a.prompt!r:.300}" for a in answers[:1])
        return RunError(
            f"{self.where}: no reward has an opinion of any answer (all are None){shown}; add a reward that scores every "
            "answer, or leave such prompts out"
        )


def _number(score: object, answer: Answer, where: str) -> float | None:
    """Return a score as a float; None stays.

    Raises:
        RunError: it is no number, or not a finite one.
    """
    if score is None:
        return None
    # Scalars of numpy and tensors without dimensions hold one Python number.
    value = score.item() if getattr(score, "ndim", None) == 0 and hasattr(score, "item") else score
    try:
        number = float(value) if isinstance(value, Real | Decimal) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RunError(
            f"{where}: the score of an answer must be a finite number, or None for no opinion; got {score!r:.100} for "
            f"the answer {answer.text!r:.300} to {answer.prompt!r:.300}"
        )
    return number


def _part(name: str, body: object, where: str) -> tuple[Reward, float]:
    if body is None:
        body = {}
    if not isinstance(body, Mapping):
        raise RecipeError(f"{where}: must be a mapping of options, such as {{weight: 1.0}}; got {body!r}")
    options = dict(body)
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RecipeError(f"{where}.weight: must be a number; got {weight!r}")
    kind = str(options.pop("kind", name))
    if kind not in registry.names("reward") and "kind" not in body:
        known = registry.names("reward")
        raise RecipeError(
            f"{where}: '{name}' is not a kind of reward{did_you_mean(name, known)}; name the kind: "
            f"{where}.kind=NAME (known: {', '.join(known)})"
        )
    checked = build_component("reward", {"kind": kind, **options}, where)
    return registry.load_class("reward", kind, where)(**{k: v for k, v in checked.items() if k != "kind"}), float(weight)


def need_column(column: str, columns: Sequence[str], where: str) -> None:
    """Refuse rows without a column.

    Raises:
        RecipeError: naming the columns there are.
    """
    if column not in columns:
        raise RecipeError(
            f"{where}: the prompt rows have no column '{column}'{did_you_mean(column, columns)} "
            f"(they have {', '.join(sorted(columns)) or 'only the prompt'})"
        )
