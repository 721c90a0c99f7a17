"""Options that name components of a registry group (`core.option_types.registered`): checked, and listed for readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from llmrecipe.core import registry
from llmrecipe.core.errors import did_you_mean
from llmrecipe.recipe.yaml_file import KeyPath


def allowed_names(mark: dict[str, Any]) -> list[str]:
    """Return the words that an option with this mark may have, those of plugins included."""
    return [*mark["others"], *registry.names(mark["group"])]


def unknown_names(model: BaseModel, at: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield (key, message) for every option of a validated model, or of a section in it, that names no component."""
    for name, field in type(model).model_fields.items():
        value, key = getattr(model, name), (*at, field.alias or name)
        extra = field.json_schema_extra
        mark: Any = extra.get("registered") if isinstance(extra, dict) else None
        if isinstance(value, BaseModel):
            yield from unknown_names(value, key)
        elif mark is not None and not mark["open"] and value is not None:
            known = allowed_names(mark)
            for word in [value] if isinstance(value, str) else value:
                if word not in known:
                    near = did_you_mean(word, known)
                    yield key, f"there is no {mark['group']} '{word}'{near} (known: {', '.join(known)})"


def list_names(schema: dict[str, Any]) -> None:
    """Replace the mark in the JSON schema of an option by the names themselves."""
    mark = schema.pop("registered", None)
    if mark is None:
        return
    names = allowed_names(mark)
    if mark["open"]:
        schema["examples"] = names
    elif schema.get("type") == "array":
        schema["items"] = {"type": "string", "enum": names}
    else:
        schema["enum"] = names
