"""The interface of a step: a pipeline stage that is not a training."""

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
    """One stage `{kind: NAME, ...}`. Fields are its options; `seed` and the folder come from the runner (see `Work`).

    A step that is restarted after a stop gets the same options, seed, folder and journals. An option may hold `${stage:x}`,
    which is replaced by the result of that stage when the step runs.
    """

    group: ClassVar[str] = "step"
    gives: ClassVar[str] = "metrics"
    """Kind of result: `rows` (train.jsonl and so on, for `data.path=${stage:x}`), `model` (for `model.path=${stage:x}`), or
    nothing but `metrics`."""
    result: ClassVar[str] = ""
    """Subfolder that `${stage:x}` refers to; empty for the step's own folder."""
    needs: ClassVar[Mapping[str, str]] = {}
    """Options that take the result of a stage -> what it must be (`rows`, `model`), as in {"model": "model"}."""

    def check(self, where: str) -> None:
        """Refuse settings that would stop the step, before anything starts and without reading weights.

        An option whose text still holds `${stage:x}` (see `recipe.step_spec.unfinished`) is the result of a stage that has
        not run: nothing is known of it except that it will be what `needs` says.

        Args:
            where: key path of this step.

        Raises:
            UserError: naming the option.
        """

    def example(self) -> Mapping[str, Sequence[Row]]:
        """Return split (train, validation, test) -> example rows of about its final number, for dry runs of later trainings.

        Called only for steps with `gives = "rows"`; `unfinished` options as in `check`.
        """
        return {}

    def model_section(self) -> Mapping[str, Any]:
        """Return the `model` section of its future result, for the dry runs of later trainings.

        Called only for steps with `gives = "model"`; `unfinished` options as in `check`.
        """
        raise NotImplementedError

    def stands_on(self) -> Mapping[str, Any]:
        """Return JSON on which its result depends besides its options, such as the composition of a recipe it names.

        Raises:
            RecipeError: naming the option.
        """
        return {}

    def run(self, work: Work) -> dict[str, Any]:
        """Run the step; return the facts and metrics of `final/metrics.json`.

        Raises:
            UserError: it cannot be done.
        """
        raise NotImplementedError
