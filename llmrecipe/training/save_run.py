"""Writing and reading a run's checkpoints and best weights, and the end of a run."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmrecipe.core.console import lasting, say_progress
from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import reading
from llmrecipe.data.collate import Batch
from llmrecipe.data.overlap import shared_rows
from llmrecipe.data.token_data import TokenData
from llmrecipe.runs.checkpoint_io import (
    DIVIDED,
    PARTS,
    SavedCheckpoint,
    checkpoint_of,
    folder_name,
    keep_only,
    latest_checkpoint,
    read_checkpoint,
    read_document,
    rotate,
    save_checkpoint,
    steps,
)
from llmrecipe.runs.events import is_step
from llmrecipe.runs.looks import note_look
from llmrecipe.runs.run_dir import BEST
from llmrecipe.runs.run_record import read_run
from llmrecipe.training import build_model, build_run, finite_check, forgetting, run_identity
from llmrecipe.training.evaluate import evaluate
from llmrecipe.training.final_folder import write_final
from llmrecipe.training.optimizer_state import (
    divided_state,
    gathered_state,
    random_state,
    restore_optimizer,
    restore_random_state,
)
from llmrecipe.training.read_rows import test_rows
from llmrecipe.training.resume_rules import goes_on
from llmrecipe.training.startup_report import add_to_report, record_changes

if TYPE_CHECKING:
    from llmrecipe.training.run_state import RunState


def save(run: RunState, end: bool = False) -> Path | None:
    """Write a checkpoint: what was learned, optimizer, progress and every random state.

    The main process writes it; of the optimizer's state and of what was learned each process its own part where
    `runtime.state_dict` says so.

    Args:
        end: the run ends here; the checkpoint is part of its end and no event of its own.

    Raises:
        RunError: a weight or the optimizer's state is not finite, or the disk is full.
    """
    finite_check.check_finite(run)
    states = run.runtime.gather_json(random_state())
    parts: dict[str, dict[str, Tensor]] = {"delta": run.divided_weights()}
    state: Sequence[dict[str, Any]] | None = None
    if run.optimizer is not None and run.recipe.runtime.state_dict == "sharded":
        parts["optimizer"], *state = divided_state(run.optimizer)
    elif run.optimizer is not None:
        state = gathered_state(run.optimizer, run.runtime)
    with run.whole(leave=parts["delta"]):
        path = _save(run, states, state, parts, end) if run.runtime.is_main else None
        _write_own(run, parts)
    run.runtime.barrier()
    return path


def _write_own(run: RunState, parts: dict[str, dict[str, Tensor]]) -> None:
    """Write this process's parts where the main process writes the checkpoint."""
    for tensors in parts.values():
        if tensors and not run.runtime.is_main:
            run.runtime.write_parts(None, tensors)


def _delta(run: RunState, parts: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return what was learned and is not divided, the layout of what is as documents, and what writes the parts, by folder."""
    learned = {n: t for n, t in run.stack.delta(run.model).items() if n not in parts["delta"]}
    layout = {n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in parts["delta"].items()}
    writes = {stem: functools.partial(run.runtime.write_parts, tensors=tensors) for stem, tensors in parts.items() if tensors}
    return learned, {DIVIDED: layout} if layout else {}, writes


def _save(
    run: RunState,
    states: list[Any],
    state: Sequence[dict[str, Any]] | None,
    parts: dict[str, dict[str, Tensor]],
    end: bool,
) -> Path:
    """Write the checkpoint, on the main process.

    Args:
        states: the random generators of every process.
        state: the optimizer's tensors and facts, those of all processes.
        parts: tensors of which each process writes its part, by folder.
    """
    learned, layout, writes = _delta(run, parts)
    tensors: dict[str, dict[str, Any]] = {"delta": learned}
    documents: dict[str, Any] = {
        **layout,
        "progress": asdict(run.progress),
        "random": states,
        "judge": run.best.state(),
        "objective": run.objective.state(),
        "wrappers": {w.name: w.state() for w in run.stack},
        "structures": run.stack.structures(run.model),
        "reference": run.roles.cache.name,
        "events": {"lines": run.events.mark(), "end": end},
        "identity": run_identity.kept(run),
    }
    if run.roles.reference_moves or run.stack.learns_init():
        tensors["reference"] = run.stack.snapshot or {}
    if kept := run.stack.training_tensors(run.model):
        tensors["wrappers"] = kept
    if state is not None:
        tensors["optimizer"], documents["optimizer_facts"] = state
    root = run.dir.path / "checkpoints"
    path = save_checkpoint(root, run.progress.step, tensors, documents, writes)
    rotate(root, run.recipe.save.keep, run.best.best_step)
    forget_worse(run)
    if not end:
        run.events.save(step=run.progress.step, path=str(path.relative_to(run.dir.path)))
    run.dir.status("running", step=run.progress.step)
    return path


def restore(run: RunState) -> None:
    """Continue a run from its newest intact checkpoint, bit for bit.

    Raises:
        RunError: the reference is another one, or the best weights so far are missing.
    """
    path = latest_checkpoint(run.dir.path / "checkpoints")
    if path is None:
        say_progress(f"{run.dir.path} was stopped before its first checkpoint: it starts again at step 1")
        run.events.resume(0, lines=0)
        return
    with reading(f"the checkpoint {path} cannot be used", "take it out, and the run goes on from the one before it"):
        saved = read_checkpoint(path)
        known_before, known = _restore_from(run, saved)
    before = saved.documents.get("events", {})
    place = None if before.get("end") else str(path.relative_to(run.dir.path))
    run.events.resume(run.progress.step, before.get("lines"), saved=place)
    if not known_before:
        run.events.warning("this run kept no fingerprints of its data, base, tokenizer and template; it does from here on")
    if not known:
        run.events.warning(f"{run.recipe.eval.monitor} judges from here on: what another metric found best is not kept")


def _restore_from(run: RunState, saved: SavedCheckpoint) -> tuple[bool, bool]:
    """Take over a checkpoint, and return whether it knows its run's data and base, and whether its metric still judges.

    Raises:
        ValueError: a document holds what no run writes; libraries raise other errors for other contents.
    """
    known_before = run_identity.check_identity(run, saved)
    if saved.documents.get("reference", run.roles.cache.name) != run.roles.cache.name:
        raise RunError(
            "resume: the reference is not the model it was (its weights, or those under the policy, have changed since the "
            "checkpoint), so the rest would be another run; put it back or start a new run"
        )
    if run.stack.snapshot is not None and saved.tensors.get("reference"):
        run.stack.snapshot = {n: v.to(run.roles.device) for n, v in saved.tensors["reference"].items()}
    with run.whole(write=True):
        run.stack.restore(run.model, saved.tensors["delta"])
    run.stack.load_training_tensors(run.model, saved.tensors.get("wrappers", {}))
    run.progress.load(saved.documents["progress"])
    run.progress.ended = run.progress.ended and not goes_on(run.changes)
    known = run.best.load_state(saved.documents["judge"])
    run.objective.load_state(saved.documents["objective"])
    for wrapper in run.stack:
        wrapper.load_state(saved.documents["wrappers"].get(wrapper.name, {}))
    run.stack.set_trainable(run.model)
    if run.optimizer is not None:
        run.optimizer = build_run.optimizer_for(run.model, run.optim, run.stack, divide=run.runtime.optimizer)
        read = functools.partial(run.runtime.read_parts, saved.path / f"optimizer{PARTS}")
        restore_optimizer(run.optimizer, saved.tensors["optimizer"], saved.documents["optimizer_facts"], read)
    if returns_to_best(run):
        best_weights(run)
    states = saved.documents["random"]
    restore_random_state(states[min(run.runtime.rank, len(states) - 1)])
    lines = saved.documents.get("events", {}).get("lines", 0)
    if not is_step(lines):
        raise ValueError(f"its events have lines={lines!r:.60}")
    return known_before, known


def save_best(run: RunState) -> None:
    """Save what was learned so far as the best; trained tensors only.

    Raises:
        RunError: a weight or the optimizer's state is not finite, or the disk is full.
    """
    finite_check.check_finite(run)
    parts = {"delta": run.divided_weights()}
    with run.whole(leave=parts["delta"]):
        if run.runtime.is_main:
            learned, layout, writes = _delta(run, parts)
            documents = {"judge": run.best.state(), "identity": {"run": run_identity.of(run).run}, **layout}
            save_checkpoint(run.dir.path / BEST, run.progress.step, {"delta": learned}, documents, writes)
            forget_worse(run)
        _write_own(run, parts)


def forget_worse(run: RunState) -> None:
    """Delete best weights to which neither this run nor a resume from any of its checkpoints would return."""
    root = run.dir.path / "checkpoints"
    wanted = {run.best.best_step}
    for step in steps(root):
        with contextlib.suppress(OSError, ValueError, KeyError):
            wanted.add(read_document(root / folder_name(step), "judge")["best_step"])
    keep_only(run.dir.path / BEST, wanted)


def returns_to_best(run: RunState) -> bool:
    """Return whether the best weights are restored in the end and are not those of the current step."""
    return run.recipe.eval.load_best and run.best.best is not None and run.best.best_step != run.progress.step


def best_weights(run: RunState) -> Path:
    """Return the checkpoint that holds the best weights.

    Raises:
        RunError: it is missing; the last weights must not replace it silently.
    """
    step = run.best.best_step
    for root in (run.dir.path / BEST, run.dir.path / "checkpoints"):
        if (found := checkpoint_of(root, step)) is not None:
            return found
    raise RunError(
        f"eval.load_best: the best weights so far, those of step {step}, are not in {run.dir.path / BEST}; "
        "eval.load_best=false ends with the last ones"
    )


def load_best(run: RunState) -> bool:
    """Restore the best weights; return False when the last ones are the best or nothing was evaluated.

    Raises:
        RunError: they are missing.
    """
    if not returns_to_best(run):
        return False
    run.runtime.barrier()
    saved = read_checkpoint(best_weights(run))
    run_identity.check_owner(run, saved)
    with reading(f"the best weights {saved.path} cannot be used"), run.whole(write=True):
        run.stack.restore(run.model, saved.tensors["delta"])
    return True


def save_batch(run: RunState, step: int, micros: list[Batch]) -> Path:
    """Save the token ids of a step that went wrong."""
    path = run.dir.path / f"bad_step_{step:06d}_rank{run.runtime.rank}.json"
    laid_out = [m.here for m in micros]
    content = [{"rows": list(m.rows), "input_ids": m.input_ids.tolist(), "target": m.target.tolist()} for m in laid_out]
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def finish(run: RunState) -> None:
    """Restore the best weights, score the test split once, and write `final/`. Nothing is deleted: see `RunDir.tidy`.

    Raises:
        RunError: the last weights, or what is to be kept, are not finite, or no step was an update.
    """
    finite_check.check_updated(run)
    finite_check.check_finite(run)
    if run.meter.parts:
        add_to_report(run, "memory", run.meter.totals())
    restored = load_best(run)
    run.stack.finish(run.model)
    metrics: dict[str, Any] = {"steps": run.progress.step, "best_step": run.best.best_step if restored else run.progress.step}
    if run.validation is not None and run.best.best is not None:
        metrics[run.recipe.eval.monitor] = run.best.best
    metrics |= gain(run, metrics["best_step"])
    tested, breakdown = score_test(run)
    metrics |= {f"test/{name}": value for name, value in tested.items()} | forgetting.score_after(run)
    run.roles.cache.save()
    run.objective.finish(run.roles)
    finite_check.check_finite(run)
    with run.whole(everything=build_model.everything_trains(run.stack)), lasting("writing what the run leaves"):
        if run.runtime.is_main:
            record_changes(run)
            write_final(run, metrics, {f"test_{name}": content for name, content in breakdown.items()})
    run.runtime.barrier()


def gain(run: RunState, step: int) -> dict[str, float]:
    """Return by how much the validation loss fell from the evaluation before the first step to that of the weights kept.

    Args:
        step: that the weights come from; nothing is returned where one of both was not evaluated, or without general sets.
    """
    if not run.recipe.eval.forgetting or not run.runtime.is_main:
        return {}
    losses = dict(read_run(run.dir.path).curve("eval/loss"))
    return {"gain": losses[0] - losses[step]} if 0 in losses and step in losses else {}


def score_test(run: RunState) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Compute metrics of the test split, and what they are made of: read here, once, and nowhere else in training.

    The run keeps count of the looks at it.
    """
    test = test_rows(run.recipe, run.objective, run.data, run.tokenizer) if run.recipe.eval.test else None
    if test is None:
        return {}, {}
    shared = shared_rows(run.data, test) if isinstance(run.data, TokenData) and isinstance(test, TokenData) else 0
    if shared:
        run.events.warning(f"{shared} of {len(test)} test rows are also training rows, so they measure what was memorised")
    if run.runtime.is_main:
        note_look(run.dir.path, "training", step=run.progress.step)
    found: dict[str, dict[str, Any]] = {}
    metrics = evaluate(replace(run.evaluation(), samples=run.recipe.eval.bootstrap, breakdown=found), test)
    run.events.evaluation(step=run.progress.step, **{f"test/{k}": v for k, v in metrics.items()})
    return metrics, found
