"""`llmrecipe migrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose
from llmrecipe.core.console import console, print_json, say, value_text

if TYPE_CHECKING:
    from llmrecipe.interop.migrate.account import Entry
    from llmrecipe.interop.migrate.convert import Migration
    from llmrecipe.recipe.rewrite import Rewritten

PANEL = "Tools"
ORDER = 2


def verb(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Configuration of axolotl, LLaMA-Factory, TRL or torchtune; or an old recipe."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PATH", help="Recipe to write; default: recipes/NAME.yaml.")
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option("--from", metavar="TOOL", help="axolotl, llama_factory, torchtune or trl; default: seen from the keys."),
    ] = None,
    trainer: Annotated[
        str | None, typer.Option("--trainer", metavar="NAME", help="Command of TRL the file is for: sft, dpo, kto, reward, ...")
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", metavar="N", min=1, max=1 << 20, help="Devices the file was used on.")
    ] = 1,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write another tool's configuration as a recipe, and say what became of each of its keys.

    A recipe of llmrecipe itself that has words with newer names is written in the new ones.
    """
    from llmrecipe.cli.recipe_file import free_name, recipe_word, write_recipe
    from llmrecipe.core.errors import RecipeError
    from llmrecipe.interop.migrate.convert import migrate_file, migrated_text
    from llmrecipe.recipe.compose import compose, load_entry_points
    from llmrecipe.recipe.rewrite import rewrite_recipe

    load_entry_points()
    own = rewrite_recipe(file) if tool is None and file.suffix in (".yaml", ".yml") else None
    found = None if own is not None else migrate_file(file, tool, trainer, processes)
    path = out or Path("recipes") / f"{free_name(file.name.split('.')[0])}.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"--out {path}: a recipe's name ends in .yaml")
    if path.exists():
        raise RecipeError(f"{path} exists already; choose another name: --out PATH")
    word = recipe_word(path)
    if own is not None:
        write_recipe(path, own.text)
        print_json({"recipe": str(path), "tool": "llmrecipe", "renamed": own.notes}) if as_json else _show_renamed(own, path)
        return
    assert found is not None
    write_recipe(path, migrated_text(found, word))
    try:
        compose(path)
    except RecipeError as error:
        path.unlink()
        raise RecipeError(f"{file}: a value that no recipe can have:\n{error}") from error
    if as_json:
        print_json({"recipe": str(path), "tool": found.tool, "keys": found.facts()})
        return
    _show(found)
    say(f"wrote {path}; next: llmrecipe check recipe={word}, then llmrecipe data recipe={word}")


def _show_renamed(found: Rewritten, path: Path) -> None:
    for note in found.notes:
        say(note)
    say(f"wrote {path}; nothing else in it has changed")


def _show(found: Migration) -> None:
    """Print the account, one table a fate, what needs a person last."""
    from rich.table import Table

    from llmrecipe.interop.migrate.account import FATES

    say(f"{found.source}: a file of {found.tool}")
    out = console()
    for fate, heading in FATES.items():
        entries = found.of(fate)
        if not entries:
            continue
        say(f"\n{heading} ({len(entries)}):")
        table = Table("there", "here", "note", box=None, header_style="bold", pad_edge=False)
        for entry in entries:
            table.add_row(_there(entry), ", ".join(f"{key} = {value_text(value)}" for key, value in entry.here), entry.note)
        out.print(table)
    say("")


def _there(entry: Entry) -> str:
    return entry.key if entry.given is None else f"{entry.key}: {value_text(entry.given):.60}"
