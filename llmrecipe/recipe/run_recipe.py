"""What stages inherit from the recipe of their pipeline: `inherit: [model, data, steps]`.

Only values that the pipeline's files or its command line set are inherited, so that a stage keeps its own recipe's values
elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmrecipe.core.errors import did_you_mean
from llmrecipe.recipe.compose import Composition, section_defaults
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.yaml_file import KeyPath, dotted

COMPONENTS = ("objective", "optim", "schedule")
INHERITABLE = tuple(k for k in section_defaults() if k not in ("stages", "search", "plugins", "run", "stack", "roles"))
"""Keys of a recipe that a stage may inherit. Its stack and its roles are its own."""


def inherited(body: object, pipeline: Composition, at: KeyPath) -> tuple[object, list[tuple[KeyPath, str]]]:
    """Return a stage's body with overrides for what it inherits placed before its own, and the mistakes.

    Args:
        body: a stage as written, or a group of stages.
        pipeline: the recipe that contains it.
        at: the stage's key path.
    """
    if not isinstance(body, Mapping):
        return body, []
    if isinstance(body.get("stages"), Mapping):
        pairs = {k: inherited(v, pipeline, (*at, "stages", str(k))) for k, v in body["stages"].items()}
        return {**body, "stages": {k: v for k, (v, _) in pairs.items()}}, [m for _, wrong in pairs.values() for m in wrong]
    if "inherit" not in body or "kind" in body:
        return body, []
    keys, where = body["inherit"], (*at, "inherit")
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        return body, [(where, f"{dotted(where)}: must be a list of keys such as [model, data]; got {keys!r}")]
    unknown = [k for k in keys if k not in INHERITABLE]
    if unknown:
        allowed = ", ".join(INHERITABLE)
        return body, [
            (where, f"{dotted(where)}: '{k}' cannot be inherited{did_you_mean(k, INHERITABLE)} (keys: {allowed})")
            for k in unknown
        ]
    own = body.get("with", [])
    words = [word for key in keys for word in section_words(pipeline, key)]
    rest = {k: v for k, v in body.items() if k != "inherit"}
    return {**rest, "with": [*words, *own]} if isinstance(own, list) else rest, []


def inherited_keys(section: object) -> set[str]:
    """Return every key that any stage inherits."""
    if not isinstance(section, Mapping):
        return set()
    found = {k for k in section.get("inherit", []) if isinstance(k, str)} if isinstance(section.get("inherit"), list) else set()
    return found.union(*(inherited_keys(v) for v in section.values()))


def section_words(pipeline: Composition, key: str) -> list[str]:
    """Return the overrides for what a recipe sets under one of its keys."""
    value = pipeline.mapping.get(key)
    if not isinstance(value, Mapping):
        return [as_word((key,), value)] if _is_set(pipeline, (key,)) else []
    words = [as_word((key, inner), v) for inner, v in value.items() if inner != "kind" and _is_set(pipeline, (key, str(inner)))]
    return [f"{key}={value['kind']}", *words] if key in COMPONENTS and "kind" in value else words


def _is_set(pipeline: Composition, key: KeyPath) -> bool:
    """Return whether a file or an override set the value, or one below it."""
    return any(k[: len(key)] == key and origin.kind != "default" for k, origin in pipeline.origins.items())
