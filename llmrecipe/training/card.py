"""The model card written beside a finished run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrecipe.methods.stack import kind_name

if TYPE_CHECKING:
    from llmrecipe.training.run import Run


def model_card(run: Run, metrics: dict[str, Any]) -> str:
    """Markdown: what was trained from what, how, and what it scored."""
    stack = ", ".join(f"{w.name} ({kind_name(w)})" for w in run.stack) or "none: every weight was trained"
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.model.parameters())
    values = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in metrics.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    return (
        f"# {run.composition.name}\n\n"
        f"Trained with llmrecipe from `{run.opened.section.path}`.\n\n"
        f"- objective: {kind_name(run.objective)}\n"
        f"- stack: {stack}\n"
        f"- trained parameters: {trained:,} of {total:,}\n"
        f"- data: {run.recipe.data.path} ({len(run.data):,} rows)\n"
        f"- steps: {run.progress.step}\n\n"
        f"| metric | value |\n| --- | --- |\n{rows}\n\n"
        "Use it:\n\n"
        "```\nllmrecipe chat RUN_DIR\nllmrecipe export RUN_DIR --to merged\n```\n"
    )
