"""Running a recipe from its first step to its end."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from llmrecipe.core.errors import Interrupted, LlmRecipeError, RecipeError
from llmrecipe.core.signals import handled_by
from llmrecipe.core.steady_output import steady_output
from llmrecipe.engine.reference_policy import prepare_reference
from llmrecipe.recipe.compose import Composition
from llmrecipe.recipe.pipeline_plan import refuse_stages
from llmrecipe.runtime.caller_state import kept_for_caller, one_training
from llmrecipe.runtime.kept_memory import kept_memory
from llmrecipe.runtime.peer_errors import reported
from llmrecipe.training import forgetting, step_zero_checks
from llmrecipe.training.loop import train_loop as loop
from llmrecipe.training.model_flops import model_flops
from llmrecipe.training.run import Run
from llmrecipe.training.startup_report import announce

if TYPE_CHECKING:
    from types import FrameType


@steady_output()
@kept_for_caller()
@one_training()
def train(composition: Composition, resume: str | Path | None = None) -> Run:
    """Run a recipe to its end. Random generators, thread count and determinism of the calling program stay as they were.

    Args:
        composition: what `compose` returned.
        resume: a run directory to continue.

    Returns:
        The finished run.

    Raises:
        UserError: the recipe, data or model is unusable, the run stopped itself, or another one runs in this process.
        Interrupted: a signal arrived; a checkpoint has been written.
    """
    if not isinstance(composition, Composition):
        raise RecipeError(f"train: takes what `compose` returns, as in train(compose('sft_lora')); got {composition!r:.80}")
    refuse_stages(composition.mapping)
    run = Run.open(composition, Path(resume) if resume else None)
    try:
        with kept_memory(run.runtime.device.type), _signals(run):
            before_first_step(run)
            loop(run)
        run.dir.status("done", step=run.progress.step)
    except (Interrupted, KeyboardInterrupt):
        run.dir.status("interrupted", step=run.progress.step)
        raise
    except Exception as error:
        met = reported(error, run.runtime.rank, run.runtime.world)
        text = str(met) if isinstance(met, LlmRecipeError) else f"{type(met).__name__}: {met}"
        run.dir.status("failed", error=text, step=run.progress.step)
        if met is error:
            raise
        raise met from error
    else:
        run.dir.tidy()
    finally:
        if run.roles.engine.compiled is not None:
            run.roles.engine.compiled.remove()
        run.events.close()
        run.runtime.close()
    return run


def before_first_step(run: Run) -> None:
    """Do what happens once before the first step: calibration, the reference, step-0 checks."""
    run.dir.status("running", step=run.progress.step)
    run.roles.engine.train(run.objective.dropout)
    if run.first_step == 0:
        run.stack.calibrate(run.model, run.probe())
        run.rebuild()
        run.keep_start(own=True)
        prepare_reference(run.objective, run.stack, run.loaded, run.roles, run.planned_rows())
    run.flops = model_flops(run.recipe, run.objective, run.roles)
    announce(run)
    run.objective.start(run.roles)
    if run.first_step == 0:
        step_zero_checks.check_step_zero(run)
        forgetting.score_before(run)


def _signals(run: Run) -> contextlib.AbstractContextManager[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP make the loop write a checkpoint and stop; a second Ctrl-C stops at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if run.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.signal = number

    return handled_by(ask)
