"""The text of a recipe that `llmrecipe new --from-data` writes: the comment that says why, and what it sets."""

from __future__ import annotations

from typing import Any

from llmrecipe.cli.fitted import Fitted
from llmrecipe.cli.fitted_recipe import USUAL
from llmrecipe.recipe.yaml_file import choice_lines, flow_text

SCHEMA = "recipe.schema.json"
"""File of the JSON Schema, next to the recipe, for editors."""


def recipe_text(found: Fitted, word: str) -> str:
    """Return the recipe as YAML with its comment.

    Args:
        word: what stands behind `recipe=`.
    """
    detected = found.reading.found
    renamed = "".join(f", {wanted} <- {column}" for wanted, column in found.settings["data"].get("columns", {}).items())
    what = USUAL.get(found.reading.rows, ("", detected.format.summary))[1]
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# {found.name}: {found.objective} on {found.file}, fitted to its {found.rows:,} rows.",
        f"#   llmrecipe data recipe={word}      look first: rows as the model sees them, «trained» and masked",
        f"#   llmrecipe check recipe={word}     what would train, memory, warnings",
        f"#   llmrecipe train recipe={word}",
        *([f'#   llmrecipe chat RUN --prompt "{found.question}"      a row it was trained on'] if found.question else []),
        "#",
        f"# format       {detected.name}: {detected.format.summary}{renamed}",
        f"# objective    {found.objective}, because the rows are {what}",
        *([f"#              they can also train {', '.join(found.others)}: --objective NAME"] if found.others else []),
        *(f"# {remark}" for remark in found.remarks),
    ]
    if "model" not in found.settings and "model" not in found.choices:
        lines.append("# model        one of its own with fresh weights; a trained one is named by the words")
        lines.append("#              model.path=NAME model.init=pretrained model.config={} tokenizer.path=null")
    elif found.model is None:
        lines.append(
            "# model        the small one inside the package; for another have the recipe written again with --model: a"
        )
        lines.append(
            "#              folder, a hub name or one of `llmrecipe list model`; rate, epochs, what trains follow its size"
        )
    lines += ["defaults:", f"  - /{found.parent}", *choice_lines(found.choices), "  - _self_"]
    for section, body in found.settings.items():
        lines += _section(section, body) if isinstance(body, dict) else [f"{section}: {flow_text(body)}"]
    return "\n".join(lines) + "\n"


def _section(name: str, body: dict[str, Any]) -> list[str]:
    """Return a section: one line where it is short, else a line for each key."""
    flow = f"{name}: {flow_text(body)}"
    return [flow] if len(flow) <= 80 else [f"{name}:", *(f"  {key}: {flow_text(value)}" for key, value in body.items())]
