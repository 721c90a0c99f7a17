"""The order of the house: no module cycle, no overgrown package, no name twice, one place that loads by name."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter, defaultdict
from pathlib import Path

import grimp
import pytest

from llmrecipe.core import registry
from llmrecipe.core.paths import PACKAGE

LOADERS = {"__init__.py", "core/registry.py", "core/lazy.py"}
"""Where modules are imported by a name that is text."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("llmrecipe", cache_dir=None, exclude_type_checking_imports=False)


def test_no_module_imports_itself_by_any_way(graph: grimp.ImportGraph) -> None:
    """Imports inside functions and under TYPE_CHECKING count as well."""
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for module in graph.modules:
        sorter.add(module, *graph.find_modules_directly_imported_by(module))
    sorter.prepare()


def test_no_package_holds_more_than_a_quarter_of_the_lines() -> None:
    lines: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        lines[path.relative_to(PACKAGE).parts[0]] += len(path.read_text(encoding="utf-8").splitlines())
    largest, count = lines.most_common(1)[0]
    assert count <= lines.total() / 4, f"{largest} holds {count} of {lines.total()} lines"


def test_a_module_name_stands_once() -> None:
    """Verbs (`cli/train.py`) share the name of what they run, and components of unlike groups may share theirs."""
    components = {registry.spec(group, name).path for group in registry.groups() for name in registry.names(group)}
    homes: defaultdict[str, list[Path]] = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        if path.stem != "__init__" and path.parent != PACKAGE / "cli" and path not in components:
            homes[path.stem].append(path)
    twice = {stem: [str(p.relative_to(PACKAGE)) for p in paths] for stem, paths in homes.items() if len(paths) > 1}
    assert not twice


def test_json_files_are_read_in_one_place() -> None:
    """`json.loads` of a file's content has other bounds and other errors than `core.foreign`."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("loads", "safe_load"):
                reads = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} & {"read_text", "read_bytes"}
                if reads and "ASSETS" not in ast.unparse(node):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found


def test_modules_are_loaded_by_name_in_one_place() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "import_module":
                found.add(str(path.relative_to(PACKAGE)))
    assert found <= LOADERS, found - LOADERS
