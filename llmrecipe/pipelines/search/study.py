"""A search: each trial is an ordinary run, kept under the key of its recipe; what was tried is a journal.

    runs/<recipe>-search/
        trials.jsonl        one line a finished trial: number, point, value of each seed, state
        <number>-<key>/     the run of a trial and a seed
        searched.yaml       the best trial as a plain recipe
        interval.json       the interval of its score over the validation rows, where it has one seed
        final-<key>/        with `final`: its last training, on training and validation rows
        pareto/             with `against`: every trial that no other beats in score and costs, as a plain recipe
        search.png          values over trials and over each key of the space, and the front

The sampler of trial k is seeded by (seed, k) and knows the trials before it, so a resumed search samples the same points as an
uninterrupted one. With `parallel` trials run at once, in rounds: a sampler knows what earlier rounds have shown, and of its own
round only which points it tries. The value of a trial is the best value of `eval.monitor` on the validation split, or the last
one where `eval.load_best` is off, averaged over `seeds`. Trials never read the test split. Costs (`against`) are made small at
the same time: then the result is a front, and `pick` and `limits` choose one of it.
"""

from __future__ import annotations

import functools
import math
import shlex
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.apart import apart
from llmrecipe.core.console import say_aside, say_progress
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.score_intervals import Ends, with_interval
from llmrecipe.core.signals import handled_by
from llmrecipe.core.steady_output import steady_output
from llmrecipe.data.formats.splits import has_split
from llmrecipe.pipelines.run_stages import Pipeline, run_stage, state_of
from llmrecipe.pipelines.search import costs, space, stepwise
from llmrecipe.pipelines.search.proposals import Proposed, propose, rounds
from llmrecipe.pipelines.search.samplers import check_sampler, resolve_sampler
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.pipelines.search.trial_journal import TrialJournal
from llmrecipe.pipelines.search.winner import FINAL_WORDS, Final, check_final, final_length, row_interval, run_final
from llmrecipe.pipelines.subprocesses import Children, Machine
from llmrecipe.recipe.code_key import code_of
from llmrecipe.recipe.compose import Composition, compose
from llmrecipe.recipe.content_key import content_key
from llmrecipe.recipe.extending import extending_yaml
from llmrecipe.recipe.pipeline_plan import Plan, Planned
from llmrecipe.recipe.pipeline_spec import WrittenStage
from llmrecipe.recipe.rights import rights_of
from llmrecipe.runs.durable import write_text
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.runs.run_record import read_run

if TYPE_CHECKING:
    import optuna

    from llmrecipe.feedback.directions import Direction

OWN_WORDS = ("search=null", "eval.test=false", "save.end=false")
"""Overrides of every trial besides its point: it is no search, does not evaluate the test split, and is not continued."""

NO_SPLIT = "a search needs a validation split (data.validation=0.1) and a metric of it"

NOT_BEGUN = 3
"""Runs that could not begin after which a search without any result stops."""


class Search:
    """One search in its folder."""

    def __init__(self, recipe: str, words: list[str], composition: Composition):
        self.recipe, self.words, self.composition = recipe, words, composition
        self.evaluation = composition.recipe.eval
        run = composition.recipe.run
        self.folder = Path(run.dir) if run.dir is not None else Path(run.root) / f"{run.name or composition.name}-search"
        path = self.folder / "trials.jsonl"
        self.section = resolve_sampler(space.axes_of(composition), path)
        command = shlex.join(["llmrecipe", "search", f"recipe={recipe}", *words])
        parallel = self.section.parallel
        machine = Machine(1, (), 1) if parallel == 1 else apart(lambda: Machine.here(parallel), "search.parallel")
        self.pipeline = Pipeline(Plan(composition.name, self.folder), command, Children(machine))
        self.lock, self.busy = threading.Lock(), dict[str, threading.Lock]()
        self.folders: dict[str, Path] = {}
        self.one_came_to_an_end, self.not_begun = False, 0
        self.ends: Ends | None = None
        self.final: Final | None = None
        own = ("run", "search")
        self.base = [w for w in words if w.lstrip("+~").split("=")[0].split(".")[0] not in own]
        self.journal = TrialJournal(path, composition, self.section, lambda: compose(recipe, [*self.base, *OWN_WORDS]))

    def check(self) -> None:
        """Refuse settings with which no trial could run, before the first starts.

        Raises:
            UserError: a value of the space, the pruner, or what a dry run finds.
        """
        check_sampler(self.section)
        if self.section.prune != "off" and self.section.against:
            raise RecipeError("search.prune: a trial that is behind in score may be ahead in cost; set search.prune=off")
        if self.section.prune != "off" and self.evaluation.every is None:
            raise RecipeError("search.prune: compares trials at their evaluations; set eval.every, or search.prune=off")
        if self.section.parallel > 1 and self.composition.recipe.runtime.processes > 1:
            raise RecipeError(
                "search.parallel: each trial has several processes here; set search.parallel=1 or runtime.processes=1"
            )
        space.check_space(self.recipe, [*self.base, *OWN_WORDS], self.section)
        if self.evaluation.monitor.startswith("eval/") and not has_split(self.composition.recipe.data, "validation"):
            raise RecipeError(f"eval.monitor: {self.evaluation.monitor} compares the trials, and {NO_SPLIT}")
        if self.section.final:
            first = {key: space.first(value) for key, value in self.section.space.items()}
            check_final(self.composition.recipe.data, self._compose(FINAL_WORDS, first).recipe.data)
        self.mode = apart(self._examined, "search: the check of its first trial")

    def _examined(self) -> Direction:
        """Dry-run the first point; return the better direction of what is monitored."""
        from llmrecipe.training.dry_run import examine

        first = {key: space.first(value) for key, value in self.section.space.items()}
        examine(self.trial_composition(first, self.seeds[0]), follow=False)
        return self.mode

    @functools.cached_property
    def mode(self) -> Direction:
        """Return whether a small or a large value of a trial is better."""
        from llmrecipe.feedback.directions import direction
        from llmrecipe.recipe.validate import build_object

        return direction(self.evaluation, build_object("objective", self.composition.recipe.objective, "objective"))

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of each trial."""
        return self.section.seeds or [self.composition.recipe.seed]

    @steady_output()
    def run(self) -> list[Trial]:
        """Run every trial that is not in the journal yet, and return all trials.

        Raises:
            Interrupted: a signal arrived; the running trial has written a checkpoint.
            RunError: no trial completed.
        """
        points = space.grid_points(self.section) if self.section.sampler == "grid" else None
        stepped = self.section.sampler == "stepwise"
        count = stepwise.size(self.section) if stepped else len(points) if points is not None else self.section.trials
        trials = self.journal.read()
        self.one_came_to_an_end = any(trial.state == "done" for trial in trials)
        with handled_by(self.pipeline.children.forward), ThreadPoolExecutor(self.section.parallel) as pool:
            for numbers in rounds(self.section, count):
                if numbers.stop > len(trials):
                    proposed = propose(self.section, self.mode, trials[: numbers.start], numbers, points, self._losses)
                    self._run_round(pool, proposed[len(trials) - numbers.start :], trials)
        if all(trial.value is None for trial in trials):
            raise RunError(f"search: none of {len(trials)} trials came to an end; their messages stand above")
        return trials

    def _run_round(self, pool: ThreadPoolExecutor, proposed: list[Proposed], trials: list[Trial]) -> None:
        """Run trials at once and record them in order; after a stop, those before the first that did not end.

        Raises:
            LlmRecipeError: the first failure, once the others have ended.
        """
        for number, point, _ in proposed:
            say_progress(f"trial {number}: {', '.join(f'{k} {v}' for k, v in point.items())}")
        running = [pool.submit(self._try, *trial) for trial in proposed]
        intact: set[Future[Trial]] | None = None
        # A signal may reach any thread; Python handles it in this one, as soon as it wakes up.
        while not all(future.done() for future in running):
            if intact is None and any(future.done() and future.exception() for future in running):
                intact = {future for future in running if future.done()}
                self.pipeline.children.stop()
            wait(running, timeout=0.2)
        failed = next((future for future in running if future.exception()), None)
        for future in running:
            if failed is not None and (future is failed or (intact is not None and future not in intact)):
                failed.result()  # raises
            trial = future.result()
            trials.append(trial)
            self.one_came_to_an_end |= trial.state == "done"
            self.journal.write(trial)

    # --- one trial ------------------------------------------------------------------------------------------------

    def _try(self, number: int, point: dict[str, Any], drawn: optuna.Trial) -> Trial:
        """Run a point with each seed."""
        trial = Trial(number, point)
        spent: list[dict[str, float]] = []
        for seed in self.seeds:
            with self.lock:  # composing is not for several threads at once
                planned = self.planned(str(number), self.trial_composition(point, seed))
                busy = self.busy.setdefault(planned.key, threading.Lock())
            trial.dirs.append(str(planned.dir))
            enough = self._pruner(planned, drawn, trial) if seed == self.seeds[0] and self.section.prune != "off" else None
            try:
                with busy:  # the same point twice in a round is one run
                    how = run_stage(self.pipeline, planned, enough).how
            except RunError as error:
                # A point whose run cannot begin fails alone; where nothing else has run either, the cause is not the point.
                self.not_begun += state_of(planned) != "failed"
                if self.not_begun >= NOT_BEGUN and not self.one_came_to_an_end:
                    raise
                say_aside(f"trial {number} failed: {error}")
                trial.state = "failed"
                return trial
            if enough is not None and how != "stopped" and enough():
                how = "stopped"  # a finished run of an earlier start that would have been stopped
            if how == "stopped":
                trial.state, trial.values = "pruned", [list(trial.reports.values())[-1]]
                break
            value = self._value(planned)
            if math.isnan(value):
                say_aside(f"trial {number} failed: {self.evaluation.monitor} of {planned.dir} is not a number")
                trial.state = "failed"
                return trial
            trial.values.append(value)
            spent.append(costs.costs_of(planned.dir, self.section.against))
        else:
            trial.costs = {key: statistics.fmean(cost[key] for cost in spent) for key in self.section.against}
        noted = drawn.study.trials[drawn.number].system_attrs
        trial.rungs = {k: v for k, v in noted.items() if isinstance(v, float)}
        trial.generations = {k: v for k, v in noted.items() if isinstance(v, int)}
        return trial

    def planned(self, name: str, composition: Composition) -> Planned:
        """Return a run of this search; the same recipe is the same run."""
        key = content_key(composition.mapping, {})
        stage = WrittenStage(name, ("search",), self.recipe, tuple(composition.overrides))
        known = sorted(self.folder.glob(f"*-{key}"))  # the same point drawn again is the same run
        folder = self.folders.setdefault(key, known[0] if known else self.folder / f"{name}-{key}")
        code = code_of(composition.mapping)
        return Planned(stage, composition.overrides, composition.mapping, composition, key, folder, code)

    def trial_composition(self, point: dict[str, Any], seed: int) -> Composition:
        """Compose the recipe of a trial with one of its seeds."""
        return self._compose(OWN_WORDS, point, [f"seed={seed}"])

    def final_run(self, best: Trial) -> Planned:
        """Return the last training of the best trial, with the first of its seeds.

        Raises:
            RunError: no step of the trial made its model better.
        """
        length = final_length(best, self.trial_composition(best.point, self.seeds[0]).recipe)
        return self.planned("final", self._compose(FINAL_WORDS, best.point, [f"seed={self.seeds[0]}", *length]))

    def _compose(self, own: Sequence[str], point: dict[str, Any], more: Sequence[str] = ()) -> Composition:
        """Compose the recipe with a point, its learning rate scaled to its batch size where `lr_scaling` says so."""
        words = [*self.base, *own, *space.point_words(point), *more]
        made = compose(self.recipe, words)
        if scaled := space.scaled_rate(self.section, made.recipe, self.composition.recipe.batch.size):
            made = compose(self.recipe, [*words, *scaled])
        if made.foreign and rights_of(made.recipe.model) != rights_of(self.composition.recipe.model):
            raise RecipeError(
                f"search.space: {made.path} belongs to a run or a model folder, so its space gives no rights; where you trust "
                "what is opened, give model.trust_remote_code=true or model.allow_pickle=true yourself"
            )
        return made

    def _curve(self, planned: Planned) -> list[tuple[int, float]]:
        """Return (step, value) of the monitored metric; NaN where it was no number, which a run writes as null."""
        return read_run(planned.dir).curve(self.evaluation.monitor, null=math.nan)

    def _value(self, planned: Planned) -> float:
        values = [value for _, value in self._curve(planned)]
        if not values:
            raise RecipeError(f"eval.monitor: the run {planned.dir} has no {self.evaluation.monitor}; {NO_SPLIT}")
        best = min if self.mode == "min" else max
        # The best weights are those of an evaluation with a number (see `BestTracker`).
        known = [value for value in values if not math.isnan(value)] if self.evaluation.load_best else values[-1:]
        return best(known, default=math.nan)

    def _pruner(self, planned: Planned, drawn: optuna.Trial, trial: Trial) -> Callable[[], bool]:
        """Return a callback that reports evaluations as they come, and is True once the pruner wants to stop the trial."""

        def enough() -> bool:
            if not (planned.dir / "events.jsonl").is_file():
                return False
            for step, value in self._curve(planned):
                if step > 0 and step not in trial.reports:
                    trial.reports[step] = value
                    drawn.report(value, step)
                    if drawn.should_prune():
                        return True
            return False

        return enough

    # --- what was found -------------------------------------------------------------------------------------------

    def front(self, trials: list[Trial]) -> list[Trial]:
        """Return the trials that no other beats in score and in every cost, the cheapest first."""
        done = [t for t in trials if t.state == "done" and t.value is not None]
        return costs.front(done, self._losses)

    def _losses(self, trial: Trial) -> tuple[float, ...]:
        """Return score and costs of a trial as numbers that are to be small."""
        score = statistics.fmean(trial.values) * (1 if self.mode == "min" else -1)
        return (score, *(trial.costs[key] for key in self.section.against))

    def best(self, trials: list[Trial]) -> Trial:
        """Return the trial that `pick` and `limits` choose; of a stepwise search, one that has every key fixed.

        Raises:
            RunError: no trial completed, or none within the limits.
        """
        stepped = self.section.sampler == "stepwise"
        tried = stepwise.finalists(self.section, trials) if stepped else trials
        done = [t for t in tried if t.state == "done" and t.value is not None]
        if not done:
            raise RunError("search: no trial came to an end that was not pruned")
        allowed = costs.within_limits(done, self.section.limits)
        if self.section.pick == "knee":
            return costs.knee(costs.front(allowed, self._losses), self._losses)
        return min(allowed, key=self._losses)

    def write_best(self, best: Trial, trials: list[Trial]) -> Path:
        """Write `searched.yaml`, a recipe that extends `/base` with the best point set, and one for each trial of the front."""
        about = f"the best of {len(trials)} trials"
        if self.section.against:
            front = self.front(trials)
            folder = self.folder / "pareto"
            folder.mkdir(exist_ok=True)
            for old in folder.glob("*.yaml"):
                old.unlink()
            for trial in front:
                spent = "-".join(f"{key}_{trial.costs[key]:.6g}" for key in self.section.against)
                name = f"{spent}-{self.evaluation.monitor.rpartition('/')[2]}_{trial.value:.4g}-{trial.number}.yaml"
                self._write_point(folder / name, trial, f"a trial on the front of {len(trials)}")
            about = f"one of {len(front)} trials on the front of {len(trials)}"
        path = self.folder / "searched.yaml"
        self._write_point(path, best, about, of_best=True)
        return path

    def _write_point(self, path: Path, trial: Trial, about: str, of_best: bool = False) -> None:
        composition = self._compose(["search=null"], trial.point)
        spent = "".join(f", {key} {value:.6g}" for key, value in trial.costs.items())
        value = with_interval(trial.value, self.ends if of_best else None, lambda v: f"{v:.6g}")
        head = (
            f"# {self.composition.name} with {about}: {self.evaluation.monitor} {value}{spent}\n"
            f"#   {', '.join(f'{k}={v}' for k, v in trial.point.items())}\n"
        )
        write_text(path, head + extending_yaml(composition.mapping))


def search(recipe: str, words: list[str]) -> tuple[Search, list[Trial]]:
    """Run or resume a search; the best trial is then scored for its interval, and trained once more where `final` says so.

    Raises:
        UserError: the recipe or its space is wrong (before anything starts), or no trial completed.
        Interrupted: a signal arrived; the same command resumes the search.
    """
    found = Search(recipe, words, compose(recipe, words))
    found.check()
    folder = RunDir(found.folder)
    folder.lock()
    try:
        trials = found.run()
        best = found.best(trials)
        found.ends = row_interval(found.folder, found.evaluation, found.composition.recipe.model, best)
        found.write_best(best, trials)
        if found.section.final:
            found.final = run_final(found.pipeline, found.final_run(best), found.folder)
        return found, trials
    finally:
        folder.unlock()
