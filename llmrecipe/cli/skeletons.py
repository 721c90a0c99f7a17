"""Skeletons of components: the file, a recipe that uses it and a test, which pass as they are written."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from llmrecipe import plugin
from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.paths import ASSETS, PACKAGE
from llmrecipe.recipe.recipe_paths import all_recipes, packaged

GROUPS = {"method": "stack", "objective": "objective", "metric": "metric"}
"""What can be written -> the group of the registry it joins."""


def write_skeleton(what: str, name: str, folder: Path) -> list[Path]:
    """Write a component, its recipe and its test.

    Inside this package they go where the tree has them. Elsewhere the folder is a package of components (a plugin): `recipes/`
    and `tests/` lie next to it.

    Args:
        what: method, objective or metric.
        folder: where the component goes.

    Raises:
        RecipeError: the name is taken or cannot be one, or a file cannot be written.
    """
    group = GROUPS[what]
    _check(group, name, folder)
    inside = folder.resolve().is_relative_to(PACKAGE)
    root = PACKAGE.parent if inside else folder.resolve().parent
    parts = folder.resolve().relative_to(root).parts
    words = _words(name, ".".join([*parts, name]), "" if inside else parts[-1])
    recipes = packaged() / parts[-1] if inside else root / "recipes"
    tests = root / "tests" / Path(*parts[1:]) if inside else root / "tests"
    files = {
        folder / f"{name}.py": _filled(what, words) if inside else _from_plugin(_filled(what, words)),
        recipes / f"{name}.yaml": _filled(f"{what}_recipe", words),
        (tests if tests.is_dir() or not inside else tests.parent) / f"test_{name}.py": _filled(f"{what}_test", words),
    }
    if not inside and not (folder / "__init__.py").exists():
        files[folder / "__init__.py"] = ""
    for path in files:
        if path.exists():
            raise RecipeError(f"{path} exists already; choose another name")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                f"{path}: cannot be written: {error.strerror}. Give the command in a folder that you may write to, or name the "
                "package in one: --dir FOLDER/my_components"
            ) from error
    return list(files)


def _check(group: str, name: str, folder: Path) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        near = re.sub(r"\W+", "_", name).strip("_").lower()
        hint = f"; try {near}" if re.fullmatch(r"[a-z][a-z0-9_]*", near) and not keyword.iskeyword(near) else ""
        raise RecipeError(f"{name}: a component is called by the stem of its file: small letters, digits and _{hint}")
    if name in registry.names(group):
        raise RecipeError(f"{name}: there is a {group} of that name already: {registry.spec(group, name).path}")
    if name in all_recipes():
        raise RecipeError(f"{name}: there is a recipe of that name already: {all_recipes()[name]}")
    if not folder.name.isidentifier():
        raise RecipeError(f"--dir {folder}: a package's name is letters, digits and _")


def _words(name: str, module: str, package: str) -> dict[str, str]:
    """Return what stands for each `$word` of a skeleton; a package is named where it is a plugin."""
    return {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "module": module,
        "plugins": f"plugins: [{package}]\n" if package else "",
    }


def _filled(skeleton: str, words: dict[str, str]) -> str:
    text = (ASSETS / "skeletons" / f"{skeleton}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(words)


def _from_plugin(text: str) -> str:
    """Return the code of a component with what `llmrecipe.plugin` offers imported from there."""
    offered: set[str] = set()
    lines: list[str] = []
    for line in text.splitlines():
        found = re.fullmatch(r"from (llmrecipe\.\S+|typing) import (.+)", line)
        names = found[2].split(", ") if found else []
        offered |= set(names) & set(plugin.__all__)
        left = [name for name in names if name not in plugin.__all__]
        if found and left:
            lines.append(f"from {found[1]} import {', '.join(left)}")
        elif not found:
            lines.append(line)
    at = next(i for i, line in enumerate(lines) if line.startswith(("class ", "def ", "@"))) - 2
    lines.insert(at, f"from llmrecipe.plugin import {', '.join(sorted(offered))}")
    return re.sub(r"(\n\n)\n+(?=from)", r"\1", "\n".join(lines)) + "\n"
