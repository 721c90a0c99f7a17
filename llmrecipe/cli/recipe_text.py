"""The text of a recipe that `llmrecipe new --from-data` writes: the comment that says why, and what it sets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llmrecipe.cli.fitted_recipe import USUAL, Fitted

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
        "#",
        f"# format       {detected.name}: {detected.format.summary}{renamed}",
        f"# objective    {found.objective}, because the rows are {what}",
        *([f"#              they can also train {', '.join(found.others)}: --objective NAME"] if found.others else []),
        *(f"# {remark}" for remark in found.remarks),
    ]
    if "model" not in found.settings:
        lines.append("# model        one of its own with fresh weights; a trained one is named by the words")
        lines.append("#              model.path=NAME model.init=pretrained model.config={} tokenizer.path=null")
    elif found.model is None:
        lines.append("# model        the small one inside the package; name yours under model.path (llmrecipe list model),")
        lines.append(
            "#              with 0.5 billion parameters and more it wants a smaller optim.lr: 1e-4 to 2e-4 for a LoRA,"
        )
        lines.append("#              1e-5 where every weight trains")
    lines += ["defaults:", f"  - /{found.parent}", *choice_lines(found.choices), "  - _self_"]
    for section, body in found.settings.items():
        lines += _section(section, body)
    return "\n".join(lines) + "\n"


def choice_lines(choices: Mapping[str, str | list[str]]) -> list[str]:
    """Return lines of a defaults list: what is chosen of each group instead of the extended recipe's.

    Examples:
        >>> choice_lines({"objective": "dpo", "stack": ["nf4", "lora"]})
        ['  - override /objective: dpo', '  - override /stack: [nf4, lora]']
    """
    return [f"  - override /{group}: {_flow(value)}" for group, value in choices.items()]


def _section(name: str, body: dict[str, Any]) -> list[str]:
    """Return a section: one line where it is short, else a line for each key."""
    flow = f"{name}: {_flow(body)}"
    return [flow] if len(flow) <= 80 else [f"{name}:", *(f"  {key}: {_flow(value)}" for key, value in body.items())]


def _flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value.lower() not in YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n", ".", "..")
"""Plain words that YAML reads as something else than text."""


def free_name(stem: str) -> str:
    """Return a name for a recipe after a file: letters, digits and _, and no packaged recipe's.

    Examples:
        >>> free_name("my rows-v2"), free_name("sft"), free_name("2024")
        ('my_rows_v2', 'sft_rows', 'rows_2024')
    """
    from llmrecipe.recipe.recipe_paths import packaged, recipes_in

    name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower() or "rows"
    name = name if name[0].isalpha() else f"rows_{name}"
    taken = {path.stem for path in recipes_in(packaged()).values()}
    return f"{name}_rows" if name in taken else name
