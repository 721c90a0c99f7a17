"""Rights that only the user gives to an artefact: to run Python code that comes with a checkpoint, and to read pickles.

Only the user who opens something gives them: on the command line, in a recipe of their own, or as an argument of `load`. An
artefact (a run, a stored stack, an adapter, a model folder) may name a right, but that has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.recipe.provenance import Origins, origin_of, schema_origin
from llmrecipe.recipe.recipe_paths import packaged
from llmrecipe.recipe.yaml_file import KeyPath, dotted

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import ModelSection

RIGHTS = ("trust_remote_code", "allow_pickle")
"""Keys of the section `model` that are rights."""
KEYS = tuple(("model", name) for name in RIGHTS)
MARKS = (
    "status.json",
    "trials.jsonl",
    "stack.yaml",
    "final/stack.yaml",
    "final/model/config.json",
    "adapter_config.json",
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Files that identify the folder of a run, a search, an adapter or a model."""


def is_artefact(path: Path) -> bool:
    """Return whether a file is in the folder of a run, search, adapter or model, at any depth, symlinks resolved."""
    if path.parent.resolve().is_relative_to(packaged().resolve()):
        return False
    folders = {folder for place in (path.absolute(), path.resolve()) for folder in place.parents}
    return any((folder / mark).is_file() for folder in folders for mark in MARKS)


def how_to_give(right: str) -> str:
    """Return how a user gives a right."""
    return (
        f"set model.{right}=true (a step takes 'words=[\"model.{right}=true\"]', a local judge '{right}: true', "
        f"llmrecipe.load {right}=True)"
    )


def without_rights(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model section without its rights."""
    return {key: value for key, value in section.items() if key not in RIGHTS}


def rights_of(section: ModelSection) -> dict[str, bool]:
    """Return the rights a model section has."""
    return {name: True for name in RIGHTS if getattr(section, name)}


def rights_words(section: ModelSection) -> list[str]:
    """Return the overrides that give the rights of a model section again."""
    return [f"model.{name}=true" for name in rights_of(section)]


def withhold(mapping: dict[str, Any], origins: Origins, own: Iterable[Path]) -> list[str]:
    """Remove from a composed recipe, in place, the rights that come neither from an override nor from a file of the user.

    Args:
        own: the user's files.

    Returns:
        One line for every right that was removed.
    """
    files = set(own)
    notes: list[str] = []
    for at, holder in _holders(mapping):
        origin = origins.get(at) or origin_of(origins, at)
        if holder[at[-1]] is False or (origin and (origin.kind == "override" or origin.file in files)):
            continue
        where = f" [{origin}]" if origin and origin.kind == "file" else ""
        key = dotted(at)
        notes.append(
            f"{key}: ignored, because the recipe that sets it is in a run or next to a model{where}; if it is needed "
            f"and you trust the source, set it yourself: {key}=true"
        )
        holder[at[-1]] = False
        if at in KEYS:
            origins[at] = schema_origin(at)
    return notes


def _holders(value: object, at: KeyPath = ()) -> Iterator[tuple[KeyPath, dict[Any, Any]]]:
    """Yield (key path of a right, the mapping that has it) at any depth: a judge inside a reward opens a model too."""
    if isinstance(value, dict):
        for key, inner in list(value.items()):
            if key in RIGHTS:
                yield (*at, key), value
            else:
                yield from _holders(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _holders(inner, (*at, index))
