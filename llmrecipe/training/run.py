"""A training run: everything the loop asks for, built in one direction from a validated recipe."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrecipe.data.batch import Batch
from llmrecipe.errors import Interrupted, LlmRecipeError, RunError
from llmrecipe.evaluation.directions import direction
from llmrecipe.methods.wrapper import Probe
from llmrecipe.recipe.stages import refuse_stages
from llmrecipe.signals import handled_by
from llmrecipe.training import assemble, finish, step_zero
from llmrecipe.training.announce import announce
from llmrecipe.training.engine import Engine
from llmrecipe.training.evaluate import Judge, evaluate
from llmrecipe.training.loop import train as loop
from llmrecipe.training.opened import original
from llmrecipe.training.optimizer import set_learning_rate
from llmrecipe.training.reference_policy import PlannedRows, prepare_reference
from llmrecipe.training.rules import StepContext, StepResult

if TYPE_CHECKING:
    from llmrecipe.recipe.compose import Composition


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps made."""
    drawn: int = 0
    """Row batches drawn from the source."""
    tokens: int = 0
    """Real tokens the model has read in training, on this process."""
    skipped: int = 0
    """Steps that made no update because a loss or a gradient was not finite (`run.on_nan: skip`)."""

    def advance(self, micros: list[Batch]) -> None:
        """One more optimizer step."""
        self.step += 1
        self.tokens += sum(m.tokens for m in micros)


class Run:
    """One run, ready for the loop."""

    def __init__(self, composition: Composition, resume: Path | None = None):
        self.composition = composition
        self.recipe = composition.recipe
        self.progress = Progress()
        self.first_step = 0
        self.learning_rate = 0.0
        self.unused = True
        """Whether a step may leave trained tensors without a gradient; the first one tells (see `first_step`)."""
        self.signal: int | None = None
        self.dir: Any = None
        self.runtime: Any = None
        try:
            self._build(resume)
        except BaseException as error:
            self._abandon(error, resume)
            raise
        self.first_step = self.progress.step

    def _build(self, resume: Path | None) -> None:
        parts = assemble.build(self, resume)
        self.dir, self.runtime, self.events = parts.dir, parts.runtime, parts.events
        self.objective, self.stack = parts.objective, parts.stack
        self.optim, self.schedule = parts.optim, parts.schedule
        self.opened, self.data, self.validation = parts.opened, parts.data, parts.validation
        self.roles, self.optimizer, self.steps = parts.roles, parts.optimizer, parts.steps
        self.judge = self.fresh_judge()
        if resume is not None:
            # The freshly built model is the policy of step 0: remember it before what was learned is put back.
            prepare_reference(self.objective, self.stack, self.opened, self.roles, self.planned_rows())
            finish.restore(self)

    def _abandon(self, error: BaseException, resume: Path | None) -> None:
        """Leave a run that could not be built: a new one says why it failed, one to be resumed stays as it was."""
        if self.dir is not None:
            if resume is None:
                self.dir.status("failed", error=str(error) or type(error).__name__, step=0)
            self.dir.unlock()
        if self.runtime is not None:
            self.runtime.close()

    @property
    def model(self) -> nn.Module:
        """The trained model, unwrapped."""
        return self.roles.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.opened.tokenizer

    # --- data -----------------------------------------------------------------------------------------------------

    def feed(self) -> Iterator[list[Batch]]:
        """Micro-batches of each optimizer step, from where the run stands."""
        return self.objective.batches(self.source(), self.roles)

    def planned_rows(self) -> PlannedRows:
        """Return the rows of the whole run."""
        return assemble.planned_rows(self.recipe, self.objective, self.data, self.validation, self.steps)

    def source(self) -> Iterator[list[dict[str, Any]]]:
        """This process's rows of each step: a pure function of seed, epoch and position, so resume needs no state."""
        size = self.recipe.batch.size
        while True:
            epoch, at = divmod(self.progress.drawn, self.steps_per_epoch)
            rows = self.order(epoch)[at * size : (at + 1) * size]
            self.progress.drawn += 1
            yield [self.data[int(i)] for i in rows[self.runtime.rank :: self.runtime.world]]

    @property
    def steps_per_epoch(self) -> int:
        """Row batches in one pass; the last one may be short."""
        return max(1, math.ceil(len(self.data) / self.recipe.batch.size))

    def order(self, epoch: int) -> Any:
        """Row indices of an epoch in training order."""
        from llmrecipe.data import order

        if getattr(self, "_order_epoch", None) != epoch:
            self._order, self._order_epoch = order(self.data, self.recipe.seed, epoch), epoch
        return self._order

    def probe(self) -> Probe:
        """What `calibrate` may look at: training rows in an order of its own."""

        def batches(n: int, rows: int | None = None) -> Iterator[Batch]:
            from llmrecipe.data import order

            size = rows or self.recipe.batch.size
            indices = order(self.data, self.recipe.seed + 1_000_003, 0)
            for i in range(n):
                picked = [int(indices[(i * size + j) % len(indices)]) for j in range(min(size, len(indices)))]
                yield self.objective.collate([self.data[j] for j in picked], self.roles)

        def loss(batch: Batch) -> torch.Tensor:
            # Each process looks at batches of its own, so none of them may wait for the others.
            prepared, self.roles.prepared = self.roles.prepared, self.roles.engine
            try:
                return self.objective.loss(batch, self.roles).total / max(self.objective.weight(batch), 1e-12)
            finally:
                self.roles.prepared = prepared

        return Probe(
            batches, loss, self.runtime, self.objective.weight, len(self.data), tokenizer=self.tokenizer, steps=self.steps,
            engine=Engine(self.model), original=lambda: original(self.opened, self.recipe.seed),
        )  # fmt: skip

    # --- one step -------------------------------------------------------------------------------------------------

    def total_weight(self, micros: list[Batch]) -> float:
        """The denominator of a step, over all micro-batches and processes."""
        own = sum(self.objective.weight(m) for m in micros)
        return float(self.runtime.sum(torch.tensor([own], dtype=torch.float64)))

    def step_context(self) -> StepContext:
        """Return what the next update may use."""
        return StepContext(
            self.progress.step, self.steps, self.learning_rate, self.recipe.seed, self.dir.path, self.model, self.stack,
            self.optimizer, self.objective, self.roles, self.runtime, self.total_weight, self.clip,
        )  # fmt: skip

    def set_learning_rate(self, step: int) -> None:
        """Give the optimizer the schedule's rate for this step."""
        factor = self.schedule.factor(step, self.steps)
        self.learning_rate = self.optim.lr * factor
        if self.optimizer is not None:
            self.learning_rate = set_learning_rate(self.optimizer, factor)

    def clip(self) -> float:
        """Clip the gradient norm over everything that trains; returns the norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if not parameters:
            return 0.0
        limit = self.optim.clip or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def zero_gradients(self) -> None:
        """Free the gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def not_finite(self, result: StepResult, micros: list[Batch]) -> None:
        """Keep the batch, then stop or say that the step was skipped.

        Raises:
            RunError: `run.on_nan` is `stop`.
        """
        path = finish.save_batch(self, micros)
        text = f"step {self.progress.step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; the batch is in {path}"
        self.events.warning(text)
        if self.recipe.run.on_nan == "stop":
            raise RunError(f"{text}. A lower optim.lr often helps; run.on_nan=skip leaves such steps out")
        self.progress.skipped += 1

    def report_step(self, result: StepResult, micros: list[Batch], seconds: float) -> None:
        """Write the step event."""
        if self.progress.step % self.recipe.log.every and self.progress.step != self.steps:
            return
        own = torch.tensor([sum(m.tokens for m in micros), self.progress.tokens], dtype=torch.float64)
        tokens, total = self.runtime.sum(own).tolist()
        self.events.step(
            step=self.progress.step,
            loss=result.loss,
            lr=self.learning_rate,
            grad_norm=result.grad_norm,
            tokens=int(total),
            tokens_per_s=round(tokens / max(seconds, 1e-9), 1),
            peak_mem_mb=finish.peak_memory_mb(),
            **result.metrics,
            **self.stack.metrics(self.model),
        )

    # --- what is due ----------------------------------------------------------------------------------------------

    def due_evaluation(self, step: int, at_start: bool = False) -> bool:
        """Whether an evaluation is due after `step` steps."""
        if self.validation is None:
            return False
        if at_start:
            return self.recipe.eval.at_start and step == 0
        every = self.recipe.eval.every
        return step == self.steps or (every is not None and step % every == 0)

    def due_save(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        every = self.recipe.save.every
        return every is not None and step % every == 0 and step < self.steps

    def stopping(self) -> bool:
        """Whether a signal asked any process to stop."""
        asked = torch.tensor([1.0 if self.signal else 0.0], dtype=torch.float64)
        return bool(float(self.runtime.sum(asked)) > 0)

    def evaluate(self) -> bool:
        """Evaluate on the validation split; True when early stopping says so."""
        metrics = evaluate(self, self.validation)
        verdict = self.judge.see(self.progress.step, {f"eval/{k}": v for k, v in metrics.items()})
        self.events.evaluation(step=self.progress.step, **{f"eval/{k}": v for k, v in metrics.items()})
        if verdict.best and self.recipe.eval.load_best:
            finish.save_best(self)
        return verdict.stop

    def fresh_judge(self) -> Judge:
        """A judge that has seen nothing."""
        return Judge(self.recipe.eval, direction(self.recipe.eval, self.objective))

    def rebuild(self) -> None:
        """The set of trained tensors changed: the optimizer is built anew and keeps the state of what survived."""
        if self.stack.rule() is None:
            self.optimizer = assemble.optimizer_for(self.model, self.optim, self.stack, keep=self.optimizer)
        self.roles.prepared = self.runtime.prepare(self.roles.engine, self.unused)
        if self.progress.step:
            # Weights kept as the best belong to another set of tensors and could not be put back.
            self.judge = self.fresh_judge()

    def save(self) -> Path | None:
        """Write a checkpoint."""
        return finish.save(self)

    def finish(self) -> None:
        """Best weights, test split, final folder, model card."""
        finish.finish(self)

    def progress_state(self) -> dict[str, Any]:
        """JSON of the progress, for a checkpoint."""
        return asdict(self.progress)


def train(composition: Composition, resume: str | Path | None = None) -> Run:
    """Run a recipe to its end.

    Args:
        composition: what `compose` returned.
        resume: a run directory to continue.

    Returns:
        The finished run.

    Raises:
        UserError: the recipe, data or model is unusable, or the run stopped itself.
        Interrupted: a signal arrived; a checkpoint has been written.
    """
    refuse_stages(composition.mapping)
    run = Run(composition, Path(resume) if resume else None)
    try:
        with _signals(run):
            start(run)
            loop(run)
        run.dir.status("done", step=run.progress.step)
    except (Interrupted, KeyboardInterrupt):
        run.dir.status("interrupted", step=run.progress.step)
        raise
    except LlmRecipeError as error:
        run.dir.status("failed", error=str(error), step=run.progress.step)
        raise
    except Exception as error:
        run.dir.status("failed", error=f"{type(error).__name__}: {error}", step=run.progress.step)
        raise
    else:
        finish.tidy(run)
    finally:
        run.events.close()
        run.runtime.close()
    return run


def start(run: Run) -> None:
    """What happens once before the first step: calibration, the reference, step-0 checks."""
    run.dir.status("running", step=run.progress.step)
    run.roles.engine.train(run.objective.dropout)
    if run.first_step == 0:
        run.stack.calibrate(run.model, run.probe())
        run.rebuild()
        prepare_reference(run.objective, run.stack, run.opened, run.roles, run.planned_rows())
    announce(run)
    run.objective.start(run.roles)
    if run.first_step == 0:
        step_zero.check(run)


def _signals(run: Run) -> contextlib.AbstractContextManager[None]:
    """Ctrl-C and SIGTERM ask the loop to write a checkpoint; a second Ctrl-C stops at once."""

    def ask(number: int, frame: Any) -> None:
        if run.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.signal = number

    return handled_by(ask)
