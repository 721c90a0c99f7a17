"""Running one step in its folder: new, resumed, or finished already."""

from __future__ import annotations

import contextlib
from types import FrameType
from typing import cast

from llmrecipe.core.errors import Interrupted, LlmRecipeError, RunError
from llmrecipe.core.signals import handled_by
from llmrecipe.core.steady_output import steady_output
from llmrecipe.pipelines.step import Step
from llmrecipe.pipelines.steps.workspace import Work
from llmrecipe.recipe.compose import to_yaml
from llmrecipe.recipe.provenance import leaves
from llmrecipe.recipe.step_spec import StepComposition, unfinished
from llmrecipe.recipe.yaml_file import dotted
from llmrecipe.runs.events import truncate
from llmrecipe.runs.run_dir import RunDir

FILE = "step.yaml"


@steady_output()
def run_step(composition: StepComposition) -> RunDir:
    """Run a step in its folder; a finished one is left unchanged, a stopped one is resumed.

    Raises:
        UserError: an option is wrong, or the folder belongs to something else.
        Interrupted: a signal arrived; what was answered is kept.
    """
    for key, value in leaves(composition.options):
        for text in value if isinstance(value, list) else [value]:
            if unfinished(text):
                raise RunError(f"{dotted(key)}: {text} is the result of a stage, and only a recipe with `stages` has stages")
    step = cast(Step, composition.build())
    folder = RunDir(composition.dir)
    if taken(folder, composition) == "done":
        return folder
    step.check(composition.kind)
    folder.lock()
    folder.describe(FILE, to_yaml(composition.mapping))
    folder.status("running")
    work: Work | None = None
    try:
        with _signals():
            # What the journals hold is reported again, so each event occurs once.
            truncate(folder.path / "events.jsonl", -1, always=("warning",))
            work = Work(folder, composition.frame.seed, composition.frame.log.live)
            work.finish(step.run(work))
        folder.status("done")
    except Interrupted:
        folder.status("interrupted")
        raise
    except KeyboardInterrupt as stop:
        folder.status("interrupted")
        raise Interrupted(f"stopped; the same command resumes, and finished answers are kept in {folder.path}") from stop
    except LlmRecipeError as error:
        folder.status("failed", error=str(error))
        raise
    except Exception as error:
        folder.status("failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        if work is not None:
            work.close()
    return folder


def taken(folder: RunDir, composition: StepComposition) -> str:
    """Return the state of a step's folder: new, done, failed or interrupted.

    Raises:
        RunError: it holds something other than this step.
    """
    path = folder.path
    if not path.exists() or not any(path.iterdir()):
        return "new"
    if not (path / FILE).is_file() or not (path / "status.json").is_file():
        # A kill while the folder was being described leaves some of its first files.
        if {p.name for p in path.iterdir() if p.suffix != ".writing"} <= {"lock", FILE, "command.txt", "environment.json"}:
            return "new"
        raise RunError(f"run.dir: {path} exists and is not the folder of a step; choose a new folder")
    found = folder.recipe()
    if found != composition.mapping:
        changed = [k for k in {**found, **composition.mapping} if found.get(k) != composition.mapping.get(k)]
        raise RunError(
            f"run.dir: {path} holds a step with other options ({', '.join(changed)}); choose another folder, or delete it"
        )
    return str(folder.read_status()["status"])


def _signals() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP stop a step as Ctrl-C does: at once, since every answer is on disk as soon as it arrives."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    return handled_by(stop)
