"""Imports without collections of garbage."""

from __future__ import annotations

import gc
import sys

import pytest

from llmrecipe.core.lazy import without_collections


def test_garbage_is_collected_again_after_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert frozen == [True]


def test_a_program_that_has_imported_torch_keeps_its_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", gc)
    with without_collections():
        assert gc.isenabled()


def test_a_program_that_collects_no_garbage_does_not_begin_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
