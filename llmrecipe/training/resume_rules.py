"""What a resume may change, what it may not, and where a finished run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmrecipe.core.console import say_progress
from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import reading
from llmrecipe.recipe.provenance import leaves
from llmrecipe.recipe.renames import first_value
from llmrecipe.recipe.rights import KEYS
from llmrecipe.recipe.yaml_file import KeyPath, dotted
from llmrecipe.runs.checkpoint_io import latest_checkpoint, read_document
from llmrecipe.runs.events import is_step
from llmrecipe.runs.run_dir import RunDir

if TYPE_CHECKING:
    from llmrecipe.recipe.compose import Composition

FIXED = ("model", "tokenizer", "data", "objective", "roles", "stack", "optim", "batch", "seed")
"""Keys a resumed run may not change: another value would make the rest of the run a different experiment."""
PLACE = (("run", "dir"), ("run", "root"), ("run", "name"))
"""Keys that say where a new run is; a resumed one is where it is."""
LENGTH = ("steps", "epochs", "eval")
"""Keys that decide when a run ends."""

Changes = dict[KeyPath, tuple[Any, Any]]
"""Key -> (value of the run, value from here on)."""


def changes_of(before: Mapping[str, Any], composition: Composition) -> Changes:
    """Return the keys whose values differ between a run's recipe and a recipe it is to continue under.

    A key that the run's recipe does not have, written before that key existed, had its default. Rights are granted again on
    each start, and do not change what is learned; neither do the keys of `PLACE`.
    """
    old, new = dict(leaves(before)), dict(leaves(composition.mapping))
    found: Changes = {}
    for key in {**new, **old}:
        origin = composition.origins.get(key)
        unknown = key not in old and origin is not None and origin.kind == "default"
        same = first_value(key, old.get(key)) == first_value(key, new.get(key))
        if not unknown and key not in (*KEYS, *PLACE) and not same:
            found[key] = (old.get(key), new.get(key))
    return found


def allowed_changes(directory: RunDir, composition: Composition) -> Changes:
    """Return the keys whose values differ between a run and a recipe it is to continue under.

    Raises:
        RunError: a key that a resumed run may not change is among them.
    """
    changes = changes_of(directory.recipe(), composition)
    fixed = {key: change for key, change in changes.items() if key[0] in FIXED}
    if fixed:
        lines = "\n".join(f"  {line}" for line in lines_of(fixed))
        raise RunError(f"resume: these keys cannot change in a resumed run:\n{lines}\nStart a new run instead.")
    return changes


def check_resume(directory: RunDir, composition: Composition, steps: int) -> Changes:
    """Return what a resume changes; nothing is loaded or written before this has passed.

    Args:
        steps: optimizer steps of the whole run under the new recipe.

    Raises:
        RunError: a fixed key differs, the run is finished and nothing is left to do, its end has no checkpoint, or it has
            already made more steps.
    """
    changes = allowed_changes(directory, composition)
    newest = latest_checkpoint(directory.path / "checkpoints")
    with reading(f"the checkpoint {newest} cannot be used", "take it out, and the run goes on from the one before it"):
        progress = read_document(newest, "progress") if newest is not None else {}
        if not is_step(progress.get("step", 0)):
            raise ValueError(f"its progress has step={progress['step']!r:.60}")
    status = directory.read_status()
    if status["status"] == "done":
        _check_end(directory, int(status.get("step") or 0), steps, progress, changes)
    elif progress.get("step", 0) > steps:
        raise RunError(f"resume: {directory.path} has a checkpoint of step {progress['step']} already; steps={steps} is less")
    return changes


def _check_end(directory: RunDir, done: int, steps: int, progress: Mapping[str, Any], changes: Changes) -> None:
    """Refuse to continue a finished run that has nothing left to do, or no checkpoint of its end."""
    path = directory.path
    if steps <= done or (progress.get("ended") and not goes_on(changes)):
        if not (path / "final").is_dir():
            raise RunError(
                f"resume: {path} ended at step {done} and its result, {path / 'final'}, is gone; put it back, or delete {path} "
                "and start it again with the command it was started with"
            )
        directory.tidy()
        more = f"steps=MORE (more than {done}) continues it from there"
        raise RunError(f"resume: {path} is finished: it ended at step {done}; {more}")
    at = progress.get("step")
    if at != done:
        kept = "no checkpoint" if at is None else f"no checkpoint of a later step than {at}"
        raise RunError(
            f"resume: {path} is finished at step {done} and has {kept}, so it cannot continue from its end; start a new run "
            f"from what it learned: model.path={path} run.dir=FOLDER (save.end=true keeps a checkpoint of the end)"
        )


def goes_on(changes: Changes) -> bool:
    """Return whether a resume changes a key that decides when the run ends."""
    return any(key[0] in LENGTH for key in changes)


def lines_of(changes: Changes) -> list[str]:
    """Return `key: old -> new` for every change."""
    return [f"{dotted(key)}: {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in changes.items()]


def record(directory: RunDir, composition: Composition, changes: Changes) -> None:
    """Show what a resume changes, and write it into the run's recipe.yaml and command.txt, so that the next resume keeps it."""
    if not changes or not directory.main:
        return
    for line in lines_of(changes):
        say_progress(f"resume changes {line}")
    directory.redescribe(composition)
