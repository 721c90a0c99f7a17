"""The interface of a step: one thing a pipeline does that is no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core.registry import CONFIG

if TYPE_CHECKING:
    from llmrecipe.pipelines.steps.workspace import Work

Row = dict[str, Any]


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Step:
    """One stage `{kind: NAME, ...}`. Fields are its options; `seed` and the folder are given by the frame (see `Work`).

    A step that is started again after a stop is given the same options, seed and folder, and what it kept in its journals.
    An option may hold `${stage:x}`: what that stage has left stands there when the step runs.
    """

    group: ClassVar[str] = "step"
    gives: ClassVar[str] = "metrics"
    """What it leaves: `rows` (train.jsonl and so on, for `data.path=${stage:x}`), `model` (for `model.path=${stage:x}`), or
    nothing but `metrics`."""
    result: ClassVar[str] = ""
    """Folder within its own that `${stage:x}` stands for; empty for its own."""
    needs: ClassVar[Mapping[str, str]] = {}
    """Options that take the result of a stage -> what it must be (`rows`, `model`), as in {"model": "model"}."""

    def check(self, where: str) -> None:
        """Refuse what would stop the step, before anything starts and without reading weights.

        An option whose text still holds `${stage:x}` (see `recipe.step_spec.unfinished`) is the result of a stage that has
        not run: nothing is known of it but that it will be what `needs` says.

        Args:
            where: key path of this step.

        Raises:
            UserError: naming the option.
        """

    def example(self) -> Mapping[str, Sequence[Row]]:
        """Split (train, validation, test) -> rows like those it will leave, about as many, for the dry runs of later trainings.

        Only steps with `gives = "rows"` are asked; `unfinished` options as in `check`.
        """
        return {}

    def model_section(self) -> Mapping[str, Any]:
        """The `model` section that what it will leave starts from, for the dry runs of later trainings.

        Only steps with `gives = "model"` are asked; `unfinished` options as in `check`.
        """
        raise NotImplementedError

    def stands_on(self) -> Mapping[str, Any]:
        """JSON its result follows from besides its options, such as what a recipe it names composes to.

        Raises:
            RecipeError: naming the option.
        """
        return {}

    def run(self, work: Work) -> dict[str, Any]:
        """Do it; returns the facts and metrics of `final/metrics.json`.

        Raises:
            UserError: it cannot be done.
        """
        raise NotImplementedError
