"""Each pass of an evaluation is made once, and the numbers are those of separate passes of `evaluate` and `collect`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.core import registry
from llmrecipe.objectives.base import Objective
from tests.objectives.harness import READ, Case

COLLECTING = [n for n in READ if registry.load_class("objective", n).collect is not Objective.collect]


def evaluated(case: Case, batch: Any) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """What an evaluation reads of a batch."""
    found = case.objective.evaluate(batch, case.roles)
    return {n: [float(v), float(c)] for n, (v, c) in found.items()}, case.objective.collect(batch, case.roles)


@pytest.mark.parametrize("name", COLLECTING)
def test_what_is_collected_takes_no_pass_of_its_own(name: str) -> None:
    case = Case(name)
    rows = case.rows if name != "dae" else [{**row, "outlier": row["row"] % 2} for row in case.rows]
    case.roles.data = type(case.roles.data)(rows)
    batch = case.objective.collate(case.objective.evaluation_rows(case.roles.data, [0, 1, 2]), case.roles)
    passes: list[int] = []
    case.roles.prepared.register_forward_hook(lambda *_: passes.append(1))
    with case.roles.evaluating(), torch.no_grad():
        case.objective.evaluate(batch, case.roles)
        first = len(passes)
        apart = evaluated(case, batch)
        most = max(first, len(passes) - 2 * first)
        passes.clear()
        with case.roles.each_pass_once():
            together = evaluated(case, batch)
    assert 0 < len(passes) <= most
    assert together[0] == apart[0] and together[1].keys() == apart[1].keys()
    for key, value in apart[1].items():
        # The scores of a reference are kept in float32.
        torch.testing.assert_close(together[1][key], value, rtol=0, atol=1e-6, equal_nan=True)


def test_another_pass_is_made_and_nothing_is_kept_behind_the_evaluation() -> None:
    """Other wrappers switched off, other outputs and another batch of the same rows are passes of their own."""
    from llmrecipe.core.forward_context import Context, activate

    case = Case("hyper_mtf")
    batch = case.objective.collate(case.rows[:2], case.roles)
    passes: list[int] = []
    case.roles.prepared.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad(), case.roles.each_pass_once():
        first = case.roles.policy(batch)
        assert case.roles.policy(batch)["logprobs"] is first["logprobs"]
        case.roles.policy(batch, entropy=True)
        with activate(Context(off=frozenset({"hypertuning"}))):
            case.roles.policy(batch)
        case.roles.policy(batch.with_extra())
    assert len(passes) == 4
    with torch.no_grad():
        case.roles.policy(batch)
        case.roles.policy(batch)
    assert len(passes) == 6
