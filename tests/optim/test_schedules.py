"""Schedules against values worked by hand, and against Transformers' curves where the definitions coincide."""

from __future__ import annotations

import math

import pytest
import torch

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.optim.optimizer import set_learning_rate


def curve(kind: str, steps: int, **options) -> list[float]:
    schedule = registry.load_class("schedule", kind)(**options)
    return [schedule.factor(step, steps) for step in range(steps)]


def test_every_schedule_has_hand_worked_values_below():
    assert registry.names("schedule") == ["constant", "cosine", "inverse_sqrt", "linear", "wsd"]


def test_constant_with_and_without_warmup():
    assert curve("constant", 3) == [1.0, 1.0, 1.0]
    assert curve("constant", 5, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_by_hand():
    # 10 steps, 2 of warm-up: 1/2, 1, then 1 - p with p = (step - 2) / 8.
    assert curve("linear", 10, warmup=2) == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert curve("linear", 4, min_ratio=0.5) == pytest.approx([1, 0.875, 0.75, 0.625])


def test_cosine_by_hand():
    # p = 0, 1/4, 1/2, 3/4; cos(pi p) = 1, sqrt(1/2), 0, -sqrt(1/2).
    root = math.sqrt(0.5)
    assert curve("cosine", 4) == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2])
    assert curve("cosine", 4, min_ratio=0.1)[2] == pytest.approx(0.1 + 0.9 * 0.5)


def test_wsd_by_hand():
    assert curve("wsd", 8, warmup=2, decay=4, shape="linear") == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert curve("wsd", 8, decay=4, shape="sqrt")[4:] == pytest.approx([1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])
    assert curve("wsd", 8, decay=4, shape="cosine", min_ratio=0.2)[6] == pytest.approx(0.2 + 0.8 * 0.5)


def test_inverse_sqrt_by_hand():
    # Peak 1 at update 4, then sqrt(4 / n): n = 9 gives 2/3, n = 16 gives 1/2.
    values = curve("inverse_sqrt", 16, warmup=4)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[8] == pytest.approx(2 / 3) and values[15] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd", "inverse_sqrt"])
def test_warmup_given_as_a_share_equals_the_same_number_of_steps(kind):
    assert curve(kind, 40, warmup=0.1) == curve(kind, 40, warmup=4)
    assert curve(kind, 40, warmup=0.1)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_curves_end_where_they_are_told_to(kind):
    schedule = registry.load_class("schedule", kind)(min_ratio=0.3, warmup=3)
    assert schedule.factor(50, 50) == pytest.approx(0.3)
    assert schedule.factor(60, 50) == pytest.approx(0.3)


def test_same_curve_as_transformers_without_warmup():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for kind, theirs in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = theirs(optimizer, 0, 17)
        rates = []
        for _ in range(17):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert curve(kind, 17) == pytest.approx(rates, abs=1e-12)


def test_resuming_anywhere_gives_the_same_rates():
    """A schedule has no state: the rates after step k do not depend on what came before."""
    whole = curve("cosine", 12, warmup=3)
    schedule = registry.load_class("schedule", "cosine")(warmup=3)
    for k in range(12):
        assert [schedule.factor(step, 12) for step in range(k, 12)] == whole[k:]


def test_rates_of_groups_keep_their_ratio():
    one, two = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD(
        [{"params": [one], "lr": 1.0, "initial_lr": 1.0}, {"params": [two], "lr": 16.0, "initial_lr": 16.0}]
    )
    for factor in (0.5, 0.25):
        assert set_learning_rate(optimizer, factor) == factor
        assert [g["lr"] for g in optimizer.param_groups] == [factor, 16 * factor]


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(RecipeError, match=r"schedule\.warmup: 11 steps of warm-up do not fit into a run of 10"):
        registry.load_class("schedule", "linear")(warmup=11).check(10)
    with pytest.raises(RecipeError, match=r"6 steps of warm-up and 5 of decay"):
        registry.load_class("schedule", "wsd")(warmup=6, decay=5).check(10)
    registry.load_class("schedule", "linear")(warmup=10).check(10)


@pytest.mark.parametrize("warmup", [-1, 1.0, 1.5, "3"])
def test_impossible_warmups_are_refused(warmup):
    with pytest.raises(ValueError, match="warmup"):
        registry.load_class("schedule", "linear")(warmup=warmup)
