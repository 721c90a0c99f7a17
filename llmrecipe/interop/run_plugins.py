"""The plugins of a finished run, imported before anything of it is loaded."""

from __future__ import annotations

from llmrecipe.core import registry
from llmrecipe.core.lazy import is_installed
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.recipe.compose import load_entry_points
from llmrecipe.recipe.yaml_file import read_yaml


def open_plugins_of(path: str) -> None:
    """Also know the components of the plugins that the recipe of a run names, and of those that announce themselves.

    A named package that is not installed is passed over: a run that needs none of its components can be loaded without it.
    """
    load_entry_points()
    folder = run_folder(path)
    for recipe in [] if folder is None else [folder / "recipe.yaml", folder.parent / "recipe.yaml"]:
        named = read_yaml(recipe).value.get("plugins") if recipe.is_file() else None
        for package in named if isinstance(named, list) else []:
            if isinstance(package, str) and is_installed(package):
                registry.add_plugin(package)
