"""The report before a run's first step, also kept in `report.json`: data, trained tensors, layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from llmrecipe.core.console import say_progress
from llmrecipe.core.foreign import read_json
from llmrecipe.core.redact import redact_text
from llmrecipe.data import validation
from llmrecipe.methods._base.stack import base_parameters, kind_name
from llmrecipe.models.tokenizer_training import training_facts
from llmrecipe.recipe.explain import explain
from llmrecipe.recipe.yaml_file import dotted
from llmrecipe.training.run_profile import PART, described_profile
from llmrecipe.training.weight_changes import change_tables

if TYPE_CHECKING:
    from llmrecipe.engine.forward import Engine
    from llmrecipe.methods._base.method import Wrapper
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.schema import BatchSection
    from llmrecipe.training.run_state import RunState


def announce(run: RunState) -> None:
    """Print the facts of the run (main process only) and write them to `report.json`."""
    if not run.runtime.is_main:
        return
    facts = {**run_facts(run), "recipe": recipe_facts(run)}
    (run.dir.path / "report.json").write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
    report = run.data.report
    trained = facts["trained"]
    tokenizer = facts.get("tokenizer")
    if tokenizer is not None and run.first_step == 0:
        run.events.check(step=0, **{f"tokenizer/{name}": value for name, value in tokenizer.items()})
    if run.flops is not None and run.first_step == 0:
        run.events.check(step=0, peak_flops=run.flops.peak, peak_flops_source=run.flops.source)
    lines = [
        *report.lines(),
        *run.stack.written_out(),
        *([tokenizer_text(tokenizer)] if tokenizer is not None else []),
        f"model: {run.loaded.section.path}, {facts['base_parameters']:,} parameters; trained: {trained['parameters']:,} "
        f"in {trained['tensors']} tensors ({', '.join(f'{k} x{v}' for k, v in list(trained['kinds'].items())[:8])})",
        f"run: {run.steps} steps of {rows_text(len(run.data), run.recipe.batch.size)}{warmup_text(run.recipe.batch)}, "
        f"{'packed' if run.roles.packing else 'padded'}, "
        f"{run.runtime.device}, {run.runtime.world} process{'es' if run.runtime.world > 1 else ''}; {run.dir.path}",
        described_profile(run),
        *filter(None, [run.roles.engine.fused.line()]),
        *waiting_lines(run.stack, run.objective, run.runtime.device.type),
    ]
    for line in lines:
        say_progress(line)
    if why := run.roles.engine.fused.refused:
        run.events.warning(f"model.kernels: liger {why}; the run goes on without")
    if run.roles.engine.one_by_one:
        run.events.warning(
            "attention in one call does not give this model's states here: packed documents are computed one after another "
            "(model.packed_attention=loop)"
        )
    if (text := half_text(run.roles.engine)) is not None:
        run.events.warning(text)
    for warning in validation.warnings(report):
        run.events.warning(warning)


def half_text(engine: Engine) -> str | None:
    """Return what float16 does to gradients, for a model that is trained in it; None of others."""
    if torch.float16 not in (engine.autocast, engine.model.dtype):
        return None
    return (
        "model.dtype: float16 holds no gradient below 6e-8, and the loss of a step is not scaled up to keep them above; use "
        "bfloat16 where the GPU has it"
    )


def waiting_lines(stack: Iterable[Wrapper], objective: Objective, device: str) -> list[str]:
    """Return one line for each part of a recipe whose steps wait for a device that is not the host."""
    parts = [("objective", objective.waits), *((f"stack.{wrapper.name}", wrapper.waits) for wrapper in stack)]
    return [f"{part}: each step waits for the device to know {why}" for part, why in parts if why and device != "cpu"]


def rows_text(rows: int, size: int) -> str:
    """Return how many rows a step reads: fewer than `batch.size` where there are fewer, or where a pass leaves a rest."""
    count = min(rows, size)
    text = f"{count} row{'s' if count != 1 else ''}"
    return f"at most {text}" if rows > size and rows % size else text


def warmup_text(batch: BatchSection) -> str:
    """Return how batches grow to their size, or nothing where they do not."""
    warm = batch.warmup
    return f" ({warm.start} at first, growing over {warm.batches} batches)" if warm is not None else ""


def tokenizer_text(facts: dict[str, Any]) -> str:
    """Return what a trained tokenizer does with held-out text, in one line."""
    return (
        f"tokenizer: {facts['algorithm']} of {facts['vocab_size']:,} tokens, trained on {facts['trained_bytes']:,} bytes; "
        f"{facts['tried_on']} texts: {facts['bytes_per_token'] or 0:.2f} bytes a token, "
        f"{facts['round_trip'] or 0:.1%} come back unchanged"
    )


def run_facts(run: RunState) -> dict[str, Any]:
    """Return data report, stack and trained tensors as JSON."""
    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    kinds = Counter(".".join(part for part in n.split(".")[-3:] if not part.isdigit()) for n in trained)
    return {
        "data": run.data.report.to_dict(),
        **({"tokenizer": training_facts(train)} if (train := run.recipe.tokenizer.train) is not None else {}),
        "stack": {w.name: kind_name(w) for w in run.stack},
        "grids": {f"{w.name}: {title}": made for w in run.stack for title, made in w.grids(run.model).items()},
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "base_parameters": base_parameters(run.model),
        "trained": {
            "parameters": sum(p.numel() for p in trained.values()),
            "tensors": len(trained),
            "kinds": dict(kinds.most_common()),
            "names": {n: list(p.shape) for n, p in trained.items()},
        },
        "packed": run.roles.packing,
        PART: run.profile.to_dict(),
        "steps": run.steps,
    }


def recipe_facts(run: RunState) -> dict[str, Any]:
    """Return the recipe's name, and what set each value that it does not inherit: its own file, or the command line.

    A resume composes the recipe in the run's folder, so what is known of the start stays, and only its overrides are new.
    """
    found, file = {}, run.composition.path
    for line in explain(run.composition):
        own = line.origin.kind == "file" and line.origin.file == file and run.first_step == 0
        if own or line.origin.kind == "override":
            found[dotted(line.key)] = redact_text(str(line.origin))
    path = run.dir.path / "report.json"
    known = read_json(path).get("recipe", {}) if run.first_step and path.is_file() else {}
    return {"name": run.composition.name, **known, "set": {**known.get("set", {}), **found}}


def record_proof(run: RunState, facts: dict[str, Any]) -> None:
    """Add what the run has proved of itself to `report.json`, under `proved` (main process only)."""
    add_to_report(run, "proved", facts)


def add_to_report(run: RunState, part: str, facts: dict[str, Any]) -> None:
    """Add facts to a part of `report.json` (main process only)."""
    path = run.dir.path / "report.json"
    if not run.runtime.is_main or not path.is_file():
        return
    known = read_json(path)
    known[part] = {**known.get(part, {}), **facts}
    path.write_text(json.dumps(known, indent=1, default=str) + "\n", encoding="utf-8")


def record_changes(run: RunState) -> None:
    """Add how far training moved the weights to `report.json`; a run that has trained does not fail for a picture."""
    if run.start is None:
        return
    try:
        add_to_report(run, "changes", change_tables(run.model, run.stack, run.start))
    except (RuntimeError, ValueError, OSError) as error:
        run.events.warning(f"how far the weights moved was not measured: {error}")
