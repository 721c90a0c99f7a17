"""How far the methods are from their references: what parity tests compare, noted while they run.

A test marked `@pytest.mark.parity(METHOD, REFERENCE)` compares by `torch.testing.assert_close`; with `--deviations FOLDER` the
largest difference of each such test is written to FOLDER/parity.md and parity.json, one line a test over all its cases. A
parameter of the test may name the method: "{kind}". Where a difference is more than ten times what FOLDER held, or a comparison
is gone, nothing is written and the session fails, unless `--deviations-reason TEXT` says why; the results then carry it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.stamp import commit

FLOOR = 1e-3
"""A difference counts as a share of the largest value it is compared with, but of no less than this."""
GROWTH = 10.0
"""How many times a difference may be what it was."""
ROUNDING = 1e-14
"""What was smaller counts as this much: float64 rounds anew wherever a sum is added in another order."""
COLUMNS = ("method", "reference", "compared", "cases", "largest difference", "of the largest value")


def distance(actual: Any, expected: Any) -> tuple[float, float]:
    """(max |a - b|, max |b|) over tensors, numbers, and sequences and mappings of them; whole numbers count as such."""
    if isinstance(actual, dict):
        return _largest(distance(actual[k], expected[k]) for k in actual)
    if isinstance(actual, list | tuple):
        return _largest(distance(a, b) for a, b in zip(actual, expected, strict=True))
    a, b = _tensor(actual), _tensor(expected)
    return (float((a - b).abs().max()), float(b.abs().max())) if a.numel() else (0.0, 0.0)


def _tensor(value: Any) -> Any:
    """In float64, numbers too, which a tensor would hold in float32 by default."""
    import torch

    return value.detach().double() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def _largest(pairs: Iterator[tuple[float, float]]) -> tuple[float, float]:
    found = list(pairs)
    return max((d for d, _ in found), default=0.0), max((s for _, s in found), default=0.0)


def noting(check: Callable[..., None], notes: list[tuple[float, float]]) -> Callable[..., None]:
    """`assert_close` that notes how close."""

    def checked(actual: Any, expected: Any, **options: Any) -> None:
        check(actual, expected, **options)
        notes.append(distance(actual, expected))

    return checked


def words(nodeid: str) -> str:
    """What a test says it compares: its name without its cases."""
    return nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")


def case(item: pytest.Item, mark: pytest.Mark, notes: list[tuple[float, float]]) -> dict[str, Any]:
    """What one run of a test found."""
    method, reference = mark.args
    return {
        "method": method.format(**item.callspec.params) if "{" in method else method,
        "reference": reference,
        "compared": words(item.nodeid),
        COLUMNS[4]: max(d for d, _ in notes),
        COLUMNS[5]: max(d / max(s, FLOOR) for d, s in notes),
    }


def rows(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a test: the largest absolute difference of its cases, and the largest as a share of the values compared."""
    tests: dict[tuple[str, str, str], dict[str, Any]] = {}
    for case in cases:
        key = (case["method"], case["reference"], case["compared"])
        row = tests.setdefault(key, dict(zip(COLUMNS, (*key, 0, 0.0, 0.0), strict=True)))
        row["cases"] += 1
        for name in COLUMNS[4:]:
            row[name] = max(row[name], case[name])
    return [tests[key] for key in sorted(tests)]


def table(found: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in found:
        cells = [f"{v:.1e}" if isinstance(v, float) else str(v) for v in (row[name] for name in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worse(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[tuple[str, str, str], str]:
    """Compare two results.

    Returns:
        Comparison (method, reference, compared) -> what grew more than `GROWTH` times, or that the comparison is gone.
    """
    found = {_key(row): row for row in new}
    told: dict[tuple[str, str, str], str] = {}
    for row in old:
        key = _key(row)
        if key not in found:
            told[key] = "is no longer compared"
            continue
        grown = [name for name in COLUMNS[4:] if found[key][name] > GROWTH * max(row[name], ROUNDING)]
        if grown:
            told[key] = ", ".join(f"{name} {row[name]:.1e} became {found[key][name]:.1e}" for name in grown)
    return told


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["reference"], row["compared"]


def notes_of(found: list[dict[str, Any]]) -> str:
    """The reasons that rows carry, in Markdown; empty where none does."""
    lines = [f"- {row['method']}, {row['compared']}: {row['reason']}" for row in found if row.get("reason")]
    return "\n".join(["", "Differences that grew more than tenfold, and why:", "", *lines, ""]) if lines else ""


HEADER = """# How far every method is from its reference

Written by `make parity`: the largest difference that each parity test saw, over all its cases, while it passed. Random models
of two layers; float32 unless the reference is float64. Differences are those of everything the test compares: logits, losses,
gradients, parameters after steps. The last column divides each comparison's largest difference by its largest value (by no
less than {floor}). References: {versions}. Commit {commit}, {processor}.

"""


def header() -> str:
    """The words above the table, with the versions that were compared."""
    packages = ("torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{p} {version(p).partition('+')[0]}" for p in packages)
    return HEADER.format(floor=FLOOR, versions=versions, commit=commit(), processor=f"a {platform.machine()} CPU")


class Deviations:
    """The pytest plugin behind `--deviations`."""

    def __init__(self, folder: str, reason: str = ""):
        self.folder, self.reason = Path(folder), reason.strip()
        self.cases: list[dict[str, Any]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Note what a marked test compares."""
        mark = item.get_closest_marker("parity")
        if mark is None:
            return (yield)
        import torch

        notes: list[tuple[float, float]] = []
        check = torch.testing.assert_close
        torch.testing.assert_close = noting(check, notes)
        try:
            result = yield
        finally:
            torch.testing.assert_close = check
        item.user_properties.append(("parity", case(item, mark, notes)))
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect from passed tests, also those of other processes."""
        if report.when == "call" and report.passed:
            self.cases += [value for name, value in report.user_properties if name == "parity"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the table, or fail and say what grew."""
        if hasattr(session.config, "workerinput") or not self.cases:
            return
        if grown := self.write(rows(self.cases)):
            print(f"\nnothing is written: differences grew more than {GROWTH:g} times, or are gone", *grown, sep="\n  ")
            print('if this is meant: make parity REASON="why"')
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def write(self, found: list[dict[str, Any]]) -> list[str]:
        """Write results beside what was there; returns what forbids it, and writes nothing then."""
        path = self.folder / "parity.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        grown = worse(old, found)
        if grown and not self.reason:
            return [f"{' / '.join(key)}: {what}" for key, what in grown.items()]
        reasons = {_key(row): row["reason"] for row in old if "reason" in row} | dict.fromkeys(grown, self.reason)
        found = [{**row, "reason": reasons[_key(row)]} if _key(row) in reasons else row for row in found]
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (self.folder / "parity.md").write_text(header() + table(found) + "\n" + notes_of(found), encoding="utf-8")
        return []
