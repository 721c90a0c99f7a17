"""`llmrecipe list`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmrecipe.cli.arguments import ConfigDir, Json, tell
from llmrecipe.core.console import print_json

PANEL = "Look"
ORDER = 2


def verb(
    group: Annotated[
        str | None, typer.Argument(help="stack, objective, optim, schedule, recipes, model, ...", show_default=False)
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Which wrappers may share a stack, and why not.")] = False,
    config_dir: ConfigDir = None,
    as_json: Json = False,
) -> None:
    """List what there is: methods, objectives, optimizers, schedules, recipes, presets."""
    if pairs:
        show_pairs(as_json)
        return
    from llmrecipe.recipe.renames import new_group

    notes: list[str] = []
    rows = collect(None if group is None else new_group(group, notes))
    tell(notes)
    if as_json:
        print_json(rows)
        return
    from rich.table import Table
    from rich.text import Text

    from llmrecipe.core.console import console

    out = console()
    for name in dict.fromkeys(row["group"] for row in rows):
        table = Table(box=None, pad_edge=False, title=name, title_justify="left", title_style="bold", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for row in (r for r in rows if r["group"] == name):
            table.add_row(row["name"], row["family"], Text(row["summary"]))
        out.print(table)
        out.print()


def show_pairs(as_json: bool) -> None:
    """Print the refused pairs with their reasons, and how many train."""
    from dataclasses import asdict

    from llmrecipe.recipe.compatibility import pairs as all_pairs

    found = all_pairs()
    if as_json:
        print_json([asdict(pair) for pair in found])
        return
    from rich.table import Table

    from llmrecipe.core.console import console

    refused = [pair for pair in found if pair.reason]
    out = console()
    trained = len(found) - len(refused)
    out.print(f"{trained} of {len(found)} pairs of wrappers train together with their default options; refused:")
    table = Table("one", "other", "why not", box=None, header_style="bold")
    for pair in refused:
        table.add_row(pair.first, pair.second, pair.reason)
    out.print(table)


def collect(group: str | None) -> list[dict[str, Any]]:
    """Collect facts of everything in a group, or in all groups.

    Raises:
        RecipeError: there is no such group.
    """
    from llmrecipe.core import registry
    from llmrecipe.core.errors import RecipeError, did_you_mean
    from llmrecipe.recipe.component_card import headline
    from llmrecipe.recipe.compose import load_entry_points
    from llmrecipe.recipe.recipe_paths import PRESET_GROUPS, all_recipes, presets

    load_entry_points()
    known = list(dict.fromkeys([*registry.groups(), *PRESET_GROUPS, "recipes"]))
    if group is not None and group not in known:
        raise RecipeError(f"list: there is no group '{group}'{did_you_mean(group, known)} (groups: {', '.join(known)})")
    rows: list[dict[str, Any]] = []
    for each in known if group is None else [group]:
        for name in registry.names(each):
            spec = registry.spec(each, name)
            facts = {"file": str(spec.path), "papers": spec.papers}
            rows.append({"group": each, "name": name, "family": spec.family, "summary": spec.summary, **facts})
        files = all_recipes() if each == "recipes" else presets(each)
        for name, path in files.items():
            family = path.parent.name if each == "recipes" else "preset"
            rows.append(
                {"group": each, "name": name, "family": family, "summary": headline(path), "file": str(path), "papers": []}
            )
    return rows
