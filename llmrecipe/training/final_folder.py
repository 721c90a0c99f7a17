"""Writing `final/`: what a finished run leaves, in one move."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrecipe.core.errors import RunError
from llmrecipe.data.formats.splits import paths_of
from llmrecipe.models import stored_heads
from llmrecipe.models.attention_calls import stock_backend
from llmrecipe.models.checkpoint_path import DELTA_FILE, describe_base
from llmrecipe.recipe.rights import RIGHTS
from llmrecipe.runs import delta, model_card
from llmrecipe.runs.checksums import write_checksums
from llmrecipe.runs.durable import ASIDE, put_in_place, share_as_folder, sync_tree
from llmrecipe.runs.run_dir import IDENTITY
from llmrecipe.training import build_model, finite_check, run_identity

if TYPE_CHECKING:
    from llmrecipe.training.run_state import RunState


def write_final(run: RunState, metrics: dict[str, Any], documents: dict[str, dict[str, Any]]) -> Path:
    """Write `final/` to a temporary folder, durably, and move it into place: a delta with its stack, or the whole model.

    Args:
        documents: file name -> JSON content besides the objective's own.

    Raises:
        RunError: the disk is full, or a weight does not fit the dtype it is written in.
    """
    final = run.dir.path / "final"
    aside = run.dir.path / f"{ASIDE}final"
    for left in run.dir.path.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        if build_model.everything_trains(run.stack) and not run.loaded.layers:
            save_whole(run, aside / "model")
        else:
            delta.write_stack(aside, saved_of(run))
        run.tokenizer.save_pretrained(aside)
        if run.data.reader is not None:
            run.data.reader.save(aside)
        (aside / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(model_card.model_card(_card_facts(run, metrics)), encoding="utf-8")
        identity = {name: value for name, value in run_identity.kept(run).items() if name != "run"}
        (aside / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        for name, content in (run.objective.documents(run.roles) | documents).items():
            (aside / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        write_checksums(aside)
        share_as_folder(aside)
        sync_tree(aside)
        put_in_place(aside, final)
    except OSError as error:
        raise RunError(f"cannot write {final}: {error.strerror or error}; the last checkpoint is intact") from error
    return final


def _card_facts(run: RunState, metrics: dict[str, Any]) -> model_card.CardFacts:
    """Return what the card of a run says."""
    return model_card.CardFacts(
        name=run.composition.name,
        base=run.loaded.section.path,
        objective=delta.kind_name(run.objective),
        methods=[(w.name, delta.kind_name(w)) for w in run.stack],
        trained=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in run.model.parameters()),
        data=list(paths_of(run.recipe.data)),
        rows=len(run.data),
        metrics=metrics,
        head=run.loaded.head,
    )


def save_whole(run: RunState, folder: Path) -> None:
    """Write a Transformers folder in the dtype the recipe names (float32 master weights are cast once)."""
    dtype = run.recipe.model.dtype
    attention = run.model.config._attn_implementation
    state, scalars = stored_heads.split(run.model.state_dict())
    stored_heads.write_heads(scalars, folder.parent)
    if dtype in ("bfloat16", "float16"):
        state = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in state.items()}
        if bad := finite_check.nonfinite_names(state):
            raise RunError(f"model.dtype: weights of {', '.join(bad[:3])} are beyond the range of {dtype}; bfloat16 holds them")
    # The stock name, so that the folder loads where this package is not installed.
    run.model.config._attn_implementation_internal = stock_backend(attention)
    try:
        run.model.save_pretrained(folder, state_dict=state)
    finally:
        run.model.config._attn_implementation_internal = attention
    run.tokenizer.save_pretrained(folder)
    if run.data.reader is not None:
        run.data.reader.save(folder)


def saved_of(run: RunState) -> delta.SavedStack:
    """Return the run's stacks, oldest first, its own last."""
    layers = [
        delta.Layer(x.wrappers, x.structures, f"parent-{i}.safetensors", x.tensors) for i, x in enumerate(run.loaded.layers)
    ]
    # What other roles learned (a value function) serves training alone; checkpoints keep it, the finished model does not.
    others = {w.role: w for w in run.stack if w.role}
    adjacent = {n for w in others.values() for n in w.delta(run.model)}
    tensors = {
        n: t
        for n, t in run.stack.delta(run.model).items()
        if n not in adjacent and not any(n.startswith(f"task_head.{role}.") for role in others)
    }
    own = delta.Layer(
        {w.name: delta.wrapper_mapping(w) for w in run.stack if not w.role},
        {n: s for n, s in run.stack.structures(run.model).items() if n not in {w.name for w in others.values()}},
        DELTA_FILE,
        tensors,
    )
    section = run.loaded.section
    base = {
        **describe_base(section.path, run.dir.path / "final"),
        "fingerprint": run.loaded.base_fingerprint,
        "section": section.model_dump(exclude_defaults=True, exclude={"path", "continue_", "adapters", *RIGHTS}),
    }
    labels = getattr(run.data, "labels", None)
    return delta.SavedStack(base, [*layers, own], run.loaded.head, labels, delta.kind_name(run.objective))
