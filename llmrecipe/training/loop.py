"""The training loop, the same for every objective, stack and update rule."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llmrecipe.core.errors import Interrupted
from llmrecipe.methods._base.update_rule import LateResult, backprop
from llmrecipe.training.first_update import FirstUpdate
from llmrecipe.training.unchanged import UnchangedCheck

if TYPE_CHECKING:
    from llmrecipe.training.run import Run


def train_loop(run: Run) -> None:
    """Train until `run.steps`; every line of the body happens once per optimizer step.

    Raises:
        RunError: a loss was NaN or infinite (`run.on_nan: stop`).
        ProofError: the first update did not do what the recipe says (see `first_update`).
        Interrupted: a signal arrived; a checkpoint has been written.
    """
    rule = run.stack.rule() or backprop
    unchanged = UnchangedCheck(run)
    feed = run.feed()
    first = FirstUpdate(run)
    owed = False
    if run.due_evaluation(run.progress.step, at_start=True):
        run.evaluate()
    while run.progress.step < run.steps and not run.progress.ended:
        started = time.perf_counter()
        step = run.progress.step
        run.late = run.reads_late and not first.pending
        with run.explained():
            if run.stack.before_step(run.model, step):
                run.rebuild()
                feed = run.feed()
            micros = next(feed)
            run.set_learning_rate(step)
            result = first.make(rule, micros) if first.pending else rule(run.step_context(), micros)
        # The step before: its values have arrived while this one was given to the device.
        run.catch_up()
        # Values that are on their way are not read here; an update that was made in vain ends the run.
        updated = isinstance(result, LateResult) or result.finite
        if not updated:
            run.not_finite(step + 1, result, micros)
        with run.explained():
            run.stack.after_step(run.model, step)
            first.compare(result)
            run.zero_gradients()
            run.progress.advance(micros)
            run.objective.after_step(run.progress.step, result.metrics, run.roles)
            first.finalize(result)
            run.report_step(result, micros, time.perf_counter() - started)
            unchanged.see(run, updated)
        if run.due_evaluation(run.progress.step):
            run.catch_up()
            if run.evaluate():
                run.progress.ended = True
                break
        if run.stopping() and run.objective.at_boundary():
            run.save()
            raise Interrupted(
                f"stopped by a signal at step {run.progress.step}; continue: llmrecipe train resume={run.dir.path}"
            )
        owed = owed or run.due_save(run.progress.step)
        if owed and run.objective.at_boundary():
            run.save()
            owed = False
    run.catch_up()
    run.save_end()
    run.finish()
