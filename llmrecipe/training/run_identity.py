"""The fingerprints of a training: begun when it is built, kept with every checkpoint, compared when it is continued."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RunError
from llmrecipe.data.prepare import SplitRows, source_hashes
from llmrecipe.runs.identity import Identity, changed

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import Recipe
    from llmrecipe.runs.checkpoint_io import SavedCheckpoint
    from llmrecipe.runs.run_dir import RunDir
    from llmrecipe.training.run_state import RunState


def identify(recipe: Recipe, directory: RunDir, data: SplitRows, validation: SplitRows | None) -> Identity:
    """Begin to compute the fingerprints of a run."""
    known = directory.identity() or {}
    splits = {
        "train": data.content,
        "validation": lambda: validation.content() if validation is not None else None,
        "test": lambda: source_hashes(recipe.data, "test") if recipe.eval.test else None,
    }
    named = {"objective": recipe.objective, "roles": recipe.roles, "stack": recipe.stack}
    return Identity(str(known.get("run") or uuid.uuid4().hex), splits, recipe.model, named)


def of(run: RunState) -> Identity:
    """Return the identity of a run, on the process that writes."""
    assert run.identity is not None, "only the process that writes identifies a run"
    return run.identity


def kept(run: RunState) -> dict[str, Any]:
    """Return the run's fingerprints, waiting for them, and write them into its `identity.json`."""
    facts = of(run).facts()
    if run.dir.identity() != facts:
        run.dir.identify(facts)
    return facts


def check_identity(run: RunState, saved: SavedCheckpoint) -> bool:
    """Refuse a checkpoint of another run, and a run whose data, base, tokenizer or template is not what it was.

    Returns:
        Whether the run had fingerprints; one written before there were any has them from here on.

    Raises:
        RunError: it names everything that changed.
    """
    check_owner(run, saved)
    facts: dict[str, Any] = {}
    if run.runtime.is_main:
        before = saved.documents.get("identity") or {}
        before = before if "base" in before else run.dir.identity() or {}
        now = of(run).facts()
        facts = {"known": "base" in before, "changed": changed(before, now)}
        for split, content in before.get("data", {}).items():
            # A split that is not read this time stays the one it was.
            now["data"][split] = now["data"].get(split) or content
    facts = run.runtime.broadcast_json(facts)
    if facts["changed"]:
        lines = "".join(f"\n  {line}" for line in facts["changed"])
        raise RunError(f"resume: what {run.dir.path} is trained with has changed:{lines}\nPut it back, or start a new run.")
    if run.runtime.is_main:
        kept(run)
    return bool(facts["known"])


def check_owner(run: RunState, saved: SavedCheckpoint) -> None:
    """Refuse a checkpoint of another run; one without an owner was written before checkpoints had one.

    Raises:
        RunError: it names the checkpoint.
    """
    owner = saved.documents.get("identity", {}).get("run")
    directory = run.dir.identity()
    if directory == {} and run.identity is not None and owner is not None:
        run.identity.run = owner  # the directory's own record is damaged
    elif owner is not None and owner != (directory or {}).get("run"):
        raise RunError(f"resume: {saved.path} is a checkpoint of another run than {run.dir.path}; take it out of there")
