"""`llmrecipe check`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from llmrecipe.cli.words import Json, Words, need_recipe, sort_words, tell
from llmrecipe.console import console, print_json

if TYPE_CHECKING:
    from llmrecipe.training.check import Findings

PANEL = "Train"
ORDER = 2


def verb(words: Words = None, as_json: Json = False) -> None:
    """Validate a recipe and build it without weights: stack order, trained tensors, memory, data."""
    request = sort_words(words)
    recipe = need_recipe(request, "check")
    from llmrecipe.cli.preflight import composed

    # Mistakes in the recipe come first, before anything about the machine or the model.
    composition = composed(recipe, request.overrides)
    if composition.recipe.stages:
        from llmrecipe.cli.pipeline import check_pipeline

        check_pipeline(composition, as_json)
        return
    tell(composition.notes)
    from llmrecipe.training.check import examine

    found = examine(composition)
    print_json(asdict(found)) if as_json else show_findings(found)


def show_findings(found: Findings) -> None:
    """Print what a recipe would do."""
    from rich.table import Table

    out = console()
    size = f"{found.steps} steps, {found.rows} rows, {found.tokens_per_step} tokens a step"
    out.print(f"[bold]{found.recipe}[/bold]: {found.objective}, {size}")
    names = [f"{w['name']} ({w['kind']}, {w['stage'].lower()})" for w in found.stack]
    out.print("stack: " + (" -> ".join(names) or "none, every weight trains"))
    out.print(f"parameters: {found.parameters:,}; trained: {found.trained:,} ({found.trained / max(found.parameters, 1):.2%})")
    if found.groups:
        table = Table(*found.groups[0], box=None, header_style="bold")
        for row in found.groups:
            table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
        out.print(table)
    out.print("memory (MB): " + ", ".join(f"{name} {size:g}" for name, size in found.memory_mb.items()))
    out.print(f"saved: {found.delta_bytes / 2**20:.1f} MB of learned tensors a checkpoint")
    out.print(f"time: about {found.seconds:.0f} s at this machine's float32 matmul rate, plus evaluation")
    for note in found.notes:
        out.print(f"note: {note}")
