"""The device profile that tests and golden numbers are made under."""

from __future__ import annotations

import pytest


def fix_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let devices of this process decide by their kind alone, whatever memory a machine has, and forget earlier decisions."""
    from llmrecipe.core import device_profile

    monkeypatch.setattr(device_profile, "facts_of", lambda device: device_profile.DeviceFacts(str(device).partition(":")[0]))
    monkeypatch.setattr(device_profile, "_in_use", {})
