"""Verification of a pipeline: each of its trainings, made short, on the results of the stages before it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmrecipe.core.errors import RunError
from llmrecipe.evaluation.verify.bench import Bench, short_words
from llmrecipe.evaluation.verify.verify_subject import CheckResult, verify_bench
from llmrecipe.pipelines.run_stages import check_stages
from llmrecipe.pipelines.subprocesses import Child, execute
from llmrecipe.recipe.compose import Composition, compose
from llmrecipe.recipe.pipeline_plan import Plan, Planned, plan
from llmrecipe.recipe.step_spec import StepComposition

if TYPE_CHECKING:
    from llmrecipe.training.run import Run


def verify_stages(pipeline: Composition) -> Iterator[CheckResult]:
    """Yield the lines of every training of a pipeline, `STAGE.CHECK` each, in the order in which the stages run.

    Trainings that differ by nothing but the seed and the learning rate are one, and the others of them run only where a later
    stage needs their result; steps run as they are written, if a training needs theirs. What the stages print goes to the
    standard error.

    Raises:
        UserError: a stage's recipe is wrong (before anything starts), or a step stopped.
    """
    folder = Path(tempfile.mkdtemp(prefix="llmrecipe-verify-"))
    try:
        made = plan(compose(pipeline.path, [*pipeline.overrides, f"run.dir={folder / 'stages'}"]))
        made.folder.mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            check_stages(made)
        seen: set[str] = set()
        needed = needed_stages(made)
        read = {name for planned in needed for name in planned.stage.inputs}
        for planned in needed:
            if isinstance(planned.composition, StepComposition):
                make_step(planned)
                continue
            is_new = (what := training_of(planned)) not in seen
            if not is_new and planned.name not in read:
                continue
            bench = bench_of_stage(planned, folder / planned.name)
            if is_new:
                seen.add(what)
                for line in verify_bench(bench):
                    yield replace(line, check=f"{planned.name}.{line.check}")
                if "run" not in vars(bench):
                    return
            keep_run(bench.run, planned)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def needed_stages(made: Plan) -> list[Planned]:
    """Return the trainings of a pipeline and the stages whose results they need."""
    wanted: set[str] = set()
    for planned in reversed(made.stages):
        if planned.name in wanted or not isinstance(planned.composition, StepComposition):
            wanted |= {planned.name, *planned.stage.inputs}
    return [planned for planned in made.stages if planned.name in wanted]


def training_of(planned: Planned) -> str:
    """Return a stage's recipe as text, without its seed and its learning rate."""
    optim = {key: value for key, value in planned.mapping.get("optim", {}).items() if key != "lr"}
    kept = {key: value for key, value in planned.mapping.items() if key != "seed"}
    return json.dumps({**kept, "optim": optim}, sort_keys=True, default=str)


def bench_of_stage(planned: Planned, folder: Path) -> Bench:
    """Return the bench of a stage that trains, in a folder of its own."""
    folder.mkdir()
    given = compose(planned.stage.what, planned.words)
    return Bench(compose(planned.stage.what, [*planned.words, *short_words(given, folder)]), folder, None, given)


def keep_run(run: Run, planned: Planned) -> None:
    """Move a finished short training to where later stages look for it."""
    shutil.move(run.dir.path, planned.dir)


def make_step(planned: Planned) -> None:
    """Run a step in a process of its own.

    Raises:
        RunError: it stopped.
    """
    with contextlib.redirect_stdout(sys.stderr):
        code = execute(Child(), planned, continued=False)
    if code:
        raise RunError(f"step {planned.name} ended with exit code {code}: its message stands above")
