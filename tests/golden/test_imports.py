"""Commands import what they imported: no package is loaded by accident, and none that is slow where it is not needed."""

from __future__ import annotations

import pytest

from tests.golden import kept
from tests.golden.imports import COMMANDS, TRAIN, imported

HEAVY = {"torch", "transformers", "datasets", "accelerate", "bitsandbytes"}
UNUSED = {"pandas", "datasets", "bitsandbytes", "peft", "trl", "optuna", "matplotlib"}
"""What Transformers and pyarrow would bring along for others' sake, and what only tests need."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_no_new_package(name: str) -> None:
    new = set(imported(name)) - set(kept.read(kept.IMPORTS)["entries"][name]["packages"])
    assert not new, f'{name} imports {sorted(new)}; if this is meant: make golden-renew REASON="why" ONLY=imports'


def test_what_is_kept_holds_nothing_heavy_and_has_a_reason() -> None:
    entries = kept.read(kept.IMPORTS)["entries"]
    assert entries.keys() == COMMANDS.keys()
    assert all(entry["reason"].strip() for entry in entries.values())
    for name, entry in entries.items():
        assert not (UNUSED if name == TRAIN else HEAVY) & set(entry["packages"]), name
