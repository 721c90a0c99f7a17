"""`llmrecipe docs`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrecipe.cli.doc_pages import ORDER as TOPICS
from llmrecipe.cli.doc_pages import find_sections, page_text, page_title

PANEL = "Look"
ORDER = 0


def complete_topic(incomplete: str) -> list[str]:
    """Return the topics that begin so."""
    return [topic for topic in TOPICS if topic.startswith(incomplete)]


def verb(
    topic: Annotated[
        str | None,
        typer.Argument(help="A page; without it, the list of pages.", autocompletion=complete_topic, show_default=False),
    ] = None,
    words: Annotated[
        str | None, typer.Option("--search", help="List the sections that contain these words.", show_default=False)
    ] = None,
) -> None:
    """Read the documentation, offline: a tutorial, one page per question, every recipe and every key."""
    from rich.markdown import Markdown
    from rich.table import Table

    from llmrecipe.core.console import console
    from llmrecipe.core.errors import RecipeError

    out = console()
    if words is not None:
        found = find_sections(words.split())
        if not found:
            raise RecipeError(f"docs: no section contains '{words}'; fewer words find more")
        table = Table(box=None, show_header=False, pad_edge=False)
        for section in found:
            table.add_row(section.topic, section.heading)
        out.print(table)
        return
    if topic is not None:
        out.print(Markdown(page_text(topic), hyperlinks=False))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name in TOPICS:
        table.add_row(name, page_title(name))
    out.print(table)
    out.print("llmrecipe docs PAGE shows one; llmrecipe docs --search WORDS finds sections")
