"""Checks before torch is imported, so that a typo, a missing file or a foreign format is reported at once.

Everything here is checked again where it is used; nothing later relies on it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmrecipe.core.errors import RecipeError

if TYPE_CHECKING:
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.recipe.data_section import DataSection
    from llmrecipe.recipe.schema import ModelSection, Recipe

TRAINING = ("train", "validation", "test")
LOOK_INTO = 64 * 2**20
"""Size limit in bytes of sources opened to detect their format; opening a larger one takes longer than importing torch."""


def composed(recipe: str | Path, overrides: list[str]) -> Composition:
    """Compose a recipe, validate it with all its stages, and look for the files it names.

    Raises:
        UserError: what is wrong with the recipe; else which file is missing or cannot be what it should be.
    """
    from llmrecipe.recipe.compose import compose
    from llmrecipe.runs.tracker import check_trackers
    from llmrecipe.runtime.accelerate_environment import check_environment

    composition = compose(recipe, overrides)
    if composition.recipe.stages:
        from llmrecipe.recipe.pipeline_plan import plan

        plan(composition)
    else:
        check_environment(composition.recipe)
        check_trackers(composition.recipe.log.trackers)
        check_files(composition.recipe)
    return composition


def resumed(run: str) -> tuple[str, str]:
    """Return (recipe, directory) of a run to be continued, after going to the folder it was started in.

    Paths in the recipe and in overrides are relative to that folder, wherever the command is given.

    Raises:
        RunError: the folder is not a run directory.
    """
    from llmrecipe.core.console import say_progress
    from llmrecipe.runs.run_dir import RunDir, started_in

    path = RunDir.open(run, write=False).path
    place = started_in(path)
    if place is None or place.resolve() == Path.cwd().resolve():
        return str(path / "recipe.yaml"), run
    path = path.absolute()
    os.chdir(place)
    say_progress(f"continuing in {place}, where the run was started")
    return str(path / "recipe.yaml"), str(path)


def begun(composition: Composition) -> str:
    """Return how far the run in `run.dir` is: `new`, `begun`, or `done` after a line that says so.

    Raises:
        RecipeError: the recipe has no `run.dir`.
        RunError: the state of the run cannot be read, or it is done under another recipe.
    """
    from llmrecipe.core.console import say_progress
    from llmrecipe.runs.run_dir import RunDir, has_begun

    place = composition.recipe.run.dir
    if place is None:
        raise RecipeError("resume=auto: needs run.dir=FOLDER, where the run is started and continued")
    path = Path(place)
    if not has_begun(path):
        return "new"
    directory = RunDir.open(path, write=False)
    state = directory.read_status()
    if state["status"] != "done":
        return "begun"
    from llmrecipe.training.resume_rules import allowed_changes

    allowed_changes(directory, composition)
    say_progress(f"{path} is finished: it ended at step {state.get('step', 0)}; resume={path} steps=MORE continues it")
    return "done"


def check_files(recipe: Recipe, splits: tuple[str, ...] = TRAINING) -> None:
    """Look for the model, the tokenizer and the data a recipe names.

    Args:
        splits: of the data that are read: the first must exist.

    Raises:
        UserError: one is missing, damaged or something else.
    """
    from llmrecipe.core import registry

    check_model(recipe.model)
    refuse_unread_run(recipe)
    if recipe.tokenizer.path is not None:
        from llmrecipe.models.checkpoint_path import locate

        locate(recipe.tokenizer.path, "tokenizer.path")
    rows = registry.spec("objective", str(recipe.objective["kind"])).facts.get("rows")
    check_data(recipe.data, rows, splits)


def refuse_unread_run(recipe: Recipe) -> None:
    """Refuse a run as `model.path` of which nothing would be read.

    Raises:
        RecipeError: fresh weights of a shape of their own are drawn, and the tokenizer comes from elsewhere.
    """
    from llmrecipe.models.checkpoint_path import run_folder

    model, tokenizer = recipe.model, recipe.tokenizer
    is_unread = model.init == "random" and "model_type" in model.config and (tokenizer.path or tokenizer.train)
    if is_unread and run_folder(model.path) is not None:
        raise RecipeError(
            f"model.path: nothing of the run {model.path} would be read: model.init=random makes fresh weights, "
            "and the tokenizer is another; to go on from it set model.init=pretrained model.config={} tokenizer.path=null"
        )


def check_model(section: ModelSection) -> None:
    """Check the folder of a model section, or whether a hub name is in the cache where the hub is unreachable.

    Raises:
        UserError: there is no such folder, it holds no model, or a run in it has not finished.
    """
    from llmrecipe.models.checkpoint_path import (
        adapter_base,
        check_folder,
        is_adapter,
        locate,
        offline,
        run_folder,
        unreachable,
    )

    if section.init == "random" and "model_type" in section.config:
        return
    path = adapter_base(section.path) if is_adapter(section.path) else section.path
    if run_folder(path) is not None:
        return
    place, local = locate(path)
    if local:
        check_folder(Path(place), section.allow_pickle, weights=section.init == "pretrained")
        return
    from huggingface_hub import try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(place, "config.json", revision=section.revision), str)
    if not cached and (reason := offline()) is not None:
        raise unreachable(place, reason)


def check_data(data: DataSection, rows: str | None, splits: tuple[str, ...] = TRAINING) -> None:
    """Look at the sources of a data section and, where they are small files, at the format of their rows.

    Args:
        rows: row type the objective reads; None where only the objective's class determines it.

    Raises:
        DataError: one is missing, damaged, or holds rows the objective cannot read.
    """
    from llmrecipe.data.formats.sources import place
    from llmrecipe.data.formats.splits import has_split, open_split, paths_of
    from llmrecipe.data.tokenize_split import source_layout

    named = [*paths_of(data), *(setting for setting in (data.validation, data.test) if isinstance(setting, str))]
    if any(found is None or _size(found) > LOOK_INTO for found in map(place, named)):
        return
    for part in open_split(data, splits[0]):
        if rows is not None:
            source_layout(part, data, rows)
    for split in splits[1:]:
        has_split(data, split)


def _size(place: Path) -> int:
    files = [p for p in place.iterdir() if p.is_file()] if place.is_dir() else [place]
    return sum(p.stat().st_size for p in files)


def subject(path: str, overrides: list[str], split: str | None = None) -> Composition:
    """Return the recipe under which a run or a model is evaluated or answers, after looking for its files.

    Args:
        split: of the data that is scored; None where no data is read.

    Raises:
        UserError: the path, the words or a file is wrong.
    """
    from llmrecipe.evaluation.eval_recipe import recipe_of

    composition = recipe_of(path, overrides)
    if split is not None:
        check_files(composition.recipe, (split,))
    else:
        check_model(composition.recipe.model)
    return composition


def answerers(paths: list[str], overrides: list[str]) -> None:
    """Check the runs or models that are to answer, several of one base together (see `subject`)."""
    shared = {paths[0]: overrides}
    if len(paths) > 1:
        from llmrecipe.evaluation.open_several import REQUESTED, share

        shared = share(paths, overrides, REQUESTED)
    for path, own in shared.items():
        subject(path, own)


def finished(run: str) -> None:
    """Refuse a folder that is neither a finished run nor a PEFT adapter folder.

    Raises:
        RunError: it is something else, or the run has not finished.
    """
    from llmrecipe.models.checkpoint_path import finished_run, is_adapter

    if not is_adapter(run):
        finished_run(run)
