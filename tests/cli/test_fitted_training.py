"""What `new --from-data` makes of the size of a model and the number of rows: rate, epochs, what trains, evaluations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmrecipe.cli.fitted import Fitted
from llmrecipe.cli.fitted_training import fit_training


def fit(
    rows: str,
    count: int,
    parameters: int | None,
    stack: str = "lora",
    objective: str = "sft",
    length: int = 50,
    epochs: float = 3,
) -> Fitted:
    reading: Any = SimpleNamespace(rows=rows)
    settings = {"data": {"validation": 0.2}, "batch": {"size": 8}}
    found = Fitted("mine", "rows.csv", "sft_lora", objective, reading, count, [], settings=settings)
    model = SimpleNamespace(init="pretrained")
    methods: dict[str, Any] = {name: {} for name in stack.split(",") if name}
    parent: Any = SimpleNamespace(model=model, epochs=epochs, stack=methods, optim={"lr": 2e-3}, batch=SimpleNamespace(size=16))
    fit_training(found, parent, parameters, [length] * count)
    return found


def test_a_small_model_learns_answers_by_heart() -> None:
    """40 rows, 32 to train on, 4 steps of 8 an epoch: 50 epochs are 200 steps; the last weights are kept."""
    found = fit("dialogue", 40, 1_800_000)
    assert found.parent == "sft" and found.settings["epochs"] == 50 and found.settings["optim"] == {"lr": 2e-3}
    assert found.settings["eval"] == {"load_best": False}
    assert any("50 (200 steps)" in line for line in found.remarks)
    # 400 of 500 rows of 100 tokens are 40,000 tokens an epoch, and all epochs have at most 500,000.
    assert fit("dialogue", 500, 1_800_000, length=100).settings["epochs"] == 12
    assert fit("dialogue", 50_000, 1_800_000).settings["epochs"] == 3


@pytest.mark.parametrize(
    ("rows", "stack", "parameters", "rate"),
    [
        ("dialogue", "lora", 135_000_000, 5e-4),
        ("dialogue", "lora", 600_000_000, 2e-4),
        ("dialogue", "nf4,lora", 8_000_000_000, 2e-4),
        ("dialogue", "", 600_000_000, 1e-5),
        ("labelled", "", 110_000_000, 5e-5),
        ("preference", "lora", 600_000_000, 5e-5),
        ("dialogue", "lora", None, 2e-4),
    ],
)
def test_the_rate_follows_the_size(rows: str, stack: str, parameters: int | None, rate: float) -> None:
    found = fit(rows, 4000, parameters, stack)
    assert found.settings["optim"] == {"lr": rate} and found.parent == "sft_lora"
    assert any(line.startswith(f"rate         {rate:g}, usual for") for line in found.remarks)


def test_few_rows_are_read_more_often_within_bounds() -> None:
    """A hundred steps at least, ten epochs of answers and twenty of labels at most; preferences are not read more often."""
    assert fit("dialogue", 40, 600_000_000).settings["epochs"] == 10
    assert fit("labelled", 40, 600_000_000, "").settings["epochs"] == 20
    assert fit("labelled", 40, 1_800_000, "").settings["epochs"] == 20
    assert fit("dialogue", 250, 600_000_000).settings["epochs"] == 4  # 25 steps an epoch
    large = fit("dialogue", 4000, 600_000_000)
    assert "epochs" not in large.settings and large.settings["eval"] == {"every": 400}
    assert fit("preference", 4000, 600_000_000, epochs=4).settings["epochs"] == 1
    assert "epochs" not in fit("preference", 40, 1_800_000, epochs=4).settings


def test_what_is_not_known_is_left_alone() -> None:
    """The rates of other methods, and what another objective trains."""
    assert "optim" not in fit("dialogue", 40, 600_000_000, "ia3").settings
    assert fit("dialogue", 40, 1_800_000, objective="gkd").parent == "sft_lora"
