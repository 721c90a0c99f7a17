"""What to write instead of a key that is unknown where it stands."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from llmrecipe.core import registry
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.provenance import leaves
from llmrecipe.recipe.recipe_paths import COMPONENT_GROUPS
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.section import Section
from llmrecipe.recipe.yaml_file import KeyPath, dotted

OTHER_TRAINERS = {
    "learning_rate": "optim.lr",
    "batch_size": "batch.size",
    "per_device_train_batch_size": "batch.micro",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "output_dir": "run.dir",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "train_file": "data.path",
    "max_seq_length": "data.max_length",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_dtype": "model.dtype",
    "lora_r": "stack.lora.r",
    "lora_alpha": "stack.lora.alpha",
    "lora_dropout": "stack.lora.dropout",
    "target_modules": "stack.lora.target",
    "warmup": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "warmup_ratio": "schedule.warmup",
    "eval_steps": "eval.every",
    "save_steps": "save.every",
    "save_total_limit": "save.keep",
    "logging_steps": "log.every",
}
"""Names that other trainers give to an option -> the key of a recipe."""
FLAGS = {**OTHER_TRAINERS, "lr": "optim.lr", "model": "model.path", "recipe": "recipe", "resume": "resume"}
"""Names given as a flag, `--NAME` -> the word before the `=`."""
WHICH = ("name", "type", "algorithm")
"""Options that other trainers choose a component by."""


def flag_as_word(flag: str) -> str:
    """Return how a recipe's key that was given as a flag is written, or an empty string for any other flag."""
    name = flag.lstrip("-").replace("-", "_").partition("=")[0]
    section, dot, _ = name.partition(".")
    key = FLAGS.get(name) or (name if dot and section in Recipe.model_fields else _homes().get(name))
    return f"\nKeys of a recipe are words without dashes: {key}=VALUE" if key else ""


def component_as_section(name: str, value: object, recipe: Mapping[str, Any]) -> str:
    """Return the hint for a component's name used as a section, as in `lora.r=8`; an empty string for any other name."""
    places = _components(recipe)
    at = next((place for place, kind in places.items() if name in (place[-1] if place[0] == "stack" else kind, kind)), None)
    if at is None:
        group = next((g for g in COMPONENT_GROUPS if name in registry.names(g)), None)
        if group is None:
            return ""
        names = [str(place[1]) for place in places if place[0] == "stack"]
        choice = f"stack=[{', '.join([*names, name])}]" if group == "stack" else f"{group}={name}"
        at = ("stack", name) if group == "stack" else (group,)
        return f"; {name} is chosen by {choice}, and its options are written {dotted(at)}.OPTION=VALUE"
    if isinstance(value, Mapping) and value:
        return f"; did you mean '{' '.join(as_word((*at, *key), inner) for key, inner in leaves(value))}'?"
    return f"; its options are written {dotted(at)}.OPTION=VALUE"


def elsewhere(name: str, at: KeyPath, recipe: Mapping[str, Any]) -> str:
    """Return where a recipe has an option of this name: in a section, in one of its components, else in another component.

    Args:
        at: where the option was given; it is never suggested.
    """
    if name in WHICH and len(at) == 2 and at[0] in COMPONENT_GROUPS:
        return f"; which {at[0]} it is comes before its options: {at[0]}=NAME"
    kinds = {place: registry.spec(place[0], kind) for place, kind in _components(recipe).items()}
    places = [home for home in (FLAGS.get(name), _homes().get(name)) if home is not None]
    places += [dotted((*place, name)) for place, spec in kinds.items() if name in spec.options]
    places = [place for place in places if place != dotted(at)]
    if places:
        return f"; did you mean '{places[0]}'?"
    for group in sorted(COMPONENT_GROUPS, key=lambda group: group != at[0]):
        owners = [kind for kind in registry.names(group) if name in registry.spec(group, kind).options]
        if owners:
            return f"; it is an option of the {group} {', '.join(owners[:4])}{', ...' if len(owners) > 4 else ''}"
    return ""


def _components(recipe: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """Return (group,) or (stack, entry) -> kind, for every known component of a recipe."""
    stack = recipe.get("stack")
    bodies: dict[tuple[str, ...], Any] = {(group,): recipe.get(group) for group in COMPONENT_GROUPS if group != "stack"}
    bodies |= {("stack", str(name)): body for name, body in (stack.items() if isinstance(stack, Mapping) else ())}
    kinds = {place: str(body.get("kind")) for place, body in bodies.items() if isinstance(body, Mapping)}
    return {place: kind for place, kind in kinds.items() if kind in registry.names(place[0])}


@functools.cache
def _homes() -> dict[str, str]:
    """Return key -> its key path, for keys that are written in the wrong section."""
    found: dict[str, str] = {}
    for section, field in Recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            for name, option in inner.model_fields.items():
                found.setdefault(option.alias or name, f"{section}.{option.alias or name}")
        else:
            found[section] = section
    return found
