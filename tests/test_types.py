"""What `make check` proves of types: everywhere, with every error code, and with few exceptions that name their code."""

import re
import tomllib
from pathlib import Path

import pytest

import llmrecipe

PACKAGE = Path(llmrecipe.__file__).parent
IGNORE = re.compile(r"#\s*type:\s*ignore(\[[a-z, -]+\])?")
STRICT = ("core", "recipe", "data", "cli", "objectives")
SWITCHES = ("ignore_errors", "disable_error_code", "follow_imports", "exclude")


def ignores() -> list[tuple[str, str | None]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [(f"{path.relative_to(PACKAGE)}:{number}", match[1]) for match in IGNORE.finditer(line)]
    return found


@pytest.fixture(scope="module")
def mypy() -> dict:
    return tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]


def test_every_ignored_type_error_names_its_code():
    assert [place for place, code in ignores() if code is None] == []


def test_fewer_than_eighty_type_errors_are_ignored():
    assert 0 < len(ignores()) < 80


def test_no_error_code_is_disabled_and_no_module_is_left_out(mypy):
    tables = [mypy, *mypy["overrides"]]
    assert mypy.get("disable_error_code", []) == []
    assert mypy["warn_unused_ignores"] and mypy["disallow_untyped_defs"] and mypy["check_untyped_defs"]
    assert [(table["module"], key) for table in tables[1:] for key in SWITCHES if key in table] == []
    assert [
        key for table in tables for key, value in table.items() if key.startswith(("disallow_", "check_")) and not value
    ] == []


def test_the_lower_packages_and_the_objectives_are_checked_strictly(mypy):
    strict = {module for table in mypy["overrides"] if table.get("disallow_any_generics") for module in table["module"]}
    assert {f"llmrecipe.{name}.*" for name in STRICT} <= strict


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
