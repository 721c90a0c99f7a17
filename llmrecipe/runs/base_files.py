"""The files of a base model: where they are, which hold its weights, and whether a finished run was trained on them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.core.file_hashes import sha256_of
from llmrecipe.core.foreign import parse_json, read_json, reading
from llmrecipe.models.checkpoint_path import PICKLED, SAFE, locate
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.runs.run_dir import IDENTITY


def base_folder(section: ModelSection) -> Path | None:
    """Return the folder a base is read from: its own, or its snapshot in the hub's cache; None without one."""
    try:
        place, local = locate(section.path)
    except UserError:
        return None
    if local:
        return Path(place)
    config = try_to_load_from_cache(place, "config.json", revision=section.revision)
    return Path(config).parent if isinstance(config, str) else None


def same_base(base: ModelSection, folder: Path) -> bool | None:
    """Return whether a base's weights are the files that a finished run was trained on; None where that is not known.

    Args:
        base: the section that loads the base.
        folder: the run's `final` folder.
    """
    try:
        kept = parse_json((folder / IDENTITY).read_bytes())["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    place = base_folder(base)
    if place is None or base.init != "pretrained":
        return None
    now = {name: sha256_of(place / name) for name in weight_files(place)}
    before = {name: value for name, value in kept.items() if "/" not in name and name != "config.json"}
    return now == before if before else None


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold the weights of a model folder."""
    for index in (SAFE[1], PICKLED[1]):
        if (folder / index).is_file() and not (folder / index.replace(".index.json", "")).is_file():
            listed = read_json(folder / index, "model.path", "download or save the model again", ModelError)
            with reading(f"model.path: {folder / index}", "download or save the model again", ModelError):
                return [index, *sorted({str(name) for name in listed["weight_map"].values()})]
    return [name for name in (SAFE[0], PICKLED[0]) if (folder / name).is_file()][:1]
