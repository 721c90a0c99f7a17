"""`search`: a search over a recipe as a stage; its result is the run of its best trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrecipe.core.option_types import ClassVar, Field
from llmrecipe.core.registry import register
from llmrecipe.core.score_intervals import ENDS
from llmrecipe.pipelines.step import Step
from llmrecipe.pipelines.steps.searched_recipe import SearchedRecipe
from llmrecipe.recipe.step_spec import unfinished

if TYPE_CHECKING:
    from llmrecipe.pipelines.steps.workspace import Work


@register
class Search(SearchedRecipe, Step):
    """best = argmin over trials t of eval.monitor(run of recipe with the values of t), as `llmrecipe search` finds it.

    The recipe's own `search` says what is tried; `${stage:x}` is the run directory of the best trial (of its first seed), so
    that later stages continue from that model; with `search.final` it is the run of its last training. Trials are in `trials/`
    with their journal and `searched.yaml`, the best as a plain recipe; one that is finished is never run again. `seed` is the
    trials' seed, unless `search.seeds` lists others.
    """

    gives: ClassVar[str] = "model"
    result: ClassVar[str] = "best"

    recipe: str
    """Name or file of a recipe with a `search` section."""
    words: list[str] = Field(default_factory=list)
    """Words for that recipe, such as steps=40, search.trials=6 or model.path=${stage:sft}."""

    def check(self, where: str) -> None:
        """Compose every end of the space; where no other stage has to run first, dry-run the first point without weights."""
        from llmrecipe.pipelines.search import space, study

        if any(unfinished(word) for word in self.words):
            space.check_space(self.recipe, [*self.words, *study.OWN_WORDS], space.axes_of(self.composed()))
            return
        study.Search(self.recipe, self.words, self.composed()).check()

    def run(self, work: Work) -> dict[str, Any]:
        """Run the trials that are missing."""
        from llmrecipe.pipelines.search.study import search

        found, trials = search(self.recipe, [*self.words, f"seed={work.seed}", f"run.dir={work.path / 'trials'}"])
        best = found.best(trials)
        for trial in trials:
            work.events.step(trial.number + 1, **({} if trial.value is None else {found.evaluation.monitor: trial.value}))
        self.link_best(work.path, best.dirs[0] if found.final is None else found.final.dir)
        point = {f"best/{key}": value for key, value in best.point.items()}
        monitor, tested = found.evaluation.monitor, {} if found.final is None else found.final.test
        ends = {} if found.ends is None else {f"{monitor}/{end}": v for end, v in zip(ENDS, found.ends, strict=True)}
        return {monitor: best.value, **ends, **tested, "trials": len(trials), **point}
