"""The registry reads no more of a file than it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmrecipe.core import registry


@pytest.fixture
def afresh() -> Iterator[None]:
    registry._index.cache_clear()
    yield
    registry._index.cache_clear()


def test_names_and_classes_need_no_parsed_source(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a source file was parsed")

    monkeypatch.setattr(registry.ast, "parse", refuse)
    assert "dpo" in registry.names("objective")
    assert registry.load_class("optim", "adamw").__name__ == "AdamW"
    with pytest.raises(AssertionError, match="was parsed"):
        registry.spec("optim", "adamw")


def test_every_class_is_found_where_a_parser_finds_it(afresh: None) -> None:
    """Also one whose line is not of the usual form."""
    for path in registry.PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "@register\n" in text and (spec := registry._read("llmrecipe", registry.PACKAGE, path, text)) is not None:
            known = registry.spec(spec.group, spec.name)
            assert (known.path, known.module, known.line, list(known.options)) == (
                path,
                spec.module,
                spec.line,
                list(spec.options),
            )
            assert registry._named(spec.group, spec.name, None).class_name == spec.class_name
