"""Completing the components of a composed mapping: add defaults of the chosen kind, remove stale overrides of a replaced one.

A recipe that says `objective: {beta: 0.3}` for DPO leaves `beta` behind when the command line says `objective=sft`.
Such a value is dropped with a one-line notice. A key that no kind knows stays, for validation to refuse.
A value is kept where the option means the same in both kinds: same name, type and default (`clip` of two optimizers,
but not the learning rate of AdamW for Lion).
"""

from __future__ import annotations

from typing import Any

from llmrecipe.core import registry
from llmrecipe.recipe.inheritance import Choice, DefaultsChain
from llmrecipe.recipe.overrides import Word, chosen
from llmrecipe.recipe.provenance import Origin, Origins, forget, origin_of
from llmrecipe.recipe.recipe_paths import presets
from llmrecipe.recipe.yaml_file import KeyPath, dotted, read_yaml


class Cleaner:
    """Completes one composed mapping in place; `notes` collects a line for everything dropped."""

    def __init__(self, mapping: dict[str, Any], origins: Origins, chain: DefaultsChain, words: list[Word]):
        self.mapping = mapping
        self.origins = origins
        self.chain = chain
        self.choices = chosen(words)
        self.notes: list[str] = []

    def clean(self) -> None:
        """Complete every component and the stack."""
        for group in ("objective", "optim", "schedule"):
            body = self.mapping.get(group)
            if isinstance(body, dict):
                self.mapping[group] = self._complete(group, body, (group,))
        stack = self.mapping.get("stack")
        if isinstance(stack, dict):
            self._order(stack)
            for name in list(stack):
                entry = stack[name]
                if self._left_behind(name, entry):
                    self._drop([("stack", name)], f"'{name}' is no longer in the stack")
                    del stack[name]
                elif isinstance(entry, dict):
                    if "kind" not in entry and self._given_whole(name) and name in registry.names("stack"):
                        entry = {"kind": name, **entry}
                    stack[name] = self._complete("stack", entry, ("stack", name))

    def _order(self, stack: dict[str, Any]) -> None:
        """Sort the entries in the order of the chosen list, further ones after them in the order they were added."""
        word = self.choices.get("stack")
        order = list(word.value) if word else list(self.chain.choice(self.chain.primary.id, "stack") or [])
        entries = {name: stack[name] for name in [*(n for n in order if n in stack), *(n for n in stack if n not in order)]}
        stack.clear()
        stack.update(entries)

    def _given_whole(self, name: str) -> bool:
        return any(
            o.kind == "override" and o.word.split("=")[0].lstrip("+") == f"stack.{name}" for o in self._below(("stack", name))
        )

    def _below(self, at: KeyPath) -> list[Origin]:
        return [o for key, o in self.origins.items() if key[: len(at)] == at]

    def _left_behind(self, name: str, entry: object) -> bool:
        """Return whether a stack entry is left over from a method that an override, or an inheriting recipe, removed."""
        word = self.choices.get("stack")
        below = self._below(("stack", name))
        if any(o.kind == "override" for o in below):
            return False
        if word is not None:
            return name not in word.value
        if isinstance(entry, dict) and "kind" in entry:
            return False
        return any(name in (self._believed(o, "stack") or []) for o in below)

    def _believed(self, origin: Origin, group: str) -> Choice:
        """Return the group's choice as seen by the file that set a value."""
        link = next((k for k in self.chain.links.values() if k.source.path == origin.file), None)
        return self.chain.choice(link.id, group) if link else None

    def _complete(self, group: str, body: dict[str, Any], at: KeyPath) -> dict[str, Any]:
        kind = body.get("kind")
        if kind not in registry.names(group):
            return body
        spec = registry.spec(group, kind)
        defaults = spec.defaults()
        whole: dict[str, Any] = {"kind": kind, **defaults}
        dropped: dict[str, list[str]] = {}
        for name in (str(n) for n in body if n != "kind"):
            key = (*at, name)
            if not self._was_set(key):
                forget(self.origins, key)
                continue
            old = self._old_kind(group, at, name, str(kind))
            if old is None or self._means_the_same(spec.options.get(name), registry.spec(group, old).options[name]):
                whole[name] = body[name]
            elif body[name] == registry.spec(group, old).defaults().get(name, ...):
                forget(self.origins, key)
            else:
                dropped.setdefault(old, []).append(name)
        for old, names in dropped.items():
            self._drop([(*at, name) for name in names], f"set for {old}, and {dotted(at)} is now {kind}")
        for name in defaults:
            if name != "kind" and not self._below((*at, name)):
                self.origins[(*at, name)] = Origin("default", spec.options[name].path, spec.options[name].line)
        return whole

    @staticmethod
    def _means_the_same(new: registry.Option | None, old: registry.Option) -> bool:
        return new is not None and new.type_text == old.type_text and new.default == old.default

    def _was_set(self, key: KeyPath) -> bool:
        origin = origin_of(self.origins, key)
        return any(o.kind != "default" for o in self._below(key)) or (origin is not None and origin.kind != "default")

    def _old_kind(self, group: str, at: KeyPath, option: str, kind: str) -> str | None:
        """Return the replaced kind a value was meant for: its file chose that kind, which has the option."""
        origin = origin_of(self.origins, (*at, option))
        if origin is None or origin.kind != "file":
            return None
        link = next((k for k in self.chain.links.values() if k.source.path == origin.file), None)
        if link is None:
            return None
        body: Any = link.source.value
        for part in at:
            body = body.get(part, {}) if isinstance(body, dict) else {}
        choice = self.chain.choice(link.id, group)
        believed = body.get("kind") if isinstance(body, dict) and "kind" in body else at[-1] if group == "stack" else choice
        if group != "stack" and believed in presets(group):
            believed = read_yaml(presets(group)[believed]).value.get("kind")
        if believed == kind or believed not in registry.names(group) or option not in registry.spec(group, believed).options:
            return None
        return str(believed)

    def _drop(self, keys: list[KeyPath], reason: str) -> None:
        origins = {key: origin_of(self.origins, key) for key in keys}
        for key in keys:
            forget(self.origins, key)
        set_by_files = [f"{dotted(key)} ({origin})" for key, origin in origins.items() if origin and origin.kind != "default"]
        if set_by_files:
            self.notes.append(f"dropped {', '.join(set_by_files)}: {reason}")
