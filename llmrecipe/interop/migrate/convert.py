"""Reading a configuration of another tool, and writing it as a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.foreign import parse_json
from llmrecipe.interop.migrate import axolotl, llama_factory, torchtune, trl_cli
from llmrecipe.interop.migrate.account import FATES, Account, Entry, Rule, value_at
from llmrecipe.recipe.compose import section_defaults
from llmrecipe.recipe.yaml_file import LARGEST, VALUES, YamlFile, choice_lines, read_yaml, short, write_yaml


@dataclass(frozen=True)
class Tool:
    """A tool whose files are read.

    Attributes:
        title: its name.
        model: key that names the model, which every file of it has.
        rules: its table.
        read: enters every key of a file; returns the objective.
        own: keys that further files of this kind have, by which it is recognised.
    """

    title: str
    model: str
    rules: Mapping[str, Rule]
    read: Callable[[Account, str | None], str]
    own: tuple[str, ...]


TOOLS = {
    "axolotl": Tool("axolotl", "base_model", axolotl.RULES, axolotl.read_axolotl, ("base_model",)),
    "llama_factory": Tool(
        "LLaMA-Factory",
        "model_name_or_path",
        llama_factory.RULES,
        llama_factory.read_llama_factory,
        ("stage", "finetuning_type", "template", "cutoff_len", "dataset", "dataset_dir"),
    ),
    "torchtune": Tool("torchtune", "checkpointer", torchtune.RULES, torchtune.read_torchtune, ("checkpointer", "model")),
    "trl": Tool(
        "TRL", "model_name_or_path", trl_cli.RULES, trl_cli.read_trl, ("dataset_name", "use_peft", "max_length", "datasets")
    ),
}
"""Name behind --from -> tool."""


STAND_IN = "objective.reward"
"""Key of a recipe whose value is never that of the file, where there is one."""


@dataclass
class Migration:
    """A recipe made of another tool's file: its text's parts and what became of every key."""

    tool: str
    source: str
    choices: dict[str, Any]
    settings: dict[str, Any]
    entries: list[Entry]

    def of(self, fate: str) -> list[Entry]:
        """Return the entries of one fate."""
        return [entry for entry in self.entries if entry.fate == fate]

    def facts(self) -> list[dict[str, Any]]:
        """Return the entries as plain values."""
        return [{"key": e.key, "given": e.given, "fate": e.fate, "here": dict(e.here), "note": e.note} for e in self.entries]


def migrate_file(path: Path, tool: str | None = None, trainer: str | None = None, processes: int = 1) -> Migration:
    """Read a configuration of another tool as a recipe.

    Args:
        tool: name of the tool; None recognises it by the keys.
        trainer: command of TRL that the file is for.
        processes: devices it was used on.

    Raises:
        RecipeError: the file cannot be read, belongs to no tool that is known, or holds a value of the wrong type.
    """
    source = _read(path)
    if tool is not None and tool not in TOOLS:
        raise RecipeError(f"--from {tool}: no such tool{did_you_mean(tool, TOOLS)} (known: {', '.join(TOOLS)})")
    if trainer is not None and trainer not in trl_cli.OBJECTIVES:
        known = ", ".join(trl_cli.OBJECTIVES)
        raise RecipeError(
            f"--trainer {trainer}: no such command of TRL{did_you_mean(trainer, trl_cli.OBJECTIVES)} (known: {known})"
        )
    chosen = TOOLS[tool or recognised(source)]
    if source.value.get(chosen.model) is None:
        raise RecipeError(f"{source.where()}: a training file of {chosen.title} has the key {chosen.model}; this one has none")
    account = Account(chosen.title, source, processes)
    chosen.read(account, trainer)
    for key, where in (("model.path", "the model"), ("optim.lr", "the learning rate")):
        if key in account.settings and account.settings[key] is None:
            raise RecipeError(f"{source.where()}: the file does not say {where}")
    account.drop_defaults(lambda path: default_at(account.choices, path))
    return Migration(chosen.title, str(path), account.choices, account.settings, account.entries)


def default_at(choices: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401 (any option's default)
    """Return the default of a key in a recipe that makes these choices, None where the key has none."""
    section, _, rest = path.partition(".")
    name = choices.get(section)
    if section == "stack":
        name, _, rest = rest.partition(".")
    if section in choices and rest:
        option = registry.spec(section, str(name)).options.get(rest.split(".")[0])
        return None if option is None else option.default
    return value_at(section_defaults(), path)


def _read(path: Path) -> YamlFile:
    """Read a YAML or JSON file of bounded size.

    Raises:
        RecipeError: it cannot be read, or holds no mapping.
    """
    if path.suffix != ".json":
        return read_yaml(path)
    try:
        if path.stat().st_size > LARGEST:
            raise RecipeError(f"{short(path)}: larger than {LARGEST >> 20} MB, too large for a configuration")
        value = parse_json(path.read_bytes(), unique=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{short(path)}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(value, dict) or len(value) > VALUES:
        raise RecipeError(
            f"{short(path)}: a configuration is a mapping of keys to values; this file holds {type(value).__name__}"
        )
    return YamlFile(path, value, {})


def recognised(source: YamlFile) -> str:
    """Return the tool a file belongs to: the one that has its decisive keys and knows most of the others.

    Raises:
        RecipeError: no tool has.
    """
    keys = set(source.value)
    if any(isinstance(value, dict) and "_component_" in value for value in source.value.values()):
        return "torchtune"
    scores = {
        name: len(keys & {rule.split(".")[0] for rule in tool.rules}) + 10 * len(keys & set(tool.own))
        for name, tool in TOOLS.items()
        if tool.model in keys
    }
    if not scores:
        marks = ", ".join(f"{tool.title} ({tool.model})" for tool in TOOLS.values())
        raise RecipeError(
            f"{source.where()}: no training file of a tool that is known: {marks}. Its first keys are "
            f"{', '.join(list(source.value)[:6])!r:.200}; name the tool where you know it: --from {'|'.join(TOOLS)}"
        )
    return max(scores, key=lambda name: scores[name])


def migrated_text(found: Migration, word: str) -> str:
    """Return the recipe as YAML, with what is left to do in its comment.

    Args:
        word: what stands behind `recipe=`.
    """
    lines = [_line(f"# Made of a file of {found.tool} by `llmrecipe migrate {Path(found.source).name}`.")]
    lines.append(f"#   llmrecipe check recipe={word}     what would train, memory, warnings")
    for fate in ("left", "unknown"):
        entries = found.of(fate)
        if entries:
            lines.append(f"# {FATES[entries[0].fate]}:")
            lines += [f"#   {_line(entry.key)}: {_line(entry.note)}" for entry in entries]
    if STAND_IN in found.settings:
        lines.append(f"# {STAND_IN} is a stand-in: write what is good for you (`llmrecipe list reward`).")
    chosen: dict[str, Any] = {
        group: found.choices[group] for group in ("objective", "stack", "optim", "schedule") if group in found.choices
    }
    lines += ["defaults:", "  - /base", *choice_lines(chosen), "  - _self_"]
    nested: dict[str, Any] = {}
    for path, value in found.settings.items():
        at = nested
        *sections, last = path.split(".")
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return "\n".join(lines) + "\n" + (write_yaml(nested) if nested else "")


def _line(text: str) -> str:
    """Return a text that cannot leave the comment it stands in."""
    return " ".join(text.split()).encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
