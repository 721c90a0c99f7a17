"""Reference scores on disk: what comes back is what was written, and damage costs computing it again, nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrecipe.engine.reference_cache import ReferenceCache


def filled(path: Path) -> ReferenceCache:
    """Two rows of two sequences, on disk."""
    cache = ReferenceCache(path)
    cache.put(rows(3, -5), torch.tensor([-1.0, -2.0, -3.5, -4.0]))
    cache.save()
    return cache


def rows(*keys: int) -> Any:
    return SimpleNamespace(keys=list(keys))


def test_scores_come_back(tmp_path: Path) -> None:
    filled(tmp_path / "scores.safetensors")
    found = ReferenceCache(tmp_path / "scores.safetensors").get(rows(-5, 3))
    assert found is not None and found.tolist() == [-3.5, -4.0, -1.0, -2.0]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_scores_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        filled(tmp_path / "cache" / "scores.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "scores.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("harm", ["bit", "cut", "empty", "other tensors"])
def test_damaged_scores_are_computed_again(harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "scores.safetensors"
    filled(path)
    content = path.read_bytes()
    if harm == "bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "other tensors":
        save_file({"keys": torch.zeros(1, dtype=torch.int64)}, str(path))
    else:
        path.write_bytes(content[:40] if harm == "cut" else b"")
    assert ReferenceCache(path).get(rows(3)) is None
    assert "these reference scores are damaged" in caplog.text and not path.exists()
    filled(path)
    assert path.read_bytes() == content


def test_scores_without_a_checksum_are_used(tmp_path: Path) -> None:
    """As an older version wrote them."""
    path = tmp_path / "scores.safetensors"
    filled(path)
    save_file(load_file(str(path)), str(path))
    found = ReferenceCache(path).get(rows(3))
    assert found is not None and found.tolist() == [-1.0, -2.0]
