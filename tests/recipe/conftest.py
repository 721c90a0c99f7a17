"""A project folder to write recipes in, and a package of made-up components."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmrecipe.core import registry

COMPONENTS = {
    "alpha": """
        conflicts: ClassVar[dict[str, str]] = {"beta": "both rewrite the same weights"}
        stage: ClassVar[Stage] = Stage.INJECT
        width: PositiveInt = 4
        \"\"\"How wide.\"\"\"
        shapes: tuple[int, ...] = (1, 2)
        \"\"\"A tuple, which YAML writes as a list.\"\"\"
    """,
    "beta": """
        depth: PositiveInt = 2
        \"\"\"How deep.\"\"\"
    """,
    "gamma": """
        requires: ClassVar[tuple[str, ...]] = ("alpha",)
        needed: str
        \"\"\"Has no default.\"\"\"
    """,
    "rule_one": """
        stage: ClassVar[Stage] = Stage.RULE
    """,
    "rule_two": """
        stage: ClassVar[Stage] = Stage.RULE
    """,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file below a fresh working directory; returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def madeup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package with the components above, known to nobody until a recipe names it under `plugins`."""
    package = tmp_path / "site" / "madeup_methods"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    for name, body in COMPONENTS.items():
        lines = [line[4:] for line in body.strip("\n").rstrip().splitlines()]
        head = (
            "from __future__ import annotations\n"
            "from llmrecipe.plugin import ClassVar, PositiveInt, Stage, Wrapper, register\n\n\n"
            f'@register\nclass {name.title().replace("_", "")}(Wrapper):\n    """Made up."""\n\n'
        )
        (package / f"{name}.py").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    kept = list(registry._plugins)
    yield "madeup_methods"
    registry._plugins[:] = kept
    registry._index.cache_clear()
    for module in [m for m in sys.modules if m.startswith("madeup_methods")]:
        del sys.modules[module]
