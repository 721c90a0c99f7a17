"""`supernet_search`: the best sub-network of a trained supernet within a limit, trained from the start."""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.console import say
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.figures import new_figure
from llmrecipe.core.journal import json_hash
from llmrecipe.core.lazy import is_installed
from llmrecipe.core.option_types import (
    ClassVar,
    Field,
    Literal,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
)
from llmrecipe.core.registry import register
from llmrecipe.pipelines.search.evolution import Candidate, Evolution, Settings, Space
from llmrecipe.pipelines.step import Step
from llmrecipe.pipelines.steps.searched_recipe import SearchedRecipe
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.step_spec import unfinished

if TYPE_CHECKING:
    from llmrecipe.evaluation.evaluate_model import Subject
    from llmrecipe.methods.hybrid.noah import Noah
    from llmrecipe.pipelines.search.study import Search
    from llmrecipe.pipelines.search.trial import Trial
    from llmrecipe.pipelines.steps.workspace import Work


@dataclass
class ScoredDesign:
    """A sub-network that was scored with the weights of the supernet."""

    origin: str
    """evolution or random."""
    generation: int
    design: dict[str, dict[str, int]]
    parameters: int
    score: float


@register
class SupernetSearch(SearchedRecipe, Step):
    """best = argmin over sub-networks a of eval.monitor(a trained from the start), for a among the best within the supernet.

    Sub-networks of a finished run of `noah` are scored on the validation split with the weights they share, without training:
    generations of mutants and crossings of the best, none above `limit`. The `retrain` best are then trained from the start as
    plain stacks with sizes by layer, since scores of shared weights order them imperfectly. The control costs the same: as many
    sub-networks by chance are scored, and as many of them trained.

    `${stage:x}` is the run of the best one that evolution found. Left in the folder: `searched.yaml`, its plain recipe;
    population.jsonl, every sub-network with its score; table.md, both scores of those that were trained; search.png (with
    matplotlib); trials/, the runs. The same command resumes; nothing is scored or trained twice.

    Paper: Neural Prompt Search (arXiv 2206.04673).
    """

    gives: ClassVar[str] = "model"
    result: ClassVar[str] = "best"
    needs: ClassVar[dict[str, str]] = {"model": "model"}

    model: str
    """A finished run with `noah` in its stack."""
    recipe: str = "noah"
    """Recipe of that run; the best are trained by it with another stack."""
    words: list[str] = Field(default_factory=list)
    """Words for that recipe, such as model.path=FOLDER, data.path=rows.csv or steps=100."""
    limit: PositiveFloat = 0.01
    """Most parameters of a sub-network, without the head: a share of the model up to 1, a number above."""
    population: PositiveInt = 50
    """Sub-networks of a generation."""
    parents: PositiveInt = 10
    """The best so far, of which the next generation is made."""
    crossover: NonNegativeInt = 25
    """Crossings in a generation."""
    mutation: NonNegativeInt = 25
    """Mutants in a generation."""
    m_prob: OpenFraction = 0.2
    """Probability that a mutant's size is drawn again."""
    s_prob: OpenFraction = 0.4
    """Probability that a mutant's depth is drawn again."""
    mutate: Literal["gene", "reference"] = "gene"
    """Depths and sizes, or depths alone as in the paper's code."""
    generations: PositiveInt = 15
    """Generations, the first of which is drawn by chance."""
    val_batches: PositiveInt | None = None
    """Batches of the validation split that score a sub-network; default all."""
    retrain: PositiveInt = 3
    """How many of the best are trained from the start; as many of the control."""
    seeds: list[NonNegativeInt] = Field(default_factory=list)
    """Seeds each of them is trained with; default the step's own."""

    def check(self, where: str) -> None:
        """Refuse a recipe that is wrong, a population without parents, and a run without a supernet."""
        if any(unfinished(word) for word in self.words):
            return
        composition = self.composed()
        if self.parents > self.population:
            raise RecipeError(f"{where}.parents: {self.parents} is more than the {self.population} of a generation")
        if not unfinished(self.model):
            from llmrecipe.evaluation.evaluate_model import check_subject

            stack = check_subject(self.model, []).recipe.stack
            if not any(mapping["kind"] == "noah" for mapping in stack.values()):
                raise RecipeError(f"{where}.model: the stack of {self.model} has no noah; train one with recipe=noah")
        if composition.recipe.search is not None:
            raise RecipeError(f"{where}.recipe: {self.recipe} is a search itself; name the recipe of the supernet")

    def run(self, work: Work) -> dict[str, Any]:
        """Search, train what was found, and write the best as a plain recipe."""
        from llmrecipe.evaluation.evaluate_model import open_subject

        limited = [as_word(("eval", "batches"), self.val_batches)] if self.val_batches else []
        subject = open_subject(self.model, [*limited, "eval.bootstrap=0"])
        noah = self._supernet(subject)
        scored = self._search(work, subject, noah)
        lines = (json.dumps({"number": i, **asdict(entry)}) for i, entry in enumerate(scored))
        work.dir.write("population.jsonl", "".join(f"{line}\n" for line in lines))
        draw_search(scored, subject.composition.recipe.eval.monitor, self._sign(subject), work.path / "search.png")
        trained = self._chosen(scored, subject)
        stacks = [noah.written(subject.loaded.model, entry.design) for entry in trained]
        search, trials = self._retrain(work, stacks)
        return self._written(work, trained, search, trials)

    def _supernet(self, subject: Subject) -> Noah:
        from llmrecipe.methods.hybrid.noah import Noah

        found = [wrapper for wrapper in subject.loaded.mounted if isinstance(wrapper, Noah)]
        if not found:
            raise RecipeError(f"model: the stack of {self.model} has no noah; train one with recipe=noah")
        return found[-1]

    # --- scores of the supernet -----------------------------------------------------------------------------------

    def _search(self, work: Work, subject: Subject, noah: Noah) -> list[ScoredDesign]:
        """Score generations, then as many sub-networks by chance."""
        from llmrecipe.evaluation.evaluate_model import metrics_of, subject_tasks, token_rows
        from llmrecipe.methods._base.stack import base_parameters

        model = subject.loaded.model
        rows = token_rows(subject, "validation", subject_tasks(subject))
        limit = int(self.limit * base_parameters(model)) if self.limit <= 1 else int(self.limit)
        space = Space(noah.space(), noah.choices(model), lambda c: noah.cost(model, design_of(c)), limit)
        space.check("limit")
        journal = work.journal("scores")
        metric = subject.composition.recipe.eval.monitor.removeprefix("eval/")
        sign = self._sign(subject)
        scored: list[ScoredDesign] = []
        best: dict[str, float] = {}
        work.events.expect(2 * self.population * self.generations)

        def score(candidates: Sequence[Candidate], origin: str, generation: int) -> list[float]:
            for candidate in candidates:
                design = design_of(candidate)
                key = json_hash(design)
                if key not in journal:
                    noah.use(model, design)
                    journal.add(key, metrics_of(subject, rows)[metric])
                value = float(journal[key])  # type: ignore[arg-type]
                scored.append(ScoredDesign(origin, generation, design, noah.cost(model, design), value))
                best[origin] = min(best.get(origin, value), value, key=lambda v: sign * v)
                work.events.step(len(scored), generation=generation, score=value, **{f"best/{origin}": best[origin]})
            return [sign * s.score for s in scored[len(scored) - len(candidates) :]]

        settings = Settings(self.population, self.parents, self.crossover, self.mutation, self.m_prob, self.s_prob, self.mutate)
        evolution = Evolution(space, settings, work.seed)
        for number in range(self.generations):
            candidates = evolution.next()
            evolution.scored(candidates, score(candidates, "evolution", number))
        # Generations without parents are all drawn by chance: they are the control.
        control = Evolution(space, settings, random.Random(f"control {work.seed}").getrandbits(32))
        for number in range(self.generations):
            score(control.next(), "random", number)
        return scored

    def _sign(self, subject: Subject) -> float:
        from llmrecipe.feedback.directions import direction

        return 1.0 if direction(subject.composition.recipe.eval, subject.objective) == "min" else -1.0

    def _chosen(self, scored: list[ScoredDesign], subject: Subject) -> list[ScoredDesign]:
        """Return the best of both, those of evolution first."""
        sign = self._sign(subject)
        found: list[ScoredDesign] = []
        for origin in ("evolution", "random"):
            own = sorted((s for s in scored if s.origin == origin), key=lambda s: sign * s.score)
            found += own[: self.retrain]
        return found

    # --- training what was found ----------------------------------------------------------------------------------

    def _retrain(self, work: Work, stacks: list[dict[str, dict[str, Any]]]) -> tuple[Search, list[Trial]]:
        """Train plain stacks from the start, each an ordinary run of a search that tries these points."""
        from llmrecipe.pipelines.search.study import search

        points = [
            {f"stack.{kind}.{option}": value for kind, own in stack.items() for option, value in own.items()}
            for stack in stacks
        ]
        space: dict[str, list[Any]] = {key: [] for key in points[0]}
        for point in points:
            for key, values in space.items():
                if point[key] not in values:
                    values.append(point[key])
        words = [
            *self.words,
            as_word(("stack",), list(stacks[0])),
            as_word(("search",), {"space": space, "start": points, "trials": len(points), "sampler": "random"}),
            as_word(("search", "against"), ["parameters"]),
            as_word(("search", "seeds"), self.seeds),
            f"seed={work.seed}",
            as_word(("run", "dir"), str(work.path / "trials")),
        ]
        return search(self.recipe, words)

    def _written(self, work: Work, trained: list[ScoredDesign], search: Search, trials: list[Trial]) -> dict[str, Any]:
        sign = 1.0 if search.mode == "min" else -1.0
        done = [(entry, t) for entry, t in zip(trained, trials, strict=True) if t.state == "done" and t.value is not None]
        own = [trial for entry, trial in done if entry.origin == "evolution"]
        if not own:
            raise RecipeError("none of the sub-networks that were trained from the start came to an end; see trials/")
        best = min(own, key=lambda trial: sign * float(trial.value or 0.0))
        path = search.write_best(best, trials)
        os.replace(path, work.path / "searched.yaml")
        table = self._table(done, search.evaluation.monitor)
        say(table)
        work.dir.write("table.md", table + "\n")
        self.link_best(work.path, best.dirs[0])
        means = {
            origin: statistics.fmean(float(t.value or 0.0) for entry, t in done if entry.origin == origin)
            for origin in ("evolution", "random")
            if any(entry.origin == origin for entry, _ in done)
        }
        return {
            search.evaluation.monitor: best.value,
            "parameters": best.costs["parameters"],
            **{f"retrained/{origin}": mean for origin, mean in means.items()},
        }

    def _table(self, done: list[tuple[ScoredDesign, Trial]], monitor: str) -> str:
        """Return both scores of what was trained, as Markdown."""
        lines = [f"| found by | parameters | supernet | {monitor} | std |", "| --- | ---: | ---: | ---: | ---: |"]
        for entry, trial in done:
            spread = "" if trial.spread is None else f"{trial.spread:.4f}"
            lines.append(f"| {entry.origin} | {entry.parameters:,} | {entry.score:.4f} | {trial.value:.4f} | {spread} |")
        return "\n".join(lines)


def design_of(candidate: Candidate) -> dict[str, dict[str, int]]:
    """Return a candidate as sizes by kind and layer number."""
    return {kind: {str(layer): size for layer, size in enumerate(row)} for kind, row in candidate.items()}


def draw_search(scored: list[ScoredDesign], monitor: str, sign: float, path: Path) -> None:
    """Draw the scores of all sub-networks in the order they were scored, with the best so far; needs matplotlib."""
    if not is_installed("matplotlib"):
        return
    figure = new_figure(8, 3.2)
    order, cost = figure.subplots(1, 2, sharey=True)
    for origin in ("evolution", "random"):
        own = [entry for entry in scored if entry.origin == origin]
        values = [entry.score for entry in own]
        (points,) = order.plot(values, "o", alpha=0.4)
        best = list(accumulate(values, min if sign > 0 else max))
        order.step(range(len(best)), best, where="post", color=points.get_color(), label=origin)
        cost.plot([entry.parameters for entry in own], values, "o", alpha=0.4)
    order.set(xlabel="sub-network", ylabel=f"{monitor} of the supernet's weights")
    order.legend()
    cost.set(xlabel="parameters")
    figure.savefig(path, dpi=120)
