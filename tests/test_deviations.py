"""The recorder of parity tests: what it measures, and what it makes of many cases."""

from __future__ import annotations

import pytest
import torch

from tests.deviations import distance, noting, rows, table, words


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
