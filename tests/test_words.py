"""Words of the package: retired ones are counted in prose, names, options and output, which stay in the terms of the field."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from llmrecipe.cli import app
from llmrecipe.core import registry
from llmrecipe.core.paths import PACKAGE
from llmrecipe.recipe.renames import RENAMES

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


RETIRED_NAMES = frozenset(
    ["agent", "agents", "anew", "arena", "asked", "asks", "beside", "duel", "duels", "refill", "residue", "settle", "told"]
)
"""Parts of names that have a standard term instead (agent -> judge, duel -> head-to-head, settle -> finalize, ...)."""


def names_in(path: Path) -> list[tuple[int, str]]:
    """Return (line, name) of every function, class, argument, variable and attribute that a module defines."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            found.append((node.lineno, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.append((node.lineno, node.attr))
    return found


def parts_of(name: str) -> set[str]:
    """Return the words of a name: `label_by_agent` and `KeyedAgent` hold `agent`."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def retired_names(package: Path, root: Path = PACKAGE) -> list[str]:
    return [
        f"{path.relative_to(root).as_posix()}:{line}: {name}"
        for path in sorted(package.rglob("*.py"))
        for line, name in names_in(path)
        if parts_of(name) & RETIRED_NAMES
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_names_hold_no_retired_words(package: str) -> None:
    assert retired_names(PACKAGE / package) == []


def test_retired_words_are_found_in_names(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class KeyedAgent:\n    def f(self, duel):\n        self.told = agency = duel\n", encoding="utf-8"
    )
    assert retired_names(tmp_path, tmp_path) == ["a.py:1: KeyedAgent", "a.py:2: duel", "a.py:3: told"]


SHARED = frozenset({"verb", "main", "manners"})
"""Names of several modules that mean the same in each: a verb's function, a command line, a rule of the embedded data."""


def test_a_public_name_has_one_meaning() -> None:
    homes: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                component = any(isinstance(d, ast.Name) and d.id == "register" for d in node.decorator_list)
                if not component and node.name not in SHARED:
                    homes.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


SHOWN = re.compile(rf"{RETIRED.pattern}|\b(agents?|duels?|arena)\b|\$\{{each:", re.IGNORECASE)
"""What no output may say: retired words of the prose, and words that users typed."""


def found_in(text: str) -> list[str]:
    return [match.group() for match in SHOWN.finditer(" ".join(text.split()))]


def test_components_options_and_groups_are_shown_in_new_words() -> None:
    assert not {rename.old for rename in RENAMES} & set(registry.groups())
    for group in registry.groups():
        for name in registry.names(group):
            spec = registry.spec(group, name)
            old = {rename.old for rename in RENAMES if name in rename.options_of}
            assert not old & set(spec.options), f"{group}.{name}"
            for word in (group, name, *spec.options):
                assert not parts_of(word) & RETIRED_NAMES, f"{group}.{name}: {word}"
            shown = " ".join([spec.doc, *(option.doc for option in spec.options.values()), str(spec.facts)])
            assert found_in(shown) == [], f"{group}.{name}"


VERBS = sorted(p.stem.strip("_") for p in (PACKAGE / "cli").glob("*.py") if "\ndef verb(" in p.read_text(encoding="utf-8"))
COMMANDS = [
    ["list"],
    ["schema"],
    ["explain", "recipe=rlaif"],
    ["explain", "recipe=grpo"],
    ["show", "sft_lora"],
    ["show", "eval"],
]


@pytest.mark.parametrize("words", [*([verb, "--help"] for verb in VERBS), *COMMANDS], ids=" ".join)
def test_output_is_in_new_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run_command(words) == 0
    out = capsys.readouterr().out
    assert out.strip()
    assert found_in(out) == []
