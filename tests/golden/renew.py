"""Write the committed numbers anew: `make golden-renew REASON="why they change" [ONLY="dpo_lora counters imports"]`.

Only entries that changed are written, each with the reason; the commit that changes the code carries them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.fixed_profile import fix_profile
from tests.golden import counters, imports, kept, machine, runs


def renew_run(name: str, reason: str) -> bool:
    """Train a golden run and keep its record; returns whether it changed."""
    path = kept.RUNS / f"{name}.json"
    old, here = kept.read(path), machine.fingerprint()
    with tempfile.TemporaryDirectory() as folder:
        found = runs.record(name, Path(folder) / "run")
    if old and old["machine"] == here and not runs.differences(old, found):
        return False
    kept.write(path, {"reason": reason, "machine": here, **found})
    return True


def renew_counters(reason: str) -> list[str]:
    """Count every cell and keep what changed; returns the names."""
    old = kept.read(kept.COUNTERS)
    new = {name: counters.count(cell) for name, cell in counters.CELLS.items()}
    return _merge(kept.COUNTERS, old, new, reason, machine.versions())


def renew_imports(reason: str) -> list[str]:
    """List what every command imports and keep what changed; returns the names."""
    old = kept.read(kept.IMPORTS)
    new = {name: {"packages": imports.imported(name)} for name in imports.COMMANDS}
    return _merge(kept.IMPORTS, old, new, reason, machine.versions())


def _merge(path: Path, old: Any, new: dict[str, Any], reason: str, versions: dict[str, str]) -> list[str]:
    """Entries that are equal keep the reason they had."""
    entries = old.get("entries", {})
    equal = {n for n in new if n in entries and {k: v for k, v in entries[n].items() if k != "reason"} == new[n]}
    merged = {n: entries[n] if n in equal else {**new[n], "reason": reason} for n in new}
    if merged != entries or old.get("versions") != versions:
        kept.write(path, {"versions": versions, "entries": merged})
    return [n for n in new if n not in equal]


def renew(name: str, reason: str) -> Any:
    """Renew counters, imports or a golden run; returns what changed, or whether it did."""
    if name == "counters":
        return renew_counters(reason)
    return renew_imports(reason) if name == "imports" else renew_run(name, reason)


def main(reason: str, only: list[str]) -> None:
    """Renew all, or what is named."""
    if not reason.strip():
        raise SystemExit('golden numbers change for a reason: make golden-renew REASON="..."')
    known = [*runs.RUNS, "counters", "imports"]
    if unknown := [name for name in only if name not in known]:
        raise SystemExit(f"no golden numbers named {', '.join(unknown)}; there are {', '.join(known)}")
    for name in only or known:
        with pytest.MonkeyPatch.context() as patch:
            fix_profile(patch)
            changed = renew(name, reason)
        print(f"{name}: {'changed' if changed is True else ', '.join(changed) if changed else 'equal'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:])
