"""AutoPEFT: a point of its space is a stack of plain wrappers, its cost a closed form, and the search finds a planted front."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.hybrid.autopeft import Autopeft, size_at
from llmrecipe.pipelines.run_stages import Pipeline, Result
from llmrecipe.pipelines.search import study
from llmrecipe.pipelines.search.costs import hypervolume
from llmrecipe.pipelines.search.samplers import new_study, sample_trial
from llmrecipe.pipelines.search.space import distributions, point_of, point_words
from llmrecipe.pipelines.search.study import Search
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import Planned
from llmrecipe.recipe.search_section import SearchSection
from tests.methods.additive.harness import model_of
from tests.methods.hybrid.written import stands_for

TEXT = """
autopeft_adapter: {kind: adapter, placement: pfeiffer, sizes: {'0': 4, '1': 0}}
autopeft_parallel_adapter: {kind: parallel_adapter, sizes: {'0': 8, '1': 0}, scale: 1.0}
autopeft_prefix_tuning: {kind: prefix_tuning, reparam: flat, hidden: 6, sizes: {'0': 2, '1': 0}}
"""


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_it_is_the_stack_it_prints(family: str) -> None:
    options = {"adapter": 3, "parallel_adapter": 2, "prefix_tuning": 4, "scale": 1.0, "layers": {"1": False}}
    options |= {"reparam": "flat", "hidden": 6}
    stands_for(family, Autopeft(name="autopeft", **options), TEXT)


def test_parts_and_layers_that_are_off_are_not_there() -> None:
    stands_for("llama", Autopeft(name="autopeft", adapter=9, parallel_adapter=10, prefix_tuning=10), """
autopeft_adapter: {kind: adapter, placement: pfeiffer, sizes: {'0': 1, '1': 1}}
""")  # fmt: skip
    off = {"adapter": 10, "parallel_adapter": 10, "prefix_tuning": 10}
    for options, told in (
        (off, r"every part is off"),
        ({"layers": {"0": False, "1": False}}, "every layer is off"),
        ({"layers": {"2": True}}, r"layers\.2: this model has layers 0 to 1"),
    ):
        with pytest.raises(RecipeError, match=told):
            Autopeft(name="autopeft", **options).expand(model_of("llama"))


def cost(d: int, d_kv: int, layers: int, b: int, c: int, p: int) -> int:
    """What a run leaves: adapters with biases, and columns."""
    return layers * (sum((2 * d + 1) * r + d for r in (b, c) if r) + 2 * d_kv * p)


def test_the_cost_of_every_kind_of_point_is_the_closed_form() -> None:
    with torch.device("meta"):
        for k, m, n, first in itertools.product((0, 3, 9, 10), (1, 10), (2, 10), (True, False)):
            if (k, m, n) == (10, 10, 10):
                continue
            model = model_of("llama")
            stack = Stack([Autopeft(name="a", adapter=k, parallel_adapter=m, prefix_tuning=n, layers={"0": first}, hidden=4)])
            stack.attach(model)
            stack.finish(model)
            sizes = [size_at(32, x) for x in (k, m, n)]
            left = sum(t.numel() for t in stack.delta(model).values())
            assert left == cost(32, 16, 1 + first, *sizes), (k, m, n)


def test_a_gene_and_its_recipe_are_one_to_one() -> None:
    search = compose("autopeft").recipe.search
    assert search is not None and len(search.space) == 3 + 4
    point = dict(zip(search.space, (2, 10, 9, True, False, True, True), strict=True))
    stack = compose("autopeft", point_words(point)).recipe.stack["autopeft"]
    assert (stack["adapter"], stack["parallel_adapter"], stack["prefix_tuning"]) == (2, 10, 9)
    assert stack["layers"] == {"0": True, "1": False, "2": True, "3": True}


# --- the search -------------------------------------------------------------------------------------------------------

D, KV, LAYERS = 128, 64, 4


def planted(point: dict[str, Any]) -> tuple[float, int]:
    """Score and cost: parallel adapters help most, serial ones less, a prefix not at all, and only in the last two layers."""
    b, c, p = (size_at(D, point[part]) for part in ("adapter", "parallel_adapter", "prefix_tuning"))
    on = [point["layers"][str(i)] for i in range(len(point["layers"]))]
    useful = on[-2] + on[-1]
    score = 0.25 + 0.3 * useful * (0.8 * (1 - 2.0 ** (-c / 8)) + 0.2 * (1 - 2.0 ** (-b / 8)))
    return score, cost(D, KV, sum(on), b, c, p)


class Planted:
    """Stands in for training: a run leaves the planted score and cost; one with nothing on cannot be built."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, pipeline: Pipeline, planned: Planned, enough: Any = None) -> Result:
        own = planned.composition.recipe.stack["autopeft"]  # type: ignore[union-attr]
        on = {str(i): own["layers"].get(str(i), True) for i in range(LAYERS)}
        if not any(on.values()) or all(own[p] == 10 for p in ("adapter", "parallel_adapter", "prefix_tuning")):
            raise RunError("nothing would train")
        if not (planned.dir / "status.json").is_file():
            self.runs += 1
            score, spent = planted({**own, "layers": on})
            planned.dir.mkdir(parents=True)
            (planned.dir / "recipe.yaml").write_text("{}", encoding="utf-8")
            (planned.dir / "status.json").write_text(json.dumps({"status": "done"}), encoding="utf-8")
            (planned.dir / "report.json").write_text(json.dumps({"trained": {"parameters": spent}}), encoding="utf-8")
            event = {"event": "evaluation", "step": 4, "eval/accuracy": score}
            (planned.dir / "events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
        return Result(planned.name, "trained", 4, "", 0.0, str(planned.dir))


def run_search(folder: Path, *words: str) -> tuple[Search, list[Any]]:
    """The recipe's search in a folder."""
    every = [*words, f"run.dir={folder}"]
    found = Search("autopeft", every, compose("autopeft", every))
    found.folder.mkdir(parents=True, exist_ok=True)
    return found, found.run()


def test_points_by_hand_come_first_and_one_that_cannot_be_built_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Planted()
    monkeypatch.setattr(study, "run_stage", lab)
    off = "{" + ", ".join(f"stack.autopeft.{p}: 10" for p in ("adapter", "parallel_adapter", "prefix_tuning"))
    off += "".join(f", stack.autopeft.layers.{i}: true" for i in range(4)) + "}"
    hand = off.replace("parallel_adapter: 10", "parallel_adapter: 4")
    found, trials = run_search(tmp_path / "run", "search.trials=2", f"search.start=[{hand}, {off}]")
    assert [t.state for t in trials] == ["done", "failed"] and found.best(trials).number == 0
    assert trials[0].costs == {"parameters": cost(D, KV, 4, 0, 8, 0)} and lab.runs == 1
    with pytest.raises(RunError, match="nothing would train"):
        run_search(
            tmp_path / "none",
            "stack.autopeft.adapter=10",
            "stack.autopeft.parallel_adapter=10",
            "stack.autopeft.prefix_tuning=10",
            "search.start=[]",
            "search.space={optim.lr: [1e-3, 1e-2, 1e-1, 2e-1]}",
            "search.sampler=grid",
        )
    assert len((tmp_path / "none" / "trials.jsonl").read_text().splitlines()) == 3  # a head, and the two that failed alone


PARTS = ("adapter", "parallel_adapter", "prefix_tuning")


def sampled(sampler: str, seed: int, trials: int, layers: int = LAYERS) -> list[tuple[float, int]]:
    """Planted score and cost of what the search layer tries, without composing a recipe for each; invalid points fail."""
    from optuna.trial import TrialState, create_trial

    keys: dict[str, Any] = {f"stack.autopeft.{part}": {"low": 0, "high": 10} for part in PARTS}
    keys |= {f"stack.autopeft.layers.{i}": [True, False] for i in range(layers)}
    section = SearchSection(space=keys, sampler=sampler, against=["parameters"], seed=seed)
    known, found = new_study(section, "max"), []
    for number in range(trials):
        drawn = sample_trial(known, section, number)
        point = {key.removeprefix("stack.autopeft."): value for key, value in point_of(section, drawn.params).items()}
        on = {str(i): point[f"layers.{i}"] for i in range(layers)}
        about = {"params": drawn.params, "distributions": distributions(section)}
        fresh = new_study(section, "max")
        fresh.add_trials([trial for trial in known.trials if trial.state.is_finished()])
        if any(on.values()) and any(point[part] != 10 for part in PARTS):
            found.append(planted({**point, "layers": on}))
            fresh.add_trial(create_trial(**about, values=list(found[-1])))
        else:
            fresh.add_trial(create_trial(**about, state=TrialState.FAIL))
        known = fresh
    return found


@pytest.mark.slow
def test_the_planted_optimum_is_found_and_chance_is_beaten_at_equal_cost(record_property: Any) -> None:
    """30 trials, three seeds: the best score is 0.85, and the area under the front, on average, larger than by chance."""
    areas: dict[str, list[float]] = {"gp": [], "random": []}
    for sampler, seed in itertools.product(areas, range(3)):
        found = sampled(sampler, seed, 30)
        areas[sampler].append(area(found))
        assert sampler == "random" or max(score for score, _ in found) > 0.845
    record_property("areas", areas)
    assert sum(areas["gp"]) > 1.1 * sum(areas["random"]) and min(areas["gp"]) > 0.75


def area(found: list[tuple[float, int]], layers: int = LAYERS) -> float:
    """Share under the front of score over numbers; the most of any point is about 80,000 a layer."""
    return hypervolume([(-score, spent / (50_000 * layers)) for score, spent in found], (-0.2, 1.0)) / 0.65


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_chance_is_beaten_over_twelve_switches(record_property: Any) -> None:
    """The size of BERT-base's space: 100 trials, five seeds."""
    areas = {sampler: [area(sampled(sampler, seed, 100, 12), 12) for seed in range(5)] for sampler in ("gp", "random")}
    record_property("areas", areas)
    assert sum(areas["gp"]) > 1.05 * sum(areas["random"])
