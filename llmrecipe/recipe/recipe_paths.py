"""Search paths of recipes and presets: `--config-dir` first, then `./recipes`, then the ones that ship with the package."""

from __future__ import annotations

import contextvars
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.path_hints import near_path, runs_inside
from llmrecipe.core.paths import ASSETS, PACKAGE
from llmrecipe.recipe.yaml_file import short

COMPONENT_GROUPS = ("objective", "stack", "optim", "schedule")
"""Groups whose options are registered components."""
PRESET_GROUPS = ("model", "data", "optim", "schedule", "runtime")
"""Groups whose options may be YAML files in a folder of that name next to the recipes."""
GROUPS = ("model", "data", "objective", "stack", "optim", "schedule", "runtime")
"""Every group a defaults list or `group=choice` can name, besides the user's own (folders next to a recipe)."""
GROUP_NAMES = frozenset(GROUPS)

LISTED = "`llmrecipe list recipes` names all"
"""Where an error leads from a name that is not found: there are too many to list them."""
CONFIG_DIR = "LLMRECIPE_CONFIG_DIR"
"""Variable that names a further folder of recipes and presets, for this process and those it starts."""
_adjacent: contextvars.ContextVar[tuple[Path, ...]] = contextvars.ContextVar("adjacent", default=())


@functools.cache
def packaged() -> Path:
    """Return the folder of recipes that ships with the package: inside the wheel, or next to the package in a checkout."""
    inside = ASSETS / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def roots() -> list[Path]:
    """Return the folders that are searched, in order."""
    named = os.environ.get(CONFIG_DIR)
    folders = [*([Path(named)] if named else []), Path.cwd() / "recipes", packaged()]
    unique = dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir())
    return list(unique)


def recipes_in(root: Path) -> dict[str, Path]:
    """Return `folder/stem` -> file for every recipe below a folder; preset groups are left out."""
    # A defaults chain looks for every link, and `pathlib` takes several times as long to walk a tree and to compare its paths.
    found: list[tuple[str, ...]] = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in GROUP_NAMES and not name.startswith(".")]
        parts = tuple(os.path.relpath(folder, root).split(os.sep)) if folder != str(root) else ()
        found += [(*parts, name) for name in files if name.endswith((".yaml", ".yml")) and not name.startswith(".")]
    return {"/".join((*parts, name.rpartition(".")[0])): root.joinpath(*parts, name) for *parts, name in sorted(found)}


def all_recipes() -> dict[str, Path]:
    """Return stem -> file of every recipe that can be named; earlier folders take precedence, and `base` is not listed."""
    found: dict[str, Path] = {}
    for root in roots():
        for path in recipes_in(root).values():
            if path.stem != "base":
                found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


@contextmanager
def adjacent_presets(folders: Sequence[Path]) -> Iterator[None]:
    """Inside, the presets of these folders are found too, and first: they lie next to the recipe that is composed."""
    token = _adjacent.set(tuple(folders))
    try:
        yield
    finally:
        _adjacent.reset(token)


def presets(group: str) -> dict[str, Path]:
    """Return option -> file of a preset group: next to the recipe that is composed, then over the search path."""
    found: dict[str, Path] = {}
    if group in PRESET_GROUPS:
        for root in dict.fromkeys([*_adjacent.get(), *roots()]):
            for path in sorted((root / group).glob("*.yaml")):
                found.setdefault(path.stem, path)
    return found


def lookup(name: str, folders: list[Path], exclude: Path | None = None) -> Path | None:
    """Find a recipe by stem or `folder/stem`; return None where there is none.

    Raises:
        RecipeError: one folder contains several recipes of that stem.
    """
    wanted = name.strip("/").removesuffix(".yaml")
    for folder in folders:
        named = {key: path for key, path in recipes_in(folder).items() if wanted in (key, path.stem)}
        known = {key: path for key, path in named.items() if exclude is None or path.resolve() != exclude}
        if wanted in known:
            return known[wanted]
        matches = list(known.values())
        if len(matches) > 1:
            listed = ", ".join(short(path) for path in matches)
            raise RecipeError(
                f"recipe={name}: several recipes have that name: {listed}; give the folder too, as in recipe=FOLDER/{wanted}"
            )
        if matches:
            return matches[0]
    return None


def find_recipe(name: str | Path) -> Path:
    """Find the file of `recipe=`: a path, a run directory, or a name in the search path.

    Raises:
        RecipeError: nothing matches; the message gives the nearest names.
    """
    text = os.path.expanduser(str(name))
    path = Path(text)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if not path.is_absolute() and not text.startswith("."):
        found = lookup(text, roots())
        if found is not None:
            return found
    if path.suffix in (".yaml", ".yml") or path.is_absolute() or text.startswith("."):
        raise RecipeError(f"recipe={name}: there is no such file (looked from {Path.cwd()}){near_path(path)}")
    hint = runs_inside(path) or did_you_mean(path.name, sorted(all_recipes()))
    raise RecipeError(
        f"recipe={name}: there is no recipe of that name in {' or '.join(short(r) for r in roots())}{hint} ({LISTED})"
    )
