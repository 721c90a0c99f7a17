"""What several tests share: real data where it lies beside the checkout, and tiny random models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared(*parts: str) -> Path:
    """A path inside the folder of real data and weights; the test skips where it is absent."""
    base = Path(os.environ.get("LLMRECIPE_SHARED", ROOT.parent / "shared"))
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the shared test data (set LLMRECIPE_SHARED)")
    return path
