"""Running a pipeline: each stage is an ordinary `llmrecipe train` or `llmrecipe step` in a separate process.

    runs/<pipeline>/<stage>-<key>/      the key stands for the stage's recipe, the files it reads, and the keys of its inputs

A finished directory of that key is reused, an interrupted one is continued, so the same command resumes after any stop. Nothing
starts before every stage has been checked.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmrecipe.core.apart import apart
from llmrecipe.core.console import number, say, say_progress
from llmrecipe.core.errors import Interrupted, LlmRecipeError, ProofError, RunError, UserError
from llmrecipe.core.signals import handled_by
from llmrecipe.core.steady_output import steady_output
from llmrecipe.pipelines.steps.workspace import SPLITS
from llmrecipe.pipelines.subprocesses import Child, Children, Machine, execute, say_of
from llmrecipe.recipe.code_key import code_of
from llmrecipe.recipe.content_key import REFERENCE, each_text
from llmrecipe.recipe.pipeline_plan import Plan, Planned, compose_stage, filled, for_check, plan
from llmrecipe.recipe.step_spec import StepComposition
from llmrecipe.runs.run_dir import RunDir, description, read_metrics
from llmrecipe.runs.run_record import read_run

if TYPE_CHECKING:
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.training.dry_run import Findings


@dataclass
class Result:
    """Result of a stage."""

    stage: str
    how: str
    """trained, done (a step), continued, reused, or stopped because it was enough."""
    steps: int
    """Optimizer steps, or items of a step."""
    metric: str
    """The monitored metric at the start and at the end; of a step its first metrics."""
    seconds: float
    dir: str


@dataclass
class Pipeline:
    """A running pipeline."""

    plan: Plan
    command: str
    """The command that resumes it."""
    children: Children
    results: list[Result] = field(default_factory=list)


@steady_output()
def run_all_stages(composition: Composition, recipe: str | None = None) -> list[Result]:
    """Run every stage that is not finished yet, and return their results in the order of the recipe.

    Args:
        composition: what `compose` returned for a recipe with stages.
        recipe: how the user named it, for the messages.

    Raises:
        UserError: a stage's recipe is wrong (before anything starts), or a stage stopped.
        Interrupted: a signal arrived; the running stage has written a checkpoint.
    """
    made = plan(composition)
    words = ["llmrecipe", "train", f"recipe={recipe or composition.path}", *composition.overrides]
    for note in made.notes:
        say_progress(note)
    machine = apart(lambda: _checked(made, composition.recipe.run.parallel), "the check of the stages")
    pipeline = Pipeline(made, shlex.join(words), Children(machine))
    with handled_by(pipeline.children.forward):
        _run_all(pipeline, composition.recipe.run.keep_going)
    order = [s.name for s in made.stages]
    pipeline.results.sort(key=lambda result: order.index(result.stage))
    return pipeline.results


def _run_all(pipeline: Pipeline, keep_going: bool) -> None:
    """Start stages as soon as their inputs exist, `run.parallel` of them at once.

    Args:
        keep_going: a stage that fails does not end those that can run without it.

    Raises:
        LlmRecipeError: what failed, once the other running stages have ended: with checkpoints where they were stopped.
    """
    waiting = list(pipeline.plan.stages)
    running: dict[Future[int], Started] = {}
    survived: list[Exception] = []
    fatal: Exception | None = None
    with ThreadPoolExecutor(pipeline.children.machine.slots) as pool:
        while waiting or running:
            try:
                while fatal is None and (started := _next(pipeline, waiting)) is not None:
                    running[pool.submit(execute, started.child, started.planned, started.continued)] = started
                if not running:
                    break
                # A signal may reach any thread; Python handles it in this one, as soon as it wakes up.
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    started = running.pop(future)
                    del pipeline.children.running[started.planned.name]
                    pipeline.results.append(_ended(pipeline, started, future.result()))
            except Exception as error:  # whatever it is, the other stages are ended in order before it is raised
                if fatal is not None:
                    continue
                if keep_going and isinstance(error, LlmRecipeError) and not isinstance(error, Interrupted):
                    survived.append(error)
                    say(f"{_first_line(error)} (stages that do not need it go on)")
                else:
                    fatal = error
                    pipeline.children.stop()
    if fatal is not None:
        raise fatal
    if len(survived) == 1:
        raise survived[0]
    if survived:
        lines = [
            f"{len(survived)} stages failed; {len(waiting)} need them and did not run:",
            *map(_first_line, survived),
            f"finished stages are reused by the same command:\n  {pipeline.command}",
        ]
        raise RunError("\n".join(lines))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _next(pipeline: Pipeline, waiting: list[Planned]) -> Started | None:
    """Take the next stage that can start out of the list; finished ones passed over become results.

    Raises:
        Interrupted: a signal arrived, and nothing more is started.
        RunError: the stage's folder or recipe is not what it was.
    """
    done = {result.stage for result in pipeline.results}
    for planned in list(waiting):
        if not done.issuperset(planned.stage.inputs):
            continue
        if state_of(planned) == "done":
            _tidy(planned)
            say_of(planned.name, f"reused: {planned.dir} is finished, and recipe, data and inputs are the same")
            waiting.remove(planned)
            done.add(planned.name)
            pipeline.results.append(_result(planned, "reused", 0.0))
            continue
        child = pipeline.children.place(planned)
        if child is not None:
            waiting.remove(planned)
            return _started(pipeline, planned, child)
    return None


def _checked(made: Plan, slots: int) -> Machine:
    """Check the stages; return the machine they run on."""
    check_stages(made)
    return Machine.here(slots)


def check_stages(made: Plan) -> dict[str, Findings | StepComposition]:
    """Dry-run all stages except finished ones.

    Raises:
        UserError: everything that would stop a stage before its first step.
    """
    from llmrecipe.training.dry_run import examine

    done = {s.name for s in made.stages if state_of(s) == "done"}
    found: dict[str, Findings | StepComposition] = {}
    mistakes: list[UserError] = []
    with tempfile.TemporaryDirectory() as folder:
        examples = Examples(made, Path(folder), done)
        for name, composition in for_check(made, done, examples).items():
            if name in done:
                continue
            where = ".".join(map(str, made[name].stage.at))
            try:
                if isinstance(composition, StepComposition):
                    composition.build(where).check(where)
                    found[name] = composition
                else:
                    found[name] = examine(composition, follow=False)
                    found[name].notes.extend(examples.notes(made[name]))
            except UserError as error:
                text = str(error).removeprefix(f"{where}: ")
                mistakes.append(type(error)(text if text.startswith(where) else f"{where}: {text}"))
    reported = list({str(m): m for m in mistakes}.values())
    if len(reported) == 1:
        raise reported[0]
    if reported:
        raise UserError("\n".join(map(str, reported)))
    return found


class Examples:
    """Folders with example rows of unfinished steps, for the dry runs of later trainings."""

    def __init__(self, made: Plan, folder: Path, done: set[str]):
        self.made, self.folder, self.done = made, folder, done

    def __call__(self, name: str) -> Path:
        """Return the folder of one step."""
        folder = self.folder / name
        planned = self.made[name]
        composition = planned.composition
        if not folder.is_dir() and isinstance(composition, StepComposition):
            folder.mkdir()
            # References to results that do not exist yet stay unresolved, as in the step's check.
            mapping = each_text(planned.mapping, lambda text: REFERENCE.sub(lambda m: filled(m, self.made, self.done), text))
            for split, rows in replace(composition, mapping=mapping).build().example().items():
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / SPLITS[split]).write_text(text, encoding="utf-8")
        return folder

    def notes(self, planned: Planned) -> list[str]:
        """Return notes on the example rows of a stage."""
        names = [name for name in planned.stage.inputs if (self.folder / name).is_dir()]
        return [f"{name} has not run: its rows are examples here, so their number and length are guesses" for name in names]


# --- one stage --------------------------------------------------------------------------------------------------------


def state_of(planned: Planned) -> str:
    """Return done, running, failed or interrupted; new where there is nothing yet."""
    if not (planned.dir / "status.json").is_file() or description(planned.dir) is None:
        return "new"
    state = str(RunDir.open(planned.dir, write=False).read_status()["status"])
    # A folder that lost its result is no result, whatever its status says.
    return "interrupted" if state == "done" and not (planned.dir / "final").is_dir() else state


def _tidy(planned: Planned) -> None:
    """Delete what a kill at the very end of a stage has left of it."""
    found = RunDir(planned.dir)
    if not found.locked():
        found.tidy()


@dataclass
class Started:
    """A stage whose process is running."""

    planned: Planned
    child: Child
    continued: bool
    time: float


def _started(pipeline: Pipeline, planned: Planned, child: Child) -> Started:
    """Prepare a stage's folder for its process."""
    state = state_of(planned)
    if pipeline.children.signal is not None:
        raise Interrupted(f"stopped before stage {planned.name}; go on with the same command:\n  {pipeline.command}")
    if RunDir(planned.dir).locked():
        raise RunError(f"stage {planned.name}: {planned.dir} is being written by another process; wait for it, or end it")
    if compose_stage(planned.stage).mapping != planned.mapping:
        raise RunError(
            f"stage {planned.name}: its recipe was changed after the pipeline had begun; the same command runs the new one "
            f"and reuses what is finished:\n  {pipeline.command}"
        )
    changed = [name for name, code in planned.code.items() if code_of(planned.mapping).get(name) != code]
    if changed:
        raise RunError(
            f"stage {planned.name}: the code of {', '.join(changed)} was changed after the pipeline had begun; the same "
            f"command runs the new one and reuses what is finished:\n  {pipeline.command}"
        )
    step = isinstance(planned.composition, StepComposition)
    continued = state != "new" and (step or RunDir(planned.dir).latest_checkpoint() is not None)
    if continued:
        say_of(planned.name, f"continued: {planned.dir} was {state}")
    elif planned.dir.exists() and not step:
        # Stopped before its first checkpoint: there is nothing to resume, and a run starts in an empty folder.
        shutil.rmtree(planned.dir)
    pipeline.children.running[planned.name] = child
    return Started(planned, child, continued, time.perf_counter())


def run_stage(pipeline: Pipeline, planned: Planned, enough: Callable[[], bool] | None = None) -> Result:
    """Run, continue or reuse one stage by itself; several threads may do so at once, each with a stage of its own.

    Args:
        enough: see `execute`; a stage ended by it is no error, and its result is reported as `stopped`.

    Raises:
        LlmRecipeError: it could not be run to its end.
    """
    if state_of(planned) == "done":
        _tidy(planned)
        return _result(planned, "reused", 0.0)
    with pipeline.children.lock:
        started = _started(pipeline, planned, pipeline.children.place(planned) or Child())
    try:
        code = execute(started.child, planned, started.continued, enough)
    finally:
        del pipeline.children.running[planned.name]
    if started.child.signal is not None and pipeline.children.signal is None:
        return _result(planned, "stopped", time.perf_counter() - started.time)
    return _ended(pipeline, started, code)


def _ended(pipeline: Pipeline, started: Started, code: int) -> Result:
    """Return the result of a stage whose process has ended; raise as `_judge` does."""
    _judge(pipeline, started.planned, code)
    step = isinstance(started.planned.composition, StepComposition)
    how = "continued" if started.continued else "done" if step else "trained"
    return _result(started.planned, how, time.perf_counter() - started.time)


def _judge(pipeline: Pipeline, planned: Planned, code: int) -> None:
    """Raise the error that the exit code of a stage's process stands for, if any.

    Raises:
        Interrupted: it was stopped by a signal.
        UserError: it refused its input, or was killed.
        LlmRecipeError: it hit a bug.
    """
    state = state_of(planned)
    if code == 0 and state == "done":
        return
    go_on = f"the same command goes on, finished stages are reused:\n  {pipeline.command}"
    if pipeline.children.signal is not None or code == Interrupted.exit_code:
        raise Interrupted(f"stopped in stage {planned.name}; {go_on}")
    if code < 0:
        name = signal.Signals(-code).name
        why = " (the system ends processes this way when memory runs out)" if -code == signal.SIGKILL else ""
        raise RunError(f"stage {planned.name} was ended by {name}{why}; {go_on}")
    if code in (UserError.exit_code, ProofError.exit_code):
        failed = ProofError if code == ProofError.exit_code else RunError
        raise failed(f"stage {planned.name} stopped: its message stands above. Once that is mended, {go_on}")
    raise LlmRecipeError(f"stage {planned.name} ended with exit code {code} and is {state}: {planned.dir}")


def _result(planned: Planned, how: str, seconds: float) -> Result:
    record = read_run(planned.dir)
    if isinstance(planned.composition, StepComposition):
        numbers = [f"{k} {number(v)}" for k, v in read_metrics(planned.dir).items() if isinstance(v, int | float)]
        items = int(record.steps[-1]["step"]) if record.steps else 0
        return Result(planned.name, how, items, ", ".join(numbers[:3]), round(seconds, 1), str(planned.dir))
    monitor = planned.composition.recipe.eval.monitor
    name = monitor if record.curve(monitor) else "loss"
    values = [value for _, value in record.curve(name)]
    text = "" if not values else f"{name} {values[0]:.4g} -> {values[-1]:.4g}" if len(values) > 1 else f"{name} {values[0]:.4g}"
    steps = int(record.steps[-1]["step"]) if record.steps else 0
    return Result(planned.name, how, steps, text, round(seconds, 1), str(planned.dir))
