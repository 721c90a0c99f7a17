"""A training run: everything the loop needs, built from a validated recipe."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrecipe.core.console import counted, lasting, say_progress
from llmrecipe.core.errors import RunError
from llmrecipe.data import order
from llmrecipe.data.collate import Batch
from llmrecipe.data.transfer import Arriving
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.reference_policy import PlannedRows, prepare_reference
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.update_rule import LateResult, StepResult
from llmrecipe.optim.optimizer import set_learning_rate
from llmrecipe.recipe.sharding_rules import PLAIN
from llmrecipe.runs.open_model import original
from llmrecipe.runs.report.card import report_card
from llmrecipe.training import build_run, finite_check, forgetting, resume_rules, save_run
from llmrecipe.training.build_run import abandoned, build_parts
from llmrecipe.training.evaluate import evaluate
from llmrecipe.training.read_rows import other_rows
from llmrecipe.training.run_state import RunState

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.compose import Composition


NOTED = 5.0
"""Seconds after which `status.json` names a newer step."""


SAVE_SECONDS = 300.0
"""Seconds between two checkpoints where the recipe gives no `save.every`: what a kill costs at most, and a step."""
SAVE_SHARE = 20.0
"""Least seconds between them for each second that one takes."""


class Run(RunState):
    """One run, ready for the loop."""

    @classmethod
    def open(cls, composition: Composition, resume: Path | None = None) -> Run:
        """Build a run, or rebuild it and restore its newest checkpoint.

        Raises:
            UserError: the recipe, the data, the model or the checkpoint is unusable; a new run directory says why.
        """
        run = cls(**vars(build_parts(composition, resume)))
        with abandoned(run.dir, run.runtime, resume):
            if resume is not None:
                # The freshly built model is the policy of step 0: score it before the learned weights are restored.
                prepare_reference(run.objective, run.stack, run.loaded, run.roles, run.planned_rows())
                run.keep_start(own=False)
                save_run.restore(run)
                resume_rules.record(run.dir, composition, run.changes)
        run.first_step = run.progress.step
        # A CPU has computed what it returns, and a step that may be skipped has to be judged before its update.
        run.reads_late = run.runtime.device.type != "cpu" and composition.recipe.run.on_nan == "stop"
        return run

    def _repr_html_(self) -> str:
        """Return the card of the report, as a notebook shows it: outcome, score, curve, cost."""
        return report_card(self.dir.path)

    # --- data -----------------------------------------------------------------------------------------------------

    def feed(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimizer step, from the run's current position."""
        return self.objective.batches(self.source(), self.roles)

    def planned_rows(self) -> PlannedRows:
        """Return the rows of the whole run."""
        return build_run.planned_rows(self.recipe, self.objective, self.data, self.validation, self.steps)

    def source(self) -> Iterator[list[dict[str, Any]]]:
        """Yield this process's rows of each step: a pure function of seed, epoch and position, so resume needs no state."""
        while True:
            epoch, first, end = self.plan.place(self.progress.drawn)
            rows = self.order(epoch)[first:end]
            self.progress.drawn += 1
            yield [{**self.data[int(i)], "epoch": epoch} for i in rows[self.runtime.rank :: self.runtime.world]]

    def probe(self, data: SplitRows | None = None) -> Probe:
        """Return what `calibrate` may use: rows in an order that training does not share, each at most once in a pass.

        Args:
            data: the rows; None for the training rows.
        """
        source = self.data if data is None else data

        def capped(n: int, rows: int | None = None) -> int:
            return min(n, math.ceil(len(source) / (rows or self.recipe.batch.size)))

        def picked(n: int, rows: int | None = None) -> Iterator[list[dict[str, Any]]]:
            size, count = rows or self.recipe.batch.size, capped(n, rows)
            indices = order(source, self.recipe.seed + 1_000_003, 0)
            if count < n and self.runtime.is_main:
                say_progress(
                    f"calibration: {n} batches of {size} rows were requested and the data fill {count}; no row is read twice"
                )
            for i in counted(range(count), "calibration", count if self.runtime.is_main else 0):
                yield [source[int(j)] for j in indices[i * size : (i + 1) * size]]

        def batches(n: int, rows: int | None = None) -> Iterator[Batch]:
            for own in picked(n, rows):
                yield self.objective.collate(own, self.roles)

        def micros(n: int, rows: int | None = None) -> Iterator[list[Batch]]:
            for own in picked(n, rows):
                yield [self.objective.collate(part, self.roles) for part in self.roles.split(own)]

        def loss(batch: Batch) -> torch.Tensor:
            # Each process uses its own batches here, so none of them may wait for the others.
            with self.roles.alone():
                return self.objective.loss(batch, self.roles).total / max(self.objective.weight(batch), 1e-12)

        def elsewhere(path: str) -> Probe:
            labels = getattr(self.data, "labels", None) or self.objective.label_names()
            return self.probe(other_rows(self.recipe, self.objective, path, labels))

        return Probe(
            batches, loss, self.runtime, self.objective.weight, len(source), tokenizer=self.tokenizer, steps=self.steps,
            engine=Engine(self.model), original=lambda: original(self.loaded, self.recipe.seed),
            micros=micros, capped=capped, of=elsewhere,
        )  # fmt: skip

    # --- one step -------------------------------------------------------------------------------------------------

    def set_learning_rate(self, step: int) -> None:
        """Give the optimizer the schedule's rate for this step."""
        factor = self.schedule.factor(step, self.steps)
        self.learning_rate = self.optim.lr * factor
        if self.optimizer is not None:
            self.learning_rate = set_learning_rate(self.optimizer, factor)

    def zero_gradients(self) -> None:
        """Free the gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def not_finite(self, step: int, result: StepResult | LateResult, micros: list[Batch]) -> None:
        """Save the batch of a step, then stop or report that the step was skipped.

        Args:
            step: its number, from 1 on.

        Raises:
            RunError: `run.on_nan` is `stop`, or too many of the recent steps were skipped.
        """
        found = result.read() if isinstance(result, LateResult) else result
        path = save_run.save_batch(self, step, micros)
        text = f"step {step}: loss {found.loss}, gradient norm {found.grad_norm}; the batch is in {path}"
        self.events.warning(text)
        if self.recipe.run.on_nan == "stop":
            # What came after it is not kept.
            self.progress.step = step - 1
            raise RunError(f"{text}. A lower optim.lr often helps; run.on_nan=skip leaves such steps out")
        finite_check.skip(self, text)

    def report_step(self, result: StepResult | LateResult, micros: list[Batch], seconds: float) -> None:
        """Write the step event, once its values are here, and the step into `status.json` every few seconds."""
        step = self.progress.step
        if (compiled := self.roles.engine.compiled) is not None:
            compiled.after_step(step)
        if time.monotonic() - self.noted > NOTED:
            self.dir.status("running", step=step)
            self.noted = time.monotonic()
        facts: dict[str, Any] | None = None
        own: dict[str, Any] = {}
        if step % self.recipe.log.every == 0 or step == self.steps:
            facts, own = self._facts_of_step(micros, seconds), self.stack.metrics(self.model)
        if isinstance(result, LateResult) and result.found is None:
            result.start(list(own.values()))
            batches = [m.here for m in micros]
            self.events.owe(lambda: self._arrived(result, step, batches, facts, list(own)))
        elif facts is not None:
            known = result.read() if isinstance(result, LateResult) else result
            self._write_step(step, known, facts, dict(zip(own, Arriving(list(own.values())).values(), strict=True)))

    def _arrived(
        self, result: LateResult, step: int, micros: list[Batch], facts: dict[str, Any] | None, own: list[str]
    ) -> None:
        """Write the event of a step whose values have arrived, or keep the error that ends the run (see `catch_up`)."""
        known = result.read()
        if not known.finite:
            try:
                self.not_finite(step, known, micros)
            except RunError as error:
                self.failure = error
        elif facts is not None:
            self._write_step(step, known, facts, dict(zip(own, result.more, strict=True)))

    def catch_up(self) -> None:
        """Write the event that is owed for the newest step, if any.

        Raises:
            RunError: its loss or its gradients were not finite.
        """
        self.events.catch_up()
        if self.failure is not None:
            raise self.failure

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Let an earlier step that was not finite explain an error inside the context: what follows it computes with NaN.

        Raises:
            RunError: there was one.
        """
        compiled = self.roles.engine.compiled
        try:
            with contextlib.nullcontext() if compiled is None else compiled.explained():
                yield
        except Exception:
            self.catch_up()
            raise

    def _facts_of_step(self, micros: list[Batch], seconds: float) -> dict[str, Any]:
        """Return what the event of the newest step says besides what was computed in it."""
        work = self.flops.step(micros) if self.flops is not None else 0.0
        sums = torch.tensor([sum(m.tokens for m in micros), self.progress.tokens, work], dtype=torch.float64)
        tokens, total, work = self.runtime.sum(sums).tolist()
        return {
            "lr": self.learning_rate,
            "tokens": int(total),
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
            "peak_mem_mb": self.meter.peak_mb(),
            **({} if self.roles.engine.compiled is None else {"graphs": self.roles.engine.compiled.graphs}),
            **self.batch_rows(),
            **self.utilisation(work, seconds),
        }

    def _write_step(self, step: int, result: StepResult, facts: dict[str, Any], own: dict[str, Any]) -> None:
        found = {"loss": result.loss, "lr": facts["lr"], "grad_norm": result.grad_norm, **facts}
        self.events.step(step=step, **found, **result.metrics, **own)

    def batch_rows(self) -> dict[str, int]:
        """Return the rows of the newest batch over all processes, where batches grow."""
        if self.recipe.batch.warmup is None:
            return {}
        _, first, end = self.plan.place(self.progress.drawn - 1)
        return {"rows": end - first}

    def utilisation(self, work: float, seconds: float) -> dict[str, float]:
        """Return the share of the devices' peak that a step's work, in FLOP over all processes, makes of its time.

        Nothing where the peak or the work is not known.
        """
        if self.flops is None:
            return {}
        return {"mfu": round(work / (max(seconds, 1e-9) * self.flops.peak * self.runtime.world), 4)}

    # --- what is due ----------------------------------------------------------------------------------------------

    def due_evaluation(self, step: int, at_start: bool = False) -> bool:
        """Return whether an evaluation is due after `step` steps."""
        if self.validation is None:
            return False
        if at_start:
            return self.recipe.eval.at_start and step == 0
        every = self.recipe.eval.every
        return step == self.steps or (every is not None and step % every == 0)

    def due_save(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps."""
        every = self.recipe.save.every
        if step >= self.steps or every is not None:
            return every is not None and step % every == 0 and step < self.steps
        # Without `save.every` the clock of the main process decides; a checkpoint that takes long is written less often.
        pause = max(SAVE_SECONDS, SAVE_SHARE * self.save_cost)
        due = self.runtime.is_main and time.monotonic() - self.saved_at > pause
        return bool(float(self.runtime.sum(torch.tensor([float(due)], dtype=torch.float64))) > 0)

    def stopping(self) -> bool:
        """Return whether any process received a signal to stop."""
        requested = torch.tensor([1.0 if self.signal else 0.0], dtype=torch.float64)
        return bool(float(self.runtime.sum(requested)) > 0)

    def evaluate(self) -> bool:
        """Evaluate on the validation split; return True when early stopping or the limit of forgetting applies."""
        assert self.validation is not None, "none is due without validation rows"
        metrics = evaluate(self.evaluation(), self.validation)
        verdict = self.best.see(self.progress.step, {f"eval/{k}": v for k, v in metrics.items()})
        self.events.evaluation(step=self.progress.step, **{f"eval/{k}": v for k, v in metrics.items()})
        if verdict.best and self.recipe.eval.load_best:
            save_run.save_best(self)
        return forgetting.score_between(self) or verdict.stop

    def rebuild(self) -> None:
        """Rebuild the optimizer after the set of trained tensors changed, keeping the state of those that remain."""
        if self.progress.step and self.runtime.shard != PLAIN:
            raise RunError(
                f"runtime.shard={self.runtime.shard}: what trains changed at step {self.progress.step}, and the states of a "
                "divided optimizer do not follow; use runtime.shard=none"
            )
        self.roles.prepared = build_run.prepared(self.runtime, self.roles, self.stack, self.unused)
        if self.stack.rule() is None:
            self.optimizer = build_run.optimizer_for(self.model, self.optim, self.stack, self.optimizer, self.runtime.optimizer)
        if self.progress.step and self.stack.reshaped:
            # Weights saved as the best belong to another set of tensors and could not be restored.
            self.best = self.fresh_best()

    def save(self) -> Path | None:
        """Write a checkpoint."""
        self.catch_up()
        started = time.monotonic()
        with lasting(f"writing the checkpoint of step {self.progress.step}"):
            path = save_run.save(self)
        self.saved_at = time.monotonic()
        self.save_cost = self.saved_at - started
        return path

    def save_end(self) -> None:
        """Write the checkpoint of the end, from which a finished run can be continued; a run resumed at its end has it."""
        if self.recipe.save.end and self.progress.step != self.first_step:
            with lasting("writing the checkpoint of the end"):
                save_run.save(self, end=True)

    def finish(self) -> None:
        """Finish the run: best weights, test split, final folder, model card."""
        if self.roles.engine.compiled is not None and self.runtime.is_main:
            say_progress(self.roles.engine.compiled.summary())
        save_run.finish(self)
