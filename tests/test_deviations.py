"""The recorder of parity tests: what it measures, and what it makes of many cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deviations import COLUMNS, Deviations, distance, noting, rows, table, words, worse
from tests.support import ROOT


def test_a_distance_is_the_largest_difference_beside_the_largest_value() -> None:
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    assert distance(a, b) == (0.5, 4.0)
    assert distance({"x": [a, 3.0], "y": 7}, {"x": [b, 1.0], "y": 7}) == (2.0, 7.0)
    assert distance(torch.zeros(0), torch.zeros(0)) == (0.0, 0.0)
    assert distance(1.0, 1.0 + 1e-12)[0] == pytest.approx(1e-12, rel=1e-3)


def test_what_fails_is_still_an_error_and_not_a_note() -> None:
    notes: list[tuple[float, float]] = []
    check = noting(torch.testing.assert_close, notes)
    check(torch.ones(2), torch.ones(2) + 1e-3, atol=1e-2, rtol=0.0)
    with pytest.raises(AssertionError):
        check(torch.ones(2), torch.zeros(2))
    assert notes == [(pytest.approx(1e-3, rel=1e-3), pytest.approx(1.001))]


def test_cases_of_a_test_are_one_row_with_their_largest_values() -> None:
    assert words("tests/a.py::test_steps_equal_peft[gpt2-q]") == "steps equal peft"
    cases = [
        {
            "method": "lora",
            "reference": "PEFT",
            "compared": "steps equal peft",
            "largest difference": d,
            "of the largest value": share,
        }
        for d, share in ((1e-7, 2e-6), (3e-7, 1e-6))
    ]
    found = rows(cases)
    assert len(found) == 1 and list(found[0].values()) == ["lora", "PEFT", "steps equal peft", 2, 3e-7, 2e-6]
    assert table(found).splitlines()[-1] == "| lora | PEFT | steps equal peft | 2 | 3.0e-07 | 2.0e-06 |"


def row(method: str, difference: float, share: float | None = None) -> dict[str, Any]:
    return dict(zip(COLUMNS, (method, "PEFT", "logits", 1, difference, difference if share is None else share), strict=True))


def test_a_difference_may_grow_tenfold_but_no_more() -> None:
    old = [row("lora", 2e-7), row("dora", 0.0), row("ia3", 3e-16), row("apt", 1e-6, share=1e-7)]
    assert worse(old, [row("lora", 2e-6), row("dora", 9e-14), row("ia3", 9e-14), row("apt", 1e-9)]) == {}
    grown = worse(old, [row("lora", 4e-6), row("dora", 6e-8), row("ia3", 2e-7), row("apt", 1e-6, share=2e-6), row("new", 1.0)])
    assert [key[0] for key in grown] == ["lora", "dora", "ia3", "apt"]
    assert grown["apt", "PEFT", "logits"] == "of the largest value 1.0e-07 became 2.0e-06"


def test_a_comparison_that_is_gone_is_told() -> None:
    assert worse([row("lora", 1e-7)], [row("dora", 1e-7)]) == {("lora", "PEFT", "logits"): "is no longer compared"}


def test_results_that_grew_are_written_with_a_reason_only_and_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    assert Deviations(str(tmp_path)).write([row("lora", 1e-7)]) == []
    first = path.read_bytes()
    (told,) = Deviations(str(tmp_path), " ").write([row("lora", 2e-6)])
    assert told.startswith("lora / PEFT / logits: largest difference 1.0e-07 became 2.0e-06")
    assert path.read_bytes() == first
    assert Deviations(str(tmp_path), "float32 sums").write([row("lora", 2e-6), row("dora", 1e-7)]) == []
    for _ in range(2):
        assert [r.get("reason") for r in json.loads(path.read_text())] == ["float32 sums", None]
        assert (tmp_path / "parity.md").read_text().endswith("\n- lora, logits: float32 sums\n")
        assert Deviations(str(tmp_path)).write([row("lora", 3e-6), row("dora", 1e-7)]) == []


def test_the_session_fails_where_a_difference_grew(tmp_path: Path) -> None:
    """The whole command: a marked test that is 2e-6 away where the results hold 1e-7."""
    (tmp_path / "test_one.py").write_text(
        "import pytest, torch\n"
        "@pytest.mark.parity('lora', 'PEFT')\n"
        "def test_logits():\n"
        "    torch.testing.assert_close(torch.tensor(1 + 2e-6, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64), "
        "atol=1e-3, rtol=0)\n"
    )
    (tmp_path / "parity.json").write_text(json.dumps([row("lora", 1e-7)]))
    words = [str(tmp_path / "test_one.py"), "-c", "pyproject.toml", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--deviations", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "1 passed" in done.stdout
    assert "lora / PEFT / logits: largest difference 1.0e-07 became 2.0e-06" in done.stdout
    assert 'make parity REASON="why"' in done.stdout
    assert json.loads((tmp_path / "parity.json").read_text()) == [row("lora", 1e-7)]
