"""From a recipe's name and the overrides of the command line to one complete mapping, with the origin of every value.

find the file -> read it and what it extends -> Hydra merges components, presets and files -> axes that follow the registry
-> overrides -> defaults of sections and components -> interpolation -> validation
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.redact import name_variables
from llmrecipe.recipe.builtin_data import drop_builtin
from llmrecipe.recipe.inheritance import DefaultsChain, group_folder
from llmrecipe.recipe.interpolation import escape, interpolate
from llmrecipe.recipe.provenance import Origin, Origins, leaves, schema_origin
from llmrecipe.recipe.recipe_paths import GROUPS, adjacent_presets, find_recipe
from llmrecipe.recipe.registered_axes import fill
from llmrecipe.recipe.renames import rename_in_place
from llmrecipe.recipe.rights import withhold
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.yaml_file import short, write_yaml

if TYPE_CHECKING:
    from llmrecipe.recipe.overrides import Word


@dataclass(frozen=True)
class Composition:
    """A composed and validated recipe."""

    name: str
    """The recipe's stem, used in the name of the run directory."""
    path: Path
    """The recipe's file."""
    overrides: list[str]
    """The overrides of the command line."""
    mapping: dict[str, Any]
    """Every key with its value, defaults included; written as YAML it is again a recipe."""
    origins: Origins
    """Key path -> where its value comes from."""
    recipe: Recipe
    """The validated view."""
    notes: list[str] = field(default_factory=list)
    """One line for everything that was dropped: its component or its built-in rows were replaced, or it is a right only the
    user gives."""
    foreign: bool = False
    """Whether one of its files belongs to an artefact that is being opened (see `recipe.rights`)."""


def compose(recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), *, foreign: bool = False) -> Composition:
    """Compose and validate a recipe.

    Args:
        recipe: a name in the search path (`dpo_lora`, `alignment/dpo_lora`), a YAML file, or a run directory.
        overrides: words such as `optim.lr=1e-4`, `stack=[nf4,lora]`, `~stack.lora`, or a mapping of keys to values such as
            `{"optim.lr": 1e-4, "stack": ["nf4", "lora"]}`.
        foreign: the recipe belongs to an artefact that is being opened; a file in a run or a model folder always does.

    Raises:
        RecipeError: everything that is wrong, in one message.
    """
    from llmrecipe.recipe.validate import validate

    if not isinstance(recipe, str | Path):
        raise RecipeError(
            "compose: the first argument is a recipe by name, file or run directory, and overrides are the second, as in "
            f"compose('sft_lora', {{'steps': 10}}); got {recipe!r:.80}"
        )
    words = words_of(overrides)
    name, path, mapping, origins, notes, foreign = compose_mapping(recipe, words, foreign)
    name_variables(mapping)
    _refuse_unnamed_plugins(mapping)
    return Composition(name, path, words, mapping, origins, validate(mapping, origins), notes, foreign)


def words_of(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return overrides as override words.

    Raises:
        RecipeError: they are neither a list of words nor a mapping of keys to values.
    """
    from llmrecipe.recipe.overrides import as_word

    given: list[Any] = list(overrides) if isinstance(overrides, Iterable) else []
    if isinstance(overrides, str) or not isinstance(overrides, Iterable) or not all(isinstance(key, str) for key in given):
        raise RecipeError(
            "compose: overrides are a list of words such as ['optim.lr=1e-4', 'stack=[nf4,lora]'], or a mapping such as "
            f"{{'optim.lr': 1e-4, 'stack': ['nf4', 'lora']}}; got {overrides!r:.80}"
        )
    return [as_word((key,), overrides[key]) for key in given] if isinstance(overrides, Mapping) else given


def compose_mapping(
    recipe: str | Path, overrides: list[str], foreign: bool = False
) -> tuple[str, Path, dict[str, Any], Origins, list[str], bool]:
    """Return name, file, complete mapping, origins and notes of a recipe, and whether one of its files is foreign.

    The mapping is not validated yet.
    """
    path = find_recipe(recipe)
    words, picks = _own_groups(path, overrides)
    chain = DefaultsChain(path, foreign or Path(recipe).expanduser().is_dir(), picks)
    with adjacent_presets(chain.folders()):
        return _merged(path, chain, words)


def _own_groups(path: Path, overrides: list[str]) -> tuple[list[Word], dict[str, Any]]:
    """Split overrides into words, and choices for groups of the user's own (see `recipe.inheritance`)."""
    from llmrecipe.recipe.overrides import parse_overrides

    words: list[Word] = []
    picks: dict[str, Any] = {}
    for word in parse_overrides(overrides):
        name = str(word.key[0])
        is_choice = len(word.key) == 1 and not word.delete and isinstance(word.value, str | list | None)
        if is_choice and name not in {*GROUPS, *section_defaults()} and group_folder(name, [path.resolve().parent]) is not None:
            picks[name] = word.value
        else:
            words.append(word)
    return words, picks


def _merged(path: Path, chain: DefaultsChain, words: list[Word]) -> tuple[str, Path, dict[str, Any], Origins, list[str], bool]:
    """Merge a defaults chain with overrides and complete the result."""
    from llmrecipe.recipe.hydra_compose import merge, refused_choices
    from llmrecipe.recipe.overrides import apply, chosen, hydra_words
    from llmrecipe.recipe.stale_overrides import Cleaner

    _open_plugins(chain, words)
    choices = [(str(w.key[0]), w.value, f"'{w.text}'") for w in words if w.choice]
    for link in chain.links.values():
        choices += [(group, choice, f"{short(link.source.path)}:{line}") for group, (choice, line) in link.choices.items()]
    wrong = [message for choice in choices for message in refused_choices(*choice)]
    if wrong:
        raise RecipeError("\n".join(wrong))
    chain.place({group: word.value for group, word in chosen(words).items()})
    composed = merge(chain, hydra_words(words))
    mapping, origins = composed.mapping, composed.origins
    mapping.pop("defaults", None)
    renames = chain.notes
    rename_in_place(mapping, origins, renames)
    fill(mapping, origins)
    apply(words, mapping, origins, renames)
    rename_in_place(mapping, origins, renames)
    _mark_choices(chain, words, mapping, origins)
    notes = [*dict.fromkeys(renames), *drop_builtin(mapping, origins, chain)]
    cleaner = Cleaner(mapping, origins, chain, words)
    cleaner.clean()
    whole = _complete(mapping, origins)
    _store_name(path, whole, origins)
    resolved = interpolate(whole, origins)
    notes, foreign = [*notes, *cleaner.notes], any(link.foreign for link in chain.links.values())
    if foreign:
        notes += withhold(resolved, origins, chain.own_files(set(chosen(words))))
    return _store_name(path, resolved, origins), path, resolved, origins, notes, foreign


def load_entry_points() -> None:
    """Register the components of installed packages that declare an entry point in the group `llmrecipe.plugins`."""
    for point in entry_points(group="llmrecipe.plugins"):
        registry.add_plugin(point.value)


def _open_plugins(chain: DefaultsChain, words: list[Word]) -> None:
    load_entry_points()
    for package in _plugins(chain, words):
        registry.add_plugin(package)


def _refuse_unnamed_plugins(mapping: Mapping[str, Any]) -> None:
    """Refuse a component of a plugin that the recipe does not name, though something earlier in this process has opened it.

    In a process of its own the recipe would know no such component.

    Raises:
        RecipeError: naming the component's key and the package.
    """
    given = [point.value for point in entry_points(group="llmrecipe.plugins")]
    listed = mapping.get("plugins")
    named = {*given, *(map(str, listed) if isinstance(listed, list) else ())}
    stack = mapping.get("stack")
    entries = {f"stack.{name}": body for name, body in stack.items()} if isinstance(stack, Mapping) else {}
    bodies: dict[str, Any] = {group: mapping.get(group) for group in ("objective", "optim", "schedule")} | entries
    for at, body in bodies.items():
        kind, group = body.get("kind") if isinstance(body, Mapping) else None, at.partition(".")[0]
        if not isinstance(kind, str) or kind not in registry.names(group):
            continue
        module = registry.spec(group, kind).module
        package = next((name for name, _ in registry.plugins() if module.startswith(f"{name}.")), None)
        if package is not None and package not in named:
            raise RecipeError(
                f"{at}: {kind} comes from the package '{package}', which this recipe does not name; add it: plugins=[{package}]"
            )


def _plugins(chain: DefaultsChain, words: list[Word]) -> list[str]:
    named = chain.plugins()
    for word in words:
        if word.key == ("plugins",) and isinstance(word.value, list):
            named = [str(v) for v in word.value]
    return named


def plugins_of(recipe: str | Path, overrides: Sequence[str]) -> list[str]:
    """Return the plugins that a recipe and its overrides name, without composing it.

    Raises:
        RecipeError: there is no such recipe, or an override cannot be read.
    """
    path = find_recipe(recipe)
    words, picks = _own_groups(path, list(overrides))
    return _plugins(DefaultsChain(path, False, picks), words)


def _mark_choices(chain: DefaultsChain, words: list[Word], mapping: dict[str, Any], origins: Origins) -> None:
    """Record that a component's `kind` comes from the defaults list or the override that chose it, not from its own file.

    A choice in an outer file also takes precedence over a kind named in the body of an inner one.
    """
    for group in ("objective", "optim", "schedule"):
        at = (group, "kind")
        holder = chain.holder(chain.primary.id, group)
        origin = origins.get(at)
        inner = [link.source.path for link in chain.below(holder)] if holder else []
        if holder and origin and origin.kind == "file" and origin.file in inner and isinstance(mapping.get(group), dict):
            mapping[group]["kind"] = holder.choices[group][0]
            origins[at] = Origin("file", holder.source.path, holder.choices[group][1])
        elif origin and origin.kind == "default":
            origins[at] = _choice_origin(chain, words, group) or origin
    for name in mapping.get("stack") or {}:
        place = ("stack", str(name), "kind")
        if place in origins and origins[place].kind == "default":
            origins[place] = _choice_origin(chain, words, "stack") or origins[place]


def _choice_origin(chain: DefaultsChain, words: list[Word], group: str) -> Origin | None:
    for word in reversed(words):
        if word.choice and word.key[0] == group:
            return Origin("override", word=word.text)
    holder = chain.holder(chain.primary.id, group)
    return Origin("file", holder.source.path, holder.choices[group][1]) if holder else None


def section_defaults() -> dict[str, Any]:
    """Return every key outside components with its default, as fresh objects: a composition may change its own."""
    return copy.deepcopy(_section_defaults())


@functools.cache
def _section_defaults() -> dict[str, Any]:
    return Recipe.model_validate({}).model_dump(mode="json", by_alias=True)


def _complete(mapping: dict[str, Any], origins: Origins) -> dict[str, Any]:
    """Complete a mapping and its origins with the defaults of sections, in the order of the schema; unknown keys last."""
    whole: dict[str, Any] = {}
    for key, default in section_defaults().items():
        given = mapping.get(key, default)
        is_section = isinstance(default, dict) and bool(default)
        if is_section and isinstance(given, dict):
            whole[key] = {**default, **given}
        else:
            whole[key] = given
        for inner, _ in leaves(default, (key,)):
            if key not in mapping or (is_section and isinstance(given, dict) and inner[1] not in given):
                origins.setdefault(inner, schema_origin(inner))
    return {**whole, **{k: v for k, v in mapping.items() if k not in whole}}


def _store_name(path: Path, mapping: dict[str, Any], origins: Origins) -> str:
    """Store `run.name`, by default the recipe's stem, so that a run's recipe.yaml keeps the name; return it."""
    run = mapping.get("run")
    if not isinstance(run, dict):
        return path.stem
    if run.get("name") is None:
        run["name"] = path.stem
        origins[("run", "name")] = Origin("file", path, 1)
    return str(run["name"])


def to_yaml(mapping: dict[str, Any]) -> str:
    """Return a composed mapping as text that reads back as the same recipe."""
    return write_yaml(escape(mapping))
