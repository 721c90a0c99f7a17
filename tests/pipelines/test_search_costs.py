"""A search of score against costs: a planted front is found, goes on where it was stopped, and leaves plain recipes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmrecipe.core.errors import Interrupted, RecipeError, RunError
from llmrecipe.pipelines.search import costs, samplers, study
from llmrecipe.pipelines.search.costs import costs_of, hypervolume
from llmrecipe.pipelines.search.display import picture
from llmrecipe.pipelines.search.study import Search
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.recipe.compose import compose
from tests.pipelines.test_search import Lab, searched

RECIPE = """
defaults: [/sft_lora, _self_]
search:
  space: {stack.lora.r: {low: 1, high: 32}, optim.lr: {low: 1e-5, high: 1e-1, log: true}}
  against: [parameters]
  trials: 24
"""


def loss_of(recipe: Any) -> float:
    """Falls with the rank and has its valley at lr 1e-3."""
    return 4.0 / recipe.stack["lora"]["r"] + (math.log10(recipe.optim["lr"]) + 3) ** 2


class Costly(Lab):
    """Runs that also leave what they cost: 100 numbers a rank, peak memory 7 MB."""

    def __call__(self, pipeline: Any, planned: Any, enough: Any = None) -> Any:
        result = super().__call__(pipeline, planned, enough)
        recipe = planned.composition.recipe
        report = {"trained": {"parameters": 100 * recipe.stack["lora"]["r"]}}
        (planned.dir / "report.json").write_text(json.dumps(report), encoding="utf-8")
        step = {"event": "step", "step": 1, "loss": 1.0, "peak_mem_mb": 7.0, "tokens": 10, "tokens_per_s": 5.0, "time": 2.0}
        evaluation = {"event": "evaluation", "step": 4, "eval/loss": loss_of(recipe)}
        lines = "".join(json.dumps(event) + "\n" for event in (step, evaluation))
        (planned.dir / "events.jsonl").write_text(lines, encoding="utf-8")
        return result


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Costly:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    found = Costly()
    monkeypatch.setattr(study, "run_stage", found)
    return found


def row(trial: Trial) -> tuple[float, float]:
    """Score and cost."""
    assert trial.value is not None
    return trial.value, trial.costs["parameters"]


def test_the_front_of_a_grid_is_the_planted_one(lab: Costly) -> None:
    words = ["search.sampler=grid", "search.space={stack.lora.r: [1, 2, 4, 8], optim.lr: [1e-4, 1e-3]}"]
    found, trials = searched(*words)
    front = found.front(trials)
    assert [row(t) for t in front] == [(4.0, 100.0), (2.0, 200.0), (1.0, 400.0), (0.5, 800.0)]
    assert all(t.point["optim.lr"] == 1e-3 for t in front)
    assert found.best(trials).point["stack.lora.r"] == 8
    path = found.write_best(found.best(trials), trials)
    names = sorted(p.name for p in (found.folder / "pareto").iterdir())
    assert names == [f"parameters_{100 * r}-loss_{4 / r:g}-{n}.yaml" for r, n in ((1, 1), (2, 3), (4, 5), (8, 7))]
    for name in [*(f"pareto/{n}" for n in names), path.name]:
        recipe = compose(found.folder / name).recipe
        assert recipe.search is None and recipe.optim["lr"] == 1e-3
    assert picture(found, trials) is not None


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        (["search.limits.parameters=450"], 4),
        (["search.pick=knee"], 2),
        (["search.pick=knee", "search.limits.parameters=150"], 1),
    ],
)
def test_what_is_picked_of_a_front(lab: Costly, words: list[str], rank: int) -> None:
    """Scaled to 0 .. 1 the front is (1, 0), (3/7, 1/7), (1/7, 3/7), (0, 1): two are nearest to (0, 0), the cheaper is first."""
    grid = ["search.sampler=grid", "search.space={stack.lora.r: [1, 2, 4, 8], optim.lr: [1e-3]}"]
    found, trials = searched(*grid, *words)
    assert found.best(trials).point["stack.lora.r"] == rank


def test_nothing_within_the_limits_is_said(lab: Costly) -> None:
    found, trials = searched("search.sampler=grid", "search.space={stack.lora.r: [2, 4]}", "search.limits.parameters=150")
    with pytest.raises(RunError, match="every trial costs more; the cheapest: parameters 200"):
        found.best(trials)


@pytest.mark.slow
def test_a_stepwise_search_fixes_one_key_after_the_other(lab: Costly, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best single trial of the first key is at rank 2, whose mean is worse; the second key is decided at rank 4 alone."""
    table = {(2, 0.001): 0.0, (2, 0.01): 9.0, (4, 0.001): 2.0, (4, 0.01): 1.0, (8, 0.001): 8.0, (8, 0.01): 8.0}
    monkeypatch.setattr("tests.pipelines.test_search_costs.loss_of", lambda r: table[r.stack["lora"]["r"], r.optim["lr"]])
    space = "search.space={stack.lora.r: [2, 4, 8], optim.lr: [0.001, 0.01]}"
    words = ["search.sampler=stepwise", space, "search.samples=6", "search.against=[]"]
    found, trials = searched("run.dir=whole", *words)
    assert [t.point["stack.lora.r"] for t in trials] == [2] * 6 + [4] * 6 + [8] * 6 + [4] * 2
    assert {t.point["optim.lr"] for t in trials[:6]} == {0.001, 0.01}
    assert [t.point["optim.lr"] for t in trials[18:]] == [0.001, 0.01]
    assert found.best(trials).point == {"stack.lora.r": 4, "optim.lr": 0.01} and found.best(trials).value == 1.0
    lab.stop_at = len(lab.runs) + 3
    with pytest.raises(Interrupted):
        searched("run.dir=stopped", *words)
    _, again = searched("run.dir=stopped", *words)
    assert [(t.point, t.values) for t in again] == [(t.point, t.values) for t in trials]


@pytest.mark.slow
def test_a_stopped_search_goes_on_to_the_same_trials_and_runs_nothing_twice(lab: Costly) -> None:
    start = "search.start=[{stack.lora.r: 3, optim.lr: 0.002}]"
    _, whole = searched("run.dir=whole", "search.trials=6", start)
    assert whole[0].point == {"stack.lora.r": 3, "optim.lr": 0.002}
    lab.runs.clear()
    lab.stop_at = 3
    with pytest.raises(Interrupted):
        searched("run.dir=stopped", "search.trials=6", start)
    _, again = searched("run.dir=stopped", "search.trials=6", start)
    assert [(t.point, t.values, t.costs) for t in again] == [(t.point, t.values, t.costs) for t in whole]
    assert len(lab.runs) == 6


@pytest.mark.slow
def test_nsga2_breeds_its_second_generation_from_the_first_also_after_a_stop(
    lab: Costly, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "POPULATION", 4)
    words = ["search.sampler=nsga2", "search.trials=6"]
    _, whole = searched("run.dir=whole", *words)
    assert [t.generations["NSGAIISampler:generation"] for t in whole] == [0, 0, 0, 0, 1, 1]
    _, chance = searched("run.dir=chance", "search.sampler=random", "search.trials=6")
    assert [t.point for t in whole[:4]] == [t.point for t in chance[:4]]
    assert [t.point for t in whole[4:]] != [t.point for t in chance[4:]]
    lab.stop_at = len(lab.runs) + 4
    with pytest.raises(Interrupted):
        searched("run.dir=stopped", *words)
    _, again = searched("run.dir=stopped", *words)
    assert [(t.point, t.generations) for t in again] == [(t.point, t.generations) for t in whole]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "trials"),
    [("gp", 16), ("tpe", 40), ("nsga2", 40)],
)
def test_a_sampler_of_score_and_cost_beats_chance_on_the_planted_front(lab: Costly, sampler: str, trials: int) -> None:
    """Area dominated, mean over seeds, at as many trials."""

    def area(name: str, seed: int) -> float:
        words = [f"search.sampler={name}", f"search.seed={seed}", f"search.trials={trials}", f"run.dir={name}{seed}"]
        _, tried = searched(*words)
        return hypervolume([row(t) for t in tried], (8.0, 3300.0))

    seeds = (0, 1, 2)
    assert sum(area(sampler, s) for s in seeds) > sum(area("random", s) for s in seeds)


def test_methods_and_their_targets_are_keys_like_any_other(lab: Costly, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of a method that is not in the chosen stack change nothing, so such points are one run."""
    monkeypatch.setattr("tests.pipelines.test_search_costs.loss_of", lambda recipe: float(len(recipe.stack)))
    space = "search.space={stack: [[lora], [adapter, lora]], stack.lora.target: [attn.q, attn.q|v], stack.adapter.r: [2, 4]}"
    words = ["search.sampler=grid", space, "search.against=[]"]
    Search("mine", words, compose("mine", words)).check()
    found, trials = searched(*words)
    stacks = [p.composition.recipe.stack for p in lab.runs]  # type: ignore[union-attr]
    assert [(s["lora"]["target"], s.get("adapter", {}).get("r")) for s in stacks] == [
        ("attn.q", None), ("attn.q|v", None), ("attn.q", 2), ("attn.q", 4), ("attn.q|v", 2), ("attn.q|v", 4)
    ]  # fmt: skip
    assert len(trials) == 8 and found.best(trials).point["stack"] == ["lora"]
    path = found.write_best(found.best(trials), trials)
    assert list(compose(path).recipe.stack) == ["lora"]


def test_costs_are_what_a_run_leaves(lab: Costly, tmp_path: Path) -> None:
    searched("search.sampler=grid", "search.space={stack.lora.r: [2]}")
    folder = lab.runs[0].dir
    assert costs_of(folder, ["memory", "parameters"]) == {"memory": 7.0, "parameters": 200.0}
    (folder / "final").mkdir()
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, str(folder / "final" / "delta.safetensors"))
    assert costs_of(folder, ["parameters"]) == {"parameters": 16.0}
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no report"):
        costs_of(tmp_path / "empty", ["parameters"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["search.prune=median", "eval.every=2"], "set search.prune=off"),
        (["search.sampler=stepwise"], "search.space.stack.lora.r: a stepwise search needs a list of values"),
        (["search.start=[{stack.lora.r: 3}]"], "search.start.0: must give every key"),
        (["search.start=[{stack.lora.r: 99, optim.lr: 1e-3}]"], "search.start.0.stack.lora.r: 99 is not in"),
        (["search.against=[]", "search.limits.parameters=9"], "search.limits.parameters: it is measured where"),
        (["search.against=[]", "search.pick=knee"], "search.pick: a knee"),
        (["search.space={stack: [[lora]], stack.dora.r: [1]}"], "search.space.stack.dora.r: no list of methods"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_said_before_the_first_trial(lab: Costly, words: list[str], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Search("mine", words, compose("mine", words)).check()
    assert told in str(caught.value) and lab.runs == []


def test_a_front_by_hand() -> None:
    trials = [Trial(i, {"k": i}) for i in range(5)]
    rows = {0: (1.0, 9.0), 1: (2.0, 5.0), 2: (2.0, 6.0), 3: (5.0, 1.0), 4: (2.0, 5.0)}
    found = costs.front(trials, lambda t: rows[t.number])
    assert [t.number for t in found] == [3, 1, 0]
    assert hypervolume([rows[t.number] for t in found], (6.0, 10.0)) == pytest.approx(1 * 9 + 3 * 5 + 1 * 1)


@pytest.mark.slow
def test_the_design_space_procedure_of_s4_finds_a_planted_design(lab: Costly, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted score adds over the steps, so every one of them can find its part, with as few designs as one a value."""
    wanted = {
        "grouping": "spindle",
        "allocation": "uniform",
        "tuned": ["G1", "G2", "G3", "G4"],
        "assign": {"G1": ["A", "L"], "G2": ["A", "P"], "G3": ["A", "P", "B"], "G4": ["P", "B", "L"]},
    }

    def loss(recipe: Any) -> float:
        s4, weight, total = recipe.stack["s4"], 1000.0, 0.0
        for key in ("grouping", "allocation", "tuned"):
            total, weight = total + weight * (s4[key] != wanted[key]), weight / 4
        for group, letters in wanted["assign"].items():  # type: ignore[attr-defined]
            total, weight = total + weight * (s4["assign"][group] != letters), weight / 4
        return total

    monkeypatch.setattr("tests.pipelines.test_search_costs.loss_of", loss)
    words = ["search.samples=1", "stack.s4.budget=0.05"]
    found = Search("s4_design", words, compose("s4_design", words))
    found.folder.mkdir(parents=True)
    monkeypatch.setattr(study, "run_stage", Designs(lab))
    trials = found.run()
    assert len(trials) == 5 + 3 + 4 + 3 * 6 + 6
    best = found.best(trials)
    assert best.value == 0.0
    s4 = compose(found.write_best(best, trials)).recipe.stack["s4"]
    assert {key: s4[key] for key in wanted} == wanted


class Designs:
    """Costly runs of a stack without LoRA."""

    def __init__(self, lab: Costly):
        self.lab = lab

    def __call__(self, pipeline: Any, planned: Any, enough: Any = None) -> Any:
        result = Lab.__call__(self.lab, pipeline, planned, enough)
        event = {"event": "evaluation", "step": 4, "eval/loss": 0.0, "eval/accuracy": -loss_of(planned.composition.recipe)}
        (planned.dir / "events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
        return result


@pytest.mark.slow
def test_a_few_steps_of_the_procedure_leave_a_design_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrecipe.cli import app

    monkeypatch.chdir(tmp_path)
    space = "search.space={stack.s4.grouping: [spindle, bottleneck], stack.s4.assign.G4: [[A, L], [P, B, L]]}"
    small = ["steps=3", "data.limit=64", "batch.size=8", "eval.batches=1", "log.live=off", "search.samples=1"]
    assert app.run_command(["search", "recipe=s4_design", space, *small]) == 0
    folder = Path("runs/s4_design-search")
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()[1:]]
    assert [t["state"] for t in trials] == ["done"] * 4
    assert app.run_command(["train", f"recipe={folder}/searched.yaml", "run.dir=best", "log.live=off"]) == 0
