"""The study of directions: its rule, its pairing and its page on numbers worked by hand, and that its table holds together."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llmrecipe.recipe.compose import compose
from tests.benchmarks import directions
from tests.benchmarks.claims import ACCURACY, ARMS, CLAIMS, LOSS, SPREAD, Arm, Claim, Comparison
from tests.benchmarks.directions import COMMON, Runs

RIGHT = {("a", 0): 0.9, ("a", 1): 0.7, ("b", 0): 0.8}
LEFT = {("a", 0): 0.8, ("a", 1): 0.7, ("b", 0): 0.75, ("b", 1): 0.1}


@pytest.mark.parametrize(
    ("difference", "error", "margin", "expected"),
    [
        (0.0201, 0.01, 0.0, "confirmed"),
        (0.0199, 0.01, 0.0, "undecided"),
        (-0.0199, 0.01, 0.0, "undecided"),
        (-0.0201, 0.01, 0.0, "not reproduced"),
        (-0.005, 0.01, 0.03, "confirmed"),
        (-0.005, 0.01, 0.02, "undecided"),
        (-0.05, 0.01, 0.02, "not reproduced"),
        (0.5, None, 0.0, "undecided"),
        (0.0, 0.0, 0.0, "undecided"),
    ],
)
def test_the_rule(difference: float, error: float | None, margin: float, expected: str) -> None:
    assert directions.verdict(difference, error, margin) == expected


def test_differences_are_paired_and_less_is_better_for_losses() -> None:
    """Differences 0.1, 0, 0.05: mean 0.05, standard deviation 0.05, s.e. 0.05 / sqrt(3); (b, 1) has no partner."""
    difference, error, pairs = directions.paired(RIGHT, LEFT, ACCURACY)
    assert (difference, error, pairs) == pytest.approx((0.05, 0.05 / math.sqrt(3), 3))
    assert directions.paired(RIGHT, LEFT, LOSS)[0] == pytest.approx(-0.05)
    assert directions.paired({("a", 0): 1.0}, {("a", 0): 0.5}, ACCURACY) == (0.5, None, 1)


def test_a_spread_is_the_deviation_of_the_losses_over_their_mean() -> None:
    """Losses 1, 2, 3: deviation 1, mean 2."""
    runs = [{LOSS: value, ACCURACY: value / 4} for value in (1.0, 2.0, 3.0)]
    assert [directions.score(runs, m) for m in (SPREAD, LOSS, ACCURACY)] == [0.5, 2.0, 0.5]


ARM = {"wide": Arm("recipe=wide target=q|v"), "thin": Arm("recipe=thin", ("optim.lr=1", "optim.lr=2"))}
CLAIM = {
    "size": Claim("Wide is better", "1234.56789", ("a",), "steps=2", 2, (Comparison("wide", "thin", LOSS),)),
    "later": Claim("Thin is better", "1234.56780", ("a",), "steps=2", 2, (Comparison("thin", "wide"),)),
}


def run(accuracy: float, loss: float) -> dict[str, float]:
    return {ACCURACY: accuracy, LOSS: loss, "trained": 1200}


RUNS: Runs = {
    "wide": {("a", 0): [run(0.5, 1.0)], ("a", 1): [run(0.75, 2.0)]},
    "thin": {("a", 0): [run(0.5, 3.0), run(0.5, 1.0)], ("a", 1): [run(0.25, 4.0), run(0.25, 4.0)]},
}


def test_the_page_and_the_facts(tmp_path: Path) -> None:
    """Losses: wide 1, 2; thin 2, 4 (means of two runs): differences 1, 2, mean 1.5, s.e. 0.5."""
    directions.write(tmp_path, "small", ARM, CLAIM, {"size": RUNS})
    page = (tmp_path / "directions.md").read_text().splitlines()
    assert "| size | wide | thin | test/loss | +1.50 ± 0.5000 |  | 2 | confirmed |" in page
    assert f"Model: small. Every run: `{' '.join(COMMON)}`." in page
    assert "Not run: later (thin / wide)." in page
    assert "Wide is better (arXiv 1234.56789). a; `steps=2`." in page
    assert "| wide | `recipe=wide target=q\\|v` | 62.50 ± 17.68 | 1.50 ± 0.7071 | 1,200 | 2 |" in page
    assert "| thin | `recipe=thin [optim.lr=1 / optim.lr=2]` | 37.50 ± 17.68 | 3.00 ± 1.41 | 1,200 | 2 |" in page
    assert "## later" not in page
    facts = json.loads((tmp_path / "directions.json").read_text())
    assert facts["model"] == "small" and list(facts["claims"]) == ["size"]
    assert facts["claims"]["size"]["comparisons"][0] | {"better": ""} == {
        "better": "", "worse": "thin", "metric": LOSS, "margin": 0.0, "difference": 1.5, "error": 0.5, "pairs": 2,
        "verdict": "confirmed",
    }  # fmt: skip
    assert facts["claims"]["size"]["runs"][0] == {"arm": "wide", "data": "a", "seed": 0, "runs": [run(0.5, 1.0)]}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe_with_its_words(name: str) -> None:
    assert any(name in claim.arms() for claim in CLAIMS.values())
    words = [word.replace("{seed}", "1") for word in (*COMMON, *ARMS[name].words.split(), *ARMS[name].each[0].split())]
    recipe = compose(words.pop(len(COMMON)).removeprefix("recipe="), words).recipe
    assert recipe.objective["kind"] == "classification" and recipe.batch.size == 16


def test_every_arm_of_a_claim_is_there() -> None:
    assert {name for claim in CLAIMS.values() for name in claim.arms()} == set(ARMS)


def test_a_claim_stops_where_nothing_more_may_start(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{part}.jsonl").write_text(f'"{part}"\n')
    study = directions.Study("m", tmp_path, tmp_path / "runs", lambda: False)
    assert directions.ask(study, ARM, CLAIM["size"]) == {"wide": {}, "thin": {}}
    assert (study.rows("a") / "test.jsonl").read_text() == '"valid"\n"test"\n'
