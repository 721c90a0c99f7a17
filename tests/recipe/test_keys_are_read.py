"""No key of a recipe is there for show: each is read where the work is done, and each option inside its own component."""

from __future__ import annotations

import ast
import functools
import itertools
from pathlib import Path

import pytest

from llmrecipe.core import registry
from llmrecipe.core.registry import PACKAGE
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.section import Section

WORK = [p for p in sorted(PACKAGE.rglob("*.py")) if "recipe" not in p.relative_to(PACKAGE).parts[:1]]
"""Everything but the code that composes and validates recipes, which handles every key alike."""
ROUTED = {"search": "llmrecipe/recipe", "stages": "llmrecipe/recipe", "plugins": "llmrecipe/recipe"}
"""Top-level keys that composition itself acts on."""
READ_FOR_THEM = {"clip": "training/run_state.py"}
"""Options that the loop reads in a component's place."""


@functools.cache
def attributes(path: Path) -> frozenset[str]:
    """Names read as attributes, and texts handed to `getattr`, also those of a tuple that is gone through."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and not _of_a_library(node.value)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    tuples = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.DictComp | ast.ListComp) and "getattr(self, " in ast.unparse(node):
            lists = [tuples.get(g.iter.id) for g in node.generators if isinstance(g.iter, ast.Name)]
            found |= {e.value for t in lists if isinstance(t, ast.Tuple) for e in t.elts if isinstance(e, ast.Constant)}
    return frozenset(found)


def _of_a_library(value: ast.AST) -> bool:
    """Whether an attribute is one of the standard library's or torch's: `re.compile` reads no key."""
    return isinstance(value, ast.Name) and value.id in ("re", "torch", "json", "math", "os", "time")


def schema_fields() -> list[tuple[str, str]]:
    sections = [
        (name, inner)
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for inner in field.annotation.model_fields
    ]
    plain = [("", name) for name in Recipe.model_fields if name not in ROUTED]
    return [*plain, *sections]


@pytest.mark.parametrize(("section", "name"), schema_fields(), ids=lambda v: v or "recipe")
def test_every_key_of_the_schema_is_read_by_the_work(section: str, name: str) -> None:
    readers = [p.relative_to(PACKAGE).as_posix() for p in WORK if name in attributes(p)]
    # `split` of the data decides by name which of the two keys it reads.
    readers += ["data/formats/splits.py"] if section == "data" and name in ("validation", "test") else []
    # Sizes of the mesh and the backend decide what is refused before any work; keys of the device profile are read for it.
    rules = [PACKAGE / "recipe" / f"{rule}.py" for rule in ("sharding_rules", "profile_keys")]
    readers += [path.name for path in rules if section == "runtime" and name in attributes(path)]
    assert readers, f"{section}.{name} is accepted and read by nothing"


def bases_of(spec: registry.Spec) -> list[Path]:
    """The files of a component's class and of the classes it inherits inside the package."""
    cls = registry.load_class(spec.group, spec.name)
    modules = {base.__module__ for base in cls.__mro__ if base.__module__.startswith("llmrecipe.")}
    return [PACKAGE.parent.joinpath(*m.split(".")).with_suffix(".py") for m in sorted(modules)]


SPECS = [registry.spec(group, name) for group in registry.groups() for name in registry.names(group)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.group}-{s.name}")
def test_every_option_of_a_component_is_read(spec: registry.Spec) -> None:
    own = set(itertools.chain.from_iterable(attributes(path) for path in bases_of(spec)))
    unread = {name for name in spec.options if name not in own}
    assert unread <= READ_FOR_THEM.keys(), f"{spec.name} accepts {sorted(unread)} and nothing of its own reads them"
    assert all(name in attributes(PACKAGE / READ_FOR_THEM[name]) for name in unread)
