"""Data formats and row types as registered components: order of detection, examples, what decides token ids."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.core.paths import PACKAGE
from llmrecipe.data import prepare, tokenize_split
from llmrecipe.data.formats.data_format import Conversion, data_format, formats_of
from llmrecipe.data.formats.detect import detect
from llmrecipe.data.tokenize.encode import DECIDING
from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.data.tokenize_split import GROUPS
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn

ORDER = {
    "text": ["text", "tokens"],
    "structured_text": ["outliers", "text"],
    "dialogue": ["messages", "sharegpt", "p3", "natural_instructions", "prompt_completion", "alpaca", "tokens", "text"],
    "tokens": ["tokens"],
    "preference": ["preference", "preference_messages", "preference_alpaca", "preference_implicit"],
    "unpaired": [
        "unpaired", "unpaired_messages", "unpaired_alpaca",
        "preference", "preference_messages", "preference_alpaca", "preference_implicit",
    ],
    "choices": [
        "choices", "p3", "natural_instructions",
        "preference", "preference_messages", "preference_alpaca", "preference_implicit", "labelled", "labelled_pair",
    ],
    "prompt": ["messages", "sharegpt", "alpaca", "preference_alpaca", "preference_implicit", "prompt"],
    "labelled": ["labelled", "labelled_pair"],
    "pairs": ["triples", "pairs", "labelled", "text"],
    "multimodal": ["image_text"],
    "pictured_words": ["image_text"],
    "labelled_images": ["image_label"],
    "pictured_questions": ["image_question"],
}  # fmt: skip
"""Row type -> formats in the order in which they are tried."""
EVERY = [(rows, name) for rows, names in ORDER.items() for name in names]


def test_formats_are_tried_in_the_order_of_their_places() -> None:
    """Formats that come later may stand between these."""
    for rows, names in ORDER.items():
        assert [name for name in formats_of(rows) if name in {n for own in ORDER.values() for n in own}] == names


@pytest.mark.parametrize(("rows", "name"), EVERY)
def test_the_example_of_a_format_is_found_by_its_columns_and_becomes_every_row_type_it_names(
    rows: str, name: str, tmp_path: Path
) -> None:
    row: dict[str, Any] = json.loads(data_format(name).example)
    if "image" in row:
        (tmp_path / "pictures").mkdir()
        (tmp_path / row["image"]).write_bytes(b"")
    found = detect([row], rows, "auto", "x")
    assert found.name == name and not found.aliases
    words = {str(row.get("label")): "right", "another label": "wrong"}
    assert found.convert(row, Conversion(rows, template=True, base=tmp_path, label_words=words, label_prompt="Say it:"))


def test_what_a_row_type_says_of_itself() -> None:
    types = [row_type(name) for name in registry.names("row_type")]
    assert {t.name for t in types if t.prompted} == {"choices", "dialogue", "preference", "prompt", "unpaired"}
    assert {t.name for t in types if t.numbered} == {"labelled", "labelled_images", "pairs", "pictured_questions", "tagged"}
    uncounted = {t.name: t.uncounted for t in types if t.uncounted}
    assert uncounted == {
        "labelled": ("type_ids",),
        "pictured_questions": ("type_ids",),
        "scored": ("type_ids",),
        "tagged": ("words",),
        "passages": ("type_ids", "windows", "begins", "ends", "starts", "stops", "nulls"),
        "choices": ("choice_lengths", "choice_tokens", "choice_chars", "choice_bytes"),
        "words": ("words",),
        "pictured_words": ("words",),
        "structured_text": ("words", "sentences"),
        "sentences": ("words", "sentences"),
    }
    assert all(set(t.uncounted) <= set(t.lists) for t in types)


def test_every_module_that_makes_token_rows_is_in_the_hash_of_the_code() -> None:
    """What formats and row types import from `data` stands in a folder of the hash, or decides no token id."""
    harmless = {"llmrecipe.data.token_report", "llmrecipe.data.cache"}
    folders = tuple(f"llmrecipe.data.{name}." for name in DECIDING)
    todo = [registry.spec(group, name).module for group in GROUPS for name in registry.names(group)]
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        if module in seen or module in harmless:
            continue
        seen.add(module)
        assert module.startswith(folders), f"{module} decides token ids and is not in code_version()"
        tree = ast.parse(PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
        names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        todo += [name for name in names if name.startswith("llmrecipe.data.")]
    assert len(seen) > 40


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package without components, already a plugin."""
    folder = tmp_path / "site" / "cards_plugin"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(registry, "_plugins", [])
    registry.add_plugin("cards_plugin")
    yield folder
    registry._index.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "cards_plugin"]:
        del sys.modules[name]


HEAD = "from __future__ import annotations\nfrom typing import ClassVar\nfrom llmrecipe.plugin import register\n"
CARDS = (
    HEAD
    + '''from llmrecipe.plugin import DataFormat


@register
class Cards(DataFormat):
    """Two sides of a card."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("front", "back"),)
    becomes: ClassVar[dict[str, int]] = {BECOMES}
    example: ClassVar[str] = '{"front": "blue", "back": "bleu"}'
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {"front": ("recto",), "back": ("verso",)}

    def convert(self, row, conversion):
        return [{"prompt": row["front"], "completion": row["back"]}]
'''
)


def test_a_format_of_a_plugin_is_recognised_by_its_columns_and_their_other_names(package: Path) -> None:
    (package / "cards.py").write_text(CARDS.replace("BECOMES", '"dialogue": 35'), encoding="utf-8")
    registry._index.cache_clear()
    found = list(formats_of("dialogue"))
    assert found.index("prompt_completion") < found.index("cards") < found.index("alpaca")
    wanted = [{"prompt": "a", "completion": "b"}]
    assert detect([{"front": "a", "back": "b"}], "dialogue", "auto", "x").convert(
        {"front": "a", "back": "b"}, Conversion("dialogue")
    ) == wanted  # fmt: skip
    renamed = detect([{"Recto": "a", "verso": "b"}], "dialogue", "auto", "x")
    assert renamed.aliases == {"front": "Recto", "back": "verso"}
    with pytest.raises(DataError, match="cards                needs front\\+back  \\(two sides of a card\\)"):
        detect([{"nothing": 1}], "dialogue", "auto", "x")
    talk = {"messages": [turn("user", "u"), turn("assistant", "a")], "front": "a", "back": "b"}
    assert detect([talk], "dialogue", "auto", "x").name == "messages"


def test_a_format_that_becomes_nothing_known_is_named_with_its_file(package: Path) -> None:
    (package / "cards.py").write_text(CARDS.replace("BECOMES", '"dialog": 35'), encoding="utf-8")
    registry._index.cache_clear()
    with pytest.raises(DataError, match=r"cards\.py: format cards becomes 'dialog'.*did you mean 'dialogue'"):
        formats_of("text")


def test_a_row_type_that_takes_no_known_format_is_named(package: Path) -> None:
    text = f'''{HEAD}from llmrecipe.plugin import RowType


@register
class Sides(RowType):
    """Sides."""

    lists: ClassVar[tuple[str, ...]] = ("ids",)
    takes: ClassVar[dict[str, int]] = {{"alpacca": 10}}
'''
    (package / "sides.py").write_text(text, encoding="utf-8")
    registry._index.cache_clear()
    with pytest.raises(DataError, match=r"row type sides takes 'alpacca'.*did you mean 'alpaca'"):
        formats_of("sides")


def test_changed_code_of_a_plugged_format_makes_other_token_tables(package: Path) -> None:
    assert tokenize_split.plugin_code() == {}
    (package / "cards.py").write_text(CARDS.replace("BECOMES", '"dialogue": 35'), encoding="utf-8")
    registry._index.cache_clear()
    before = tokenize_split.plugin_code()
    assert list(before) == ["cards_plugin"]
    (package / "cards.py").write_text(CARDS.replace("BECOMES", '"dialogue": 45'), encoding="utf-8")
    assert tokenize_split.plugin_code() != before


@pytest.mark.parametrize("words", [["list", "format"], ["show", "alpaca"], ["show", "row_type.dialogue"]])
def test_the_command_line_lists_and_shows_formats_without_torch(words: list[str]) -> None:
    code = (
        "import sys; from llmrecipe.cli.app import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert not end.code, end\n"
        "assert 'torch' not in sys.modules and 'llmrecipe.data.formats.data_format' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if words[0] == "list":
        assert all(name in done.stdout for name in registry.names("format"))
    if words[1] == "alpaca":
        assert "columns: instruction+output" in done.stdout and '"instruction": "Translate into French."' in done.stdout


def test_the_key_of_streamed_rows_changes_with_the_code_of_a_plugged_format(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")

    def key() -> str:
        rows = prepare(DataSection(path=str(path), streaming=True), byte_tokenizer(), "text", seed=0)
        assert rows is not None
        return rows.key

    plain = key()
    (package / "cards.py").write_text(CARDS.replace("BECOMES", '"dialogue": 35'), encoding="utf-8")
    registry._index.cache_clear()
    first = key()
    (package / "cards.py").write_text(CARDS.replace("BECOMES", '"dialogue": 45'), encoding="utf-8")
    assert len({plain, first, key()}) == 3
