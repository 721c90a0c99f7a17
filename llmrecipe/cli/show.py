"""`llmrecipe show`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmrecipe.cli.arguments import ConfigDir, Json, tell
from llmrecipe.core.console import print_json

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "Look"
ORDER = 3


def complete_names(incomplete: str) -> list[str]:
    """Return the names that `show` accepts."""
    from llmrecipe.core import registry
    from llmrecipe.recipe.recipe_paths import all_recipes

    names = [name for group in registry.groups() for name in registry.names(group)] + list(all_recipes())
    return sorted(name for name in set(names) if name.startswith(incomplete))


def verb(
    name: Annotated[
        str,
        typer.Argument(
            help="A method, objective, optimizer, schedule, recipe, preset, section or part of a model.",
            autocompletion=complete_names,
        ),
    ],
    config_dir: ConfigDir = None,
    as_json: Json = False,
) -> None:
    """Show one card: formula, what is trained, options, limits, paper, recipes."""
    from llmrecipe.recipe.component_card import find_cards
    from llmrecipe.recipe.compose import load_entry_points
    from llmrecipe.recipe.renames import new_group

    load_entry_points()
    notes: list[str] = []
    cards = find_cards(new_group(name, notes))
    tell(notes)
    if as_json:
        print_json(cards[0] if len(cards) == 1 else cards)
        return
    from llmrecipe.core.console import console

    out = console()
    for card in cards:
        _print(out, card)


def _print(out: Console, card: dict[str, Any]) -> None:
    from pathlib import Path

    from rich.text import Text

    from llmrecipe.recipe.yaml_file import short

    family = f", {card['family']}" if card.get("family") else ""
    out.print(Text(f"{card['name']}  ({card['group']}{family})", "bold"))
    out.print(Text(card["doc"].strip()))
    if card.get("options"):
        out.print()
        _print_options(out, card["options"])
    facts = {key: value for key, value in card.get("facts", {}).items() if value not in (None, [], {})}
    if facts:
        out.print()
        for key, value in facts.items():
            out.print(Text(f"{key}: {_fact(value)}"))
    for key in ("extends", "objective", "stack", "optim", "schedule", "recipes", "presets"):
        if card.get(key):
            value = card[key]
            out.print(Text(f"{key}: {', '.join(value) if isinstance(value, list) else value}"))
    for paper in card.get("papers", []):
        out.print(Text(f"paper: https://arxiv.org/abs/{paper}"))
    if card.get("file"):
        out.print(Text(f"source: {short(Path(card['file']))}{':' + str(card['line']) if card.get('line') else ''}", "dim"))
    for part in card.get("parts", []):
        out.print()
        out.print(Text(part["name"], "bold"))
        out.print(Text(part["doc"].strip()))
    if card.get("text"):
        out.print()
        out.print(Text(card["text"].rstrip()))
    out.print()


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} ({reason})" for key, reason in value.items())
    if isinstance(value, list):
        return ", ".join("+".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value)
    return str(value)


def _print_options(out: Console, options: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmrecipe.core.console import value_text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("option", "default", "allowed", "meaning"):
        table.add_column(heading, overflow="fold")
    for option in options:
        default = "(required)" if option["required"] else value_text(option["default"])
        table.add_row(Text(option["name"]), Text(default), Text(option["allowed"]), Text(option["description"]))
    out.print(table)
