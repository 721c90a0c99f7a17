"""One optimizer step costs what it cost: operations, operator calls and bytes alive at the peak."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.golden import kept, machine
from tests.golden.counters import ATTENTION, CELLS, LIMITS, QUICK, Calls, FlopCounterMode, count, grown

CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CELLS]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """The counters that are kept; tests skip where other versions run other operators."""
    file = kept.read(kept.COUNTERS)
    if unlike := machine.unlike(file["versions"], machine.versions()):
        pytest.skip(f"counters are of other versions: {unlike}")
    return file["entries"]


@pytest.mark.parametrize("name", CASES)
def test_a_step_costs_what_it_cost(name: str, golden: dict[str, Any]) -> None:
    above = grown(golden[name], count(CELLS[name]))
    assert not above, f'{name}: {"; ".join(above)}; if this is meant: make golden-renew REASON="why" ONLY=counters'


def test_every_cell_is_kept_with_a_reason() -> None:
    entries = kept.read(kept.COUNTERS)["entries"]
    assert entries.keys() == CELLS.keys()
    assert all(entry["reason"].strip() and entry.keys() == {*LIMITS, "reason"} for entry in entries.values())


def test_growth_is_told_above_its_limit_only() -> None:
    before = {"flops": 10_000, "calls": 100, "bytes": 1000}
    assert grown(before, {"flops": 10_050, "calls": 102, "bytes": 1020}) == []
    assert grown(before, {"flops": 5_000, "calls": 50, "bytes": 10}) == []
    assert grown(before, {"flops": 10_051, "calls": 103, "bytes": 1021}) == [
        "flops 10,000 became 10,051 (+0.51 %)",
        "calls 100 became 103 (+3.00 %)",
        "bytes 1,000 became 1,021 (+2.10 %)",
    ]


def test_attention_on_a_cpu_is_counted() -> None:
    """Two products of (T x D) with (D x T) and (T x T) with (T x D) for each head: 2 * 2 * T * T * D; backward 5 of them."""
    B, H, T, D = 2, 3, 8, 4
    q, k, v = (torch.randn(B, H, T, D, requires_grad=True) for _ in range(3))
    product = 2 * B * H * T * T * D
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert flops.get_total_flops() == 2 * product
        out.sum().backward()
    assert flops.get_total_flops() == (2 + 5) * product


def test_every_operator_is_a_call_of_the_backward_pass_too() -> None:
    """x * x is one call; its backward pass multiplies twice by x and adds both."""
    x = torch.ones(3, requires_grad=True)
    with Calls() as forward:
        y = x * x
    with Calls() as backward:
        y.backward(torch.ones(3))
    assert forward.number == 1 and backward.number >= 3
