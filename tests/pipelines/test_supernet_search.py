"""Evolution of sub-networks: legal, never twice, better than chance on a planted problem; the step goes on where it stopped."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.core.errors import Interrupted, RecipeError
from llmrecipe.evaluation import evaluate_model
from llmrecipe.pipelines.search.evolution import Candidate, Evolution, Settings, Space, crossed, key_of, mutant
from llmrecipe.pipelines.steps.run_step import run_step
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.step_spec import compose_step
from llmrecipe.runs.run_record import read_run
from tests.trainings import train_recipe

SIZES = {"lora": [1, 5, 10], "adapter": [1, 5, 10], "prompt": [1, 5, 10]}
DEPTHS = [3, 6, 9, 12]
BEST = {"lora": (10, 5, 1), "adapter": (1, 1, 1, 5, 5, 10), "prompt": (5,) * 9}


def total(candidate: Candidate) -> int:
    return sum(sum(row) for row in candidate.values())


def distance(candidate: Candidate, best: Candidate = BEST) -> float:
    """How far a candidate is from the planted one, layer by layer."""
    return float(
        sum(abs(a - b) for kind, row in candidate.items() for a, b in itertools.zip_longest(row, best[kind], fillvalue=0))
    )


def evolved(space: Space, seed: int, settings: Settings, best: Candidate = BEST) -> tuple[float, list[Candidate]]:
    search, tried = Evolution(space, settings, seed), []
    for _ in range(15):
        candidates = search.next()
        tried += candidates
        search.scored(candidates, [distance(c, best) for c in candidates])
    return search.ranked[0][0], tried


def test_nothing_is_scored_twice_or_above_the_limit_and_the_rest_follows_from_the_seed() -> None:
    space = Space(SIZES, DEPTHS, total, 100)
    _, tried = evolved(space, 3, Settings())
    assert len(tried) == 15 * 50 == len({key_of(c) for c in tried})
    assert max(map(total, tried)) <= 100
    assert all(len(row) in DEPTHS and set(row) <= set(SIZES[kind]) for c in tried for kind, row in c.items())
    assert evolved(space, 3, Settings())[1] == tried and evolved(space, 4, Settings())[1] != tried


def test_evolution_finds_more_of_a_planted_optimum_than_chance() -> None:
    space = Space(SIZES, DEPTHS, total, 100)
    by_chance = Settings(crossover=0, mutation=0)
    found = [evolved(space, seed, Settings())[0] for seed in range(5)]
    drawn = [evolved(space, seed, by_chance)[0] for seed in range(5)]
    assert max(found) < min(drawn)


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_optimum_is_found_to_the_gene(seed: int) -> None:
    """One of (27 + 729)^3, 432 million, among 750 that are scored; chance is far from it with as many."""
    best = {"lora": (10, 5, 1), "adapter": (1, 1, 5, 5, 10, 10), "prompt": (5,) * 3}
    space = Space(SIZES, [3, 6], total, 100)
    assert evolved(space, seed, Settings(), best)[0] == 0.0
    assert evolved(space, seed, Settings(crossover=0, mutation=0), best)[0] > 10.0


def test_a_space_that_is_exhausted_ends_and_a_limit_below_it_is_refused() -> None:
    small = Space({"lora": [1, 2]}, [1, 2], total, 3)
    search = Evolution(small, Settings(population=9, parents=2), 0)
    first = search.next()
    # (1), (2), (1, 1), (1, 2), (2, 1); (2, 2) costs 4
    assert sorted(c["lora"] for c in first) == [(1,), (1, 1), (1, 2), (2,), (2, 1)]
    search.scored(first, [0.0] * 5)
    assert search.next() == []
    with pytest.raises(RecipeError, match="limit: 2 parameters are fewer than the 3 of the smallest"):
        Space(SIZES, [1], total, 2).check("limit")


def test_mutants_and_crossings() -> None:
    space = Space(SIZES, DEPTHS, total, 1000)
    parent, other = dict.fromkeys(SIZES, (1,) * 6), dict.fromkeys(SIZES, (10,) * 3)
    chance = random.Random(0)
    for _ in range(50):
        child = crossed(parent, other, chance)
        assert all(row in (parent[kind], other[kind]) for kind, row in child.items())
        reference = mutant(parent, space, Settings(mutate="reference"), chance)
        assert all(row[:6] == (1,) * min(6, len(row)) for row in reference.values())
    unchanged = Settings(m_prob=0.0, s_prob=0.0)
    assert mutant(parent, space, unchanged, chance) == parent
    depths = [len(mutant(parent, space, Settings(m_prob=0.0, s_prob=0.4), chance)["lora"]) for _ in range(2000)]
    # redrawn with 0.4, of which a quarter gives the same depth
    assert sum(d != 6 for d in depths) / 2000 == pytest.approx(0.3, abs=0.05)
    sizes = [s for _ in range(300) for s in mutant(parent, space, Settings(m_prob=0.3, s_prob=0.0), chance)["prompt"]]
    assert sum(s != 1 for s in sizes) / len(sizes) == pytest.approx(0.2, abs=0.05)


QUICK = ["epochs=null", "steps=3", "data.limit=64", "eval.at_start=false", "eval.batches=1"]
STEP = [
    "limit=9000", "population=4", "parents=2", "mutation=1", "crossover=1", "generations=2", "retrain=1", "val_batches=1",
    f"words={json.dumps(QUICK)}", "log.live=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supernet") / "run"
    train_recipe(folder, "noah", *QUICK)
    return folder


@pytest.mark.slow
def test_a_stopped_search_scores_nothing_again_and_leaves_a_plain_recipe(
    supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = evaluate_model.metrics_of, []

    def counted(*given: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(evaluate_model, "metrics_of", counted)
    words = [f"model='{supernet}'", *STEP, f"run.dir={tmp_path / 'found'}"]
    with pytest.raises(Interrupted):
        run_step(compose_step("supernet_search", words))
    run_step(compose_step("supernet_search", words))
    folder = tmp_path / "found"
    population = [json.loads(line) for line in (folder / "population.jsonl").read_text().splitlines()]
    different = {json.dumps(entry["design"]) for entry in population}
    # Besides every design: the call that was interrupted, and the one that scores the winner's rows for its interval.
    assert len(population) == 16 and len(calls) == len(different) + 2
    assert all(entry["parameters"] <= 9000 for entry in population)
    best = min((e for e in population if e["origin"] == "evolution"), key=lambda e: e["score"])
    plain = compose(folder / "searched.yaml")
    assert list(plain.recipe.stack) == ["lora", "adapter", "vpt"] and plain.recipe.search is None
    sizes = {kind: {layer: row.get(layer, 0) for layer in "01"} for kind, row in best["design"].items()}
    names = {"lora": "lora", "adapter": "adapter", "prompt": "vpt"}
    assert {kind: plain.recipe.stack[names[kind]]["sizes"] for kind in sizes} == sizes
    metrics = json.loads((folder / "final" / "metrics.json").read_text())
    head = 128 * 4 + 4
    assert metrics["parameters"] == best["parameters"] + head
    assert read_run(folder / "best").curve("eval/loss")[-1][1] == pytest.approx(metrics["eval/loss"])
    assert (folder / "table.md").read_text().count("| evolution |") == 1


def test_wrong_settings_are_named(supernet: Path, tmp_path: Path) -> None:
    where = f"run.dir={tmp_path / 'x'}"
    with pytest.raises(RecipeError, match=r"limit: 9 parameters are fewer than the [\d,]+ of the smallest sub-network"):
        run_step(compose_step("supernet_search", [f"model='{supernet}'", *STEP, "limit=9", where]))
    with pytest.raises(RecipeError, match="parents: 10 is more than the 4"):
        run_step(compose_step("supernet_search", [f"model='{supernet}'", *STEP, "parents=10", f"{where}y"]))
    plain = tmp_path / "plain"
    train_recipe(plain, "vpt", *QUICK)
    with pytest.raises(RecipeError, match="has no noah; train one with recipe=noah"):
        run_step(compose_step("supernet_search", [f"model='{plain}'", *STEP, f"{where}z"]))


def test_the_pipeline_of_the_package_fits_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run_command(["check", "recipe=noah_search"]) == 0
    assert "supernet_search" in capsys.readouterr().out
