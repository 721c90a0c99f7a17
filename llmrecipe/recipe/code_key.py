"""The code a result depends on other than the product's own: the packages and modules its components come from.

A package is identified by the content of its files, not by their times or where it is installed. Code outside a package that a
plugin imports is not followed; a function that was registered by a script or a notebook is identified by its module and by what
that imports from its own package or folder.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmrecipe.core import registry

OWN = "llmrecipe"
MARKS = {
    "reward_function": ("llmrecipe.feedback.rewards.function", "FUNCTIONS"),
    "judge_rule": ("llmrecipe.feedback.judges.rule", "RULES"),
}
"""Decorators that register a function by name -> where the functions registered in this process are stored."""
LARGEST = 1 << 26
"""Bytes up to which a file of a package is identified by its content; larger ones by their size."""


def code_of(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each package or module outside the product that something in a mapping comes from.

    A package counts where the mapping contains its name (`plugins`), or the name of a component or of a marked function that it
    defines, as a key or a value; so an unused package may be included, but a used one is never left out.
    """
    said = set(_words(mapping))
    found = {package for package, root in registry.plugins() if said & _names(package, root)}
    marked = {home for name, home in _marked() if name in said}
    return code_behind([*found, *marked])


def code_behind(modules: Iterable[str]) -> dict[str, str]:
    """Return a digest of the code of modules: of the plugin package each belongs to, else of the module with its imports."""
    roots = dict(registry.plugins())
    found: dict[str, str] = {}
    for module in sorted(set(modules)):
        package = next((p for p in roots if module == p or module.startswith(f"{p}.")), None)
        if package is not None:
            found[package] = _digest((p.relative_to(roots[package]).as_posix(), p) for p in _files(roots[package]))
        elif module.partition(".")[0] != OWN:
            own = _imports(module)
            if own:
                found[module] = _digest(own.items())
    return found


def _words(value: object) -> Iterator[str]:
    """Yield every key and string of a nested mapping."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _words(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        yield value


def _names(package: str, root: Path) -> set[str]:
    """Return a plugin's own name, those of its components, and those of its marked functions."""
    found = {package, *registry.defined_in(package)}
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if any(f"@{mark}" in text for mark in MARKS):
            found |= {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and _is_marked(n)}
    return found


def _is_marked(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id in MARKS for d in node.decorator_list)


def _marked() -> Iterator[tuple[str, str]]:
    """Yield (name, module) of each function that was marked in this process."""
    for module, table in MARKS.values():
        if module in sys.modules:
            for name, function in getattr(sys.modules[module], table).items():
                yield name, function.__module__


def _files(root: Path) -> list[Path]:
    """Return the files of a package, without hidden files and without what Python generates from the sources."""
    inside = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
    return sorted(p for p in inside if p.is_file() and p.suffix != ".pyc")


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    """Return a digest of names and contents."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        size = path.stat().st_size
        content = hashlib.sha256(path.read_bytes()).hexdigest() if size <= LARGEST else str(size)
        digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()[:16]


def _imports(home: str) -> dict[str, Path]:
    """Return the file of an imported module and, recursively, of what it imports from its own package or folder."""
    found: dict[str, Path] = {}
    todo = [home]
    while todo:
        name = todo.pop()
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in found or file is None or not file.endswith(".py") or not Path(file).is_file():
            continue
        near = name.partition(".")[0] == home.partition(".")[0] or not found or Path(file).parent == found[home].parent
        if near:
            found[name] = Path(file)
            todo += _imported(name, Path(file))
    return found


def _imported(name: str, path: Path) -> list[str]:
    """Return the full names of the modules a file may import."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found
