"""Prose of the package: retired words are counted, so that docstrings, comments and messages stay in the terms of the field."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from llmrecipe.core.paths import PACKAGE

RETIRED = re.compile(
    r"(?<![.\w])(asked|asks|beside|told|in front of|so many|anew|steps? aside|stands? aside|stands? twice|lies? in|lies? beside"
    r"|mends?|residue|refill|the gate stops|the gate drops|travels? along|nobody reads"
    r"|words of the command line|whole ports?|injected ports?|learned starts?|eight letters|sixteen letters)\b",
    re.IGNORECASE,
)
"""Words and phrases that have a standard term instead (asked -> requested, beside -> next to, anew -> again, ...)."""

SAMPLES = frozenset({"data/toy/grammar.py", "data/toy/generate.py", "data/tokenize/chat_templates.py"})
"""Modules whose strings are data (sentences, templates): only their docstrings and comments count."""


def prose(path: Path, root: Path) -> list[tuple[int, str]]:
    """Return (line, text) of the docstrings, comments and other strings of a module."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    data = path.relative_to(root).as_posix() in SAMPLES
    found = [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (id(node) in bare or (" " in node.value and not data))
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return found + [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def retired(package: Path, root: Path = PACKAGE) -> list[str]:
    """Return `file:line: word` of every retired word in the prose of a package."""
    return [
        f"{path.relative_to(root).as_posix()}:{line}: {word.group()}"
        for path in sorted(package.rglob("*.py"))
        for line, text in prose(path, root)
        for word in RETIRED.finditer(" ".join(text.split()))
    ]


PACKAGES = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file())


@pytest.mark.parametrize("package", PACKAGES)
def test_prose_has_no_retired_words(package: str) -> None:
    assert retired(PACKAGE / package) == []


TEXTS = [PACKAGE.parent / "README.md", *sorted((PACKAGE.parent / "recipes").rglob("*.yaml"))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_readme_and_recipes_have_no_retired_words(path: Path) -> None:
    assert [word.group() for word in RETIRED.finditer(" ".join(path.read_text(encoding="utf-8").split()))] == []


def test_retired_words_are_found_in_docstrings_comments_and_messages(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""What is asked."""\ntold = f"{1} lies in a run"  # beside it\n', encoding="utf-8")
    assert retired(tmp_path, tmp_path) == ["a.py:1: asked", "a.py:2: lies in", "a.py:2: beside"]
