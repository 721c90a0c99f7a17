"""The model card written into the folder of a finished run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrecipe.core.score_intervals import shown
from llmrecipe.methods._base.stack import Stack, kind_name

if TYPE_CHECKING:
    from torch import nn


def model_card(
    name: str, base: str, objective: object, stack: Stack, model: nn.Module, data: str, metrics: dict[str, Any]
) -> str:
    """Return Markdown: what was trained from what, how, and what it scored.

    Args:
        base: path or hub name of the base model.
        data: the rows it was trained on, in words.
    """
    methods = ", ".join(f"{w.name} ({kind_name(w)})" for w in stack) or "none: every weight was trained"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    values = shown(metrics, lambda value: f"{value:.6g}" if isinstance(value, float) else str(value))
    rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    return (
        f"# {name}\n\n"
        f"Trained with llmrecipe from `{base}`.\n\n"
        f"- objective: {kind_name(objective)}\n"
        f"- stack: {methods}\n"
        f"- trained parameters: {trained:,} of {total:,}\n"
        f"- data: {data}\n"
        f"- steps: {metrics['steps']}\n\n"
        f"| metric | value |\n| --- | --- |\n{rows}\n\n"
        "Use it:\n\n"
        "```\nllmrecipe chat RUN_DIR\nllmrecipe export RUN_DIR --to merged\n```\n"
    )
