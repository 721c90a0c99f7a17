from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a token cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LLMRECIPE_CACHE", str(folder))
    return folder
