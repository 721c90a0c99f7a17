"""The generated parts of the documentation: methods, recipes, keys and data formats, from what is registered.

`python -m llmrecipe.cli.doc_tables` (`make docs`) writes each between its two markers (`NAME: begin`, `NAME: end`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llmrecipe.cli.doc_pages import FOLDER
from llmrecipe.core import registry
from llmrecipe.data.formats.mismatch import objectives_for
from llmrecipe.recipe.component_card import headline, section_card
from llmrecipe.recipe.recipe_paths import packaged, recipes_in
from llmrecipe.recipe.schema import Recipe

if TYPE_CHECKING:
    from llmrecipe.data.formats.data_format import DataFormat


GROUPS = (("objective", "Objectives"), ("stack", "Wrappers"))


def cell(text: object) -> str:
    """Return a text as one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def methods_table() -> str:
    """Return a Markdown table with one row per method, by family, with a description and its paper."""
    lines: list[str] = []
    for group, title in GROUPS:
        lines += [f"**{title}**", "", "| family | name | what it is | paper |", "| --- | --- | --- | --- |"]
        specs = sorted((registry.spec(group, name) for name in registry.names(group)), key=lambda s: (s.family, s.name))
        for spec in specs:
            papers = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in spec.papers[:2])
            summary = spec.summary.partition(": ")
            text = (summary[0] if summary[1] else spec.summary).rstrip(".").replace("|", "\\|")
            lines.append(f"| {spec.family} | `{spec.name}` | {text} | {papers} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def keys_table() -> str:
    """Return a section for each top-level key of a recipe: keys, types, defaults and meanings."""
    lines: list[str] = []
    for name in Recipe.model_fields:
        card = section_card(name)
        lines += [f"## {name}", "", card["doc"].strip(), ""]
        if card["options"]:
            lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for option in card["options"]:
            default = "required" if option["required"] else f"`{_default(option['default'])}`"
            lines.append(
                f"| `{name}.{option['name']}` | {cell(option['allowed'])} | {default} | {cell(option['description'])} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _default(value: object) -> str:
    return json.dumps(value, default=lambda section: section.model_dump(mode="json", by_alias=True))


def recipes_table() -> str:
    """Return a table of the packaged recipes for each family: name, and the first line of the recipe's comment."""
    families: dict[str, list[str]] = {}
    for path in sorted(recipes_in(packaged()).values(), key=lambda p: p.stem):
        families.setdefault(path.parent.name, []).append(f"| `{path.stem}` | {cell(headline(path))} |")
    lines: list[str] = []
    for family, rows in sorted(families.items()):
        if family != packaged().name:
            lines += [f"## {family}", "", "| recipe | what it does |", "| --- | --- |", *rows, ""]
    return "\n".join(lines).rstrip()


def formats_table() -> str:
    """Return a section for each data format: what a row is, a row of it, its columns and the objectives that read it."""
    lines: list[str] = []
    for name in registry.names("format"):
        kind: type[DataFormat] = registry.load_class("format", name)
        columns = " or ".join(", ".join(f"`{column}`" for column in names) for names in kind.columns)
        readers = [f"`{objective}`" for objective in objectives_for(name)]
        lines += [f"### {name}", "", registry.spec("format", name).summary, "", "```json", kind.example, "```", ""]
        lines.append(f"Columns: {columns}{_more(kind.optional)}. Objectives: {', '.join(readers) or 'none by itself'}.")
        lines.append("")
    return "\n".join(lines).rstrip()


def _more(optional: tuple[str, ...]) -> str:
    return "".join(f"; optional: `{name}`" for name in optional)


TABLES = {"methods": methods_table, "keys": keys_table, "recipes": recipes_table, "formats": formats_table}


def refreshed(text: str) -> str:
    """Return a page with the current tables between its markers."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = f"{head}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


def refresh_pages() -> None:
    """Write the current tables into the README and every page."""
    for path in (Path("README.md"), *sorted(FOLDER.glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = refreshed(text)
        if new != text:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    refresh_pages()
