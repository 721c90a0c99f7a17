"""The device profile of a run: decided before its model is loaded, kept in its `report.json`, used again
by a resume, an evaluation and a prediction of what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmrecipe.core.console import say_progress
from llmrecipe.core.device_profile import Profile, profile_from, profile_of
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.models.packed_attention import routes_of
from llmrecipe.recipe.profile_keys import check_device, profile_for, profile_line
from llmrecipe.training.measured_memory import vocabulary_of

if TYPE_CHECKING:
    import torch

    from llmrecipe.recipe.schema import Recipe
    from llmrecipe.training.run_state import RunState

PART = "profile"
"""Name of the profile in `report.json`."""


def decided_profile(recipe: Recipe, device: torch.device, resume: Path | None, speaks: bool = True) -> Profile:
    """Return what a run computes by: what its device decides, or decided when the run began, and what its keys set.

    Args:
        resume: the directory of a run to continue.
        speaks: whether this process reports that a resumed run has another device than it began on.

    Raises:
        RunError: the run's `report.json` cannot be read.
        RecipeError: a key names what the device does not have.
    """
    check_device(recipe, device)
    known = stored_profile(resume) if resume is not None else None
    found = profile_for(recipe, device, known)
    if known is not None and speaks and (known.kind, known.name) != (found.kind, found.name):
        before, now = (profile.name or profile.kind for profile in (known, found))
        say_progress(f"device: the run began on {before} and continues on {now}, which decides again")
    return found


def stored_profile(run: Path) -> Profile | None:
    """Return the profile that a run was started with; None where it had none, or has not made its report.

    Raises:
        RunError: the report, or the profile in it, cannot be read.
    """
    path = run / "report.json"
    stored = read_json(path).get(PART) if path.is_file() else None
    if stored is None:
        return None
    with reading(f"{path}: {PART}", "take it out, and the device decides again"):
        return profile_from(stored)


def finished_profile(path: str) -> Profile | None:
    """Return the profile of the run that a path names by its directory or its `final` folder; None of what is no run.

    Raises:
        RunError: the run has not finished, or its report cannot be read.
    """
    folder = run_folder(path)
    if folder is None:
        return None
    return stored_profile(folder.parent if (folder.parent / "recipe.yaml").is_file() else folder)


def described_profile(run: RunState) -> str:
    """Return the profile of a run in one line."""
    device = run.runtime.device
    profile = profile_of(device)
    routes = routes_of(profile, device) if run.roles.packing else ()
    if run.roles.engine.one_by_one:
        routes = ("loop",)
    return profile_line(profile, run.recipe, vocabulary_of(run.model), routes)
