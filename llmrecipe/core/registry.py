"""The registry: every method, objective, optimizer and schedule by name.

A component is one file whose stem is its name, holding one class decorated with `@register`. The class is its own config:
its annotated fields are the options of the YAML key, the string below a field explains it. Components that share options
inherit them from a mixin decorated with `@options`.

Two views of the same source:

- `spec(group, name)` reads the file as text (no import of the component, hence no torch): defaults, types, docs. It serves
  `list`, `show`, `schema`, `explain` and the validation of recipes.
- `load_class(group, name)` imports the file and returns the class, a keyword-only, frozen Pydantic dataclass that forbids
  extra keys.

A component's group follows from the interface it inherits (see `INTERFACES`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from llmrecipe.core import option_types as vocabulary
from llmrecipe.core.errors import LlmRecipeError, RecipeError, did_you_mean
from llmrecipe.core.foreign import reading
from llmrecipe.core.paths import PACKAGE

INTERFACES = {
    "Wrapper": "stack",
    "Objective": "objective",
    "Optimizer": "optim",
    "Schedule": "schedule",
    "Reward": "reward",
    "Judge": "judge",
    "Metric": "metric",
    "Step": "step",
    "AdapterFormat": "adapter_format",
    "Tracker": "tracker",
    "DataFormat": "format",
    "RowType": "row_type",
    "LossMask": "loss_mask",
    "Truncation": "truncation",
    "ChatTemplate": "chat_template",
    "HubLayout": "hub_layout",
    "Family": "family",
    "MergeMethod": "merge_method",
    "Verification": "verification",
}
"""Interface a component inherits -> the group its name is registered in."""

CONFIG = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)
HEADER = re.compile(r"^@register\nclass (\w+)\(([^()]*)\):$", re.MULTILINE)
"""The lines that begin the class of a component; its name and its bases are captured."""
ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Option:
    """One option of a component, read from its source."""

    name: str
    annotation: Any
    """The evaluated type."""
    type_text: str
    """The type as written."""
    default: Any
    """The default value, or `...` where the option is required."""
    doc: str
    path: Path
    """The file it is written in: the component's, or that of a mixin."""
    line: int


@dataclass(frozen=True)
class Spec:
    """One component, read from its source without importing it."""

    group: str
    name: str
    module: str
    class_name: str
    path: Path
    line: int
    doc: str
    options: dict[str, Option]
    facts: dict[str, Any]
    """Class attributes with literal values, such as `requires` or `mergeable`."""

    @property
    def summary(self) -> str:
        """Return the first sentence of the docstring."""
        return self.doc.strip().split("\n")[0].strip()

    @property
    def papers(self) -> list[str]:
        """Return the arXiv ids named in the docstring."""
        return sorted(set(ARXIV.findall(self.doc)))

    @property
    def family(self) -> str:
        """Return the name of the component's folder, such as `additive` or `alignment`."""
        return self.path.parent.name

    def defaults(self) -> dict[str, Any]:
        """Return `{"kind": name, option: default, ...}` for options that have a default."""
        values = {o.name: _plain(o.default) for o in self.options.values() if o.default is not ...}
        return {"kind": self.name, **values}

    @functools.cached_property
    def schema_model(self) -> type[BaseModel]:
        """Return a Pydantic model with the component's options, built without importing the component."""
        spec_fields: dict[str, Any] = {
            o.name: (Annotated[o.annotation, Field(description=o.doc)], o.default) for o in self.options.values()
        }
        return create_model(self.class_name, __config__=CONFIG, **spec_fields)


def options(cls: T) -> T:
    """Turn a class into a mixin of options: a component that inherits it has them, and may add to or change them."""
    return pydantic_dataclass(cls, config=CONFIG, kw_only=True)  # type: ignore[return-value]


def _plain(value: object) -> object:
    """Return the value of a default, also when it was written as `Field(default_factory=...)` or `Field(default, ...)`."""
    if isinstance(value, FieldInfo):
        return value.get_default(call_default_factory=True)
    return value


def register(cls: T) -> T:
    """Turn a component into its own config: a keyword-only, frozen Pydantic dataclass that forbids unknown keys."""
    return pydantic_dataclass(cls, config=CONFIG, kw_only=True)  # type: ignore[return-value]


_plugins: list[tuple[str, Path]] = []


def add_plugin(package: str) -> None:
    """Also search an installed package for components (`plugins: [package]` in a recipe: the user's opt-in).

    Raises:
        RecipeError: no such package is installed.
    """
    if any(name == package for name, _ in _plugins):
        return
    with reading(f"plugins: '{package}' cannot be found", "name an installed package", RecipeError):
        found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise RecipeError(f"plugins: no installed package is called '{package}'")
    _plugins.append((package, Path(next(iter(found.submodule_search_locations)))))
    _index.cache_clear()


def plugins() -> list[tuple[str, Path]]:
    """Return the packages that are searched in addition to this one, with their folders."""
    return list(_plugins)


def defined_in(package: str) -> list[str]:
    """Return the names of the components that a package contains."""
    every = (found for members in _index().values() for found in members.values())
    return [found.name for found in every if found.module.startswith(f"{package}.")]


def import_marked(mark: str) -> None:
    """Import the files of plugins that use a decorator such as `@reward_function`."""
    for package, root in _plugins:
        for path in sorted(root.rglob("*.py")):
            if mark in path.read_text(encoding="utf-8"):
                name = ".".join([package, *path.relative_to(root).with_suffix("").parts])
                _import(name.removesuffix(".__init__"))


def _roots() -> list[tuple[str, Path]]:
    return [("llmrecipe", PACKAGE), *_plugins]


@dataclass(frozen=True)
class _Found:
    """A component whose file is known and has not been read further than its name."""

    group: str
    name: str
    class_name: str
    package: str
    root: Path
    path: Path

    @property
    def module(self) -> str:
        return ".".join([self.package, *self.path.relative_to(self.root).with_suffix("").parts])

    @functools.cached_property
    def spec(self) -> Spec:
        found = _read(self.package, self.root, self.path, self.path.read_text(encoding="utf-8"))
        assert found is not None, f"{self.path} is the file of a component"
        return found


@functools.cache
def _index() -> dict[str, dict[str, _Found]]:
    found: dict[str, dict[str, _Found]] = {group: {} for group in INTERFACES.values()}
    for package, root in _roots():
        for path in sorted(root.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "@register\n" not in text:
                continue
            header = _header(package, root, path, text)
            if header is None:
                continue
            group, class_name = header
            clash = found[group].get(path.stem)
            if clash is not None:
                raise LlmRecipeError(f"{group} '{path.stem}' is registered twice: {clash.path} and {path}")
            found[group][path.stem] = _Found(group, path.stem, class_name, package, root, path)
    return found


def _header(package: str, root: Path, path: Path, text: str) -> tuple[str, str] | None:
    """Return the group and the class of the component in a file; None where there is none.

    Parsing every file would take most of the time of a command such as `list`. Those of a plugin are parsed all the same, so
    that their mistakes show before one of them is named.
    """
    lines = HEADER.findall(text)
    if package == "llmrecipe" and len(lines) == 1:
        class_name, bases = lines[0]
        group = next((INTERFACES[base] for base in re.split(r",\s*", bases) if base in INTERFACES), None)
        if group is not None:
            return group, class_name
    spec = _read(package, root, path, text)
    return None if spec is None else (spec.group, spec.class_name)


def _read(package: str, root: Path, path: Path, text: str) -> Spec | None:
    tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and _is_decorated(node, "register"):
            bases = [b.id for b in node.bases if isinstance(b, ast.Name)]
            group = next((INTERFACES[b] for b in bases if b in INTERFACES), None)
            if group is None:
                raise LlmRecipeError(f"{path}:{node.lineno}: {node.name} inherits none of {', '.join(INTERFACES)}")
            module = ".".join([package, *path.relative_to(root).with_suffix("").parts])
            options, facts = _inherited(tree, bases, package, root)
            own, named = _members(node, path)
            options, facts = {**options, **own}, {**facts, **named}
            doc = inspect.cleandoc(ast.get_docstring(node) or "")
            return Spec(group, path.stem, module, node.name, path, node.lineno, doc, options, facts)
    return None


def _is_decorated(node: ast.ClassDef, name: str) -> bool:
    return any(isinstance(d, ast.Name) and d.id == name for d in node.decorator_list)


def _inherited(tree: ast.Module, bases: list[str], package: str, root: Path) -> tuple[dict[str, Option], dict[str, Any]]:
    """Return the options and literal attributes of a class's mixins, read from the files they are imported from."""
    found: tuple[dict[str, Option], dict[str, Any]] = {}, {}
    homes = {a.name: i.module or "" for i in tree.body if isinstance(i, ast.ImportFrom) for a in i.names}
    for base in reversed(bases):
        inside = homes.get(base, "").removeprefix(f"{package}.")
        path = root.joinpath(*inside.split(".")).with_suffix(".py")
        if base in INTERFACES or not path.is_file():
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == base and _is_decorated(node, "options"):
                for known, more in zip(found, _members(node, path), strict=True):
                    known.update(more)
    return found


def _members(node: ast.ClassDef, path: Path) -> tuple[dict[str, Option], dict[str, Any]]:
    scope = {name: getattr(vocabulary, name) for name in vocabulary.__all__}
    options: dict[str, Option] = {}
    facts: dict[str, Any] = {}
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        text = ast.unparse(item.annotation)
        if text.startswith("ClassVar"):
            try:
                facts[item.target.id] = ast.literal_eval(item.value) if item.value else None
            except ValueError:
                facts[item.target.id] = ast.unparse(item.value) if item.value else None
            continue
        doc = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            doc = inspect.cleandoc(str(following.value.value))
        try:
            annotation = eval(text, dict(scope))
            default = ... if item.value is None else eval(ast.unparse(item.value), dict(scope))
        except NameError as error:
            raise LlmRecipeError(f"{path}:{item.lineno}: option types come from llmrecipe.plugin only: {error}") from error
        options[item.target.id] = Option(item.target.id, annotation, text, default, doc, path, item.lineno)
    return options, facts


def name_of(cls: type) -> str:
    """Return the name a component's class is registered under: the stem of its file."""
    return cls.__module__.rpartition(".")[2]


def groups() -> list[str]:
    """Return the groups that have at least one component."""
    return [group for group, members in _index().items() if members]


def names(group: str) -> list[str]:
    """Return the names registered in a group, sorted."""
    return sorted(_index().get(group, {}))


def spec(group: str, name: str, where: str | None = None) -> Spec:
    """Return what the source says about one component.

    Args:
        where: key path of the recipe that named it, for the message.

    Raises:
        RecipeError: the name is unknown; the message lists what exists and the nearest spelling.
    """
    return _named(group, name, where).spec


def _named(group: str, name: str, where: str | None) -> _Found:
    known = _index().get(group, {})
    if name not in known:
        raise RecipeError(
            f"{where or group}: there is no {group} '{name}'{did_you_mean(str(name), known)} "
            f"(known: {', '.join(sorted(known))})"
        )
    return known[name]


def load_class(group: str, name: str, where: str | None = None) -> Any:
    """Import one component and return its class (its own type is known to the caller's group only)."""
    found = _named(group, name, where)
    return getattr(_import(found.module), found.class_name)


def _import(name: str) -> ModuleType:
    """Import a module of this package or of a plugin, whose own errors name it.

    Raises:
        RecipeError: a plugin cannot be imported.
    """
    if name.partition(".")[0] == "llmrecipe":
        return importlib.import_module(name)
    with reading(f"plugins: {name} cannot be imported", error=RecipeError):
        return importlib.import_module(name)


def find(name: str) -> list[Spec]:
    """Return every component of that name, in any group."""
    return [members[name].spec for members in _index().values() if name in members]
