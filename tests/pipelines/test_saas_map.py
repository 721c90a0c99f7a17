"""The sampler of AutoPEFT: a point as numbers, nothing proposed twice, the same after a stop, and who is without BoTorch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.core.errors import Interrupted, RunError
from llmrecipe.core.lazy import is_installed
from llmrecipe.pipelines.search import samplers
from llmrecipe.pipelines.search.samplers import new_study, sample_trial
from llmrecipe.pipelines.search.space import distributions, drawn_of, point_of
from llmrecipe.pipelines.search.study import Search
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.search_section import SearchSection
from tests.methods.hybrid.test_autopeft import area, sampled
from tests.pipelines.test_search import Lab, lab, searched

__all__ = ["lab"]
needs_botorch = pytest.mark.skipif(not is_installed("botorch"), reason="needs BoTorch: pip install 'llmrecipe[botorch]'")
FEW = ["search.sampler=saas_map", "search.space={optim.lr: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], batch.size: [2, 4, 8]}"]


def test_points_are_numbers_between_zero_and_one() -> None:
    from llmrecipe.pipelines.search.saas_map import LEVELS, coordinate_of

    given: dict[str, Any] = {
        "steps": {"low": 2, "high": 8, "step": 2},
        "seed": {"low": 0, "high": 10**6},
        "optim.lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "optim.beta1": {"low": 0.5, "high": 0.9},
        "optim.eps": {"low": 0.1, "high": 0.7, "step": 0.2},
        "stack.lora.r": [8, 2, 32],
        "stack.lora.use_rslora": [True, False],
        "schedule": ["cosine", "linear", "wsd"],
        "batch.size": [4],
    }
    section = SearchSection(space=given)
    own = distributions(section)
    axes = {key: coordinate_of(value, own[key]) for key, value in section.space.items()}
    assert axes["steps"].drawn == (2, 4, 6, 8) and axes["steps"].places == pytest.approx((0, 1 / 3, 2 / 3, 1))
    assert len(axes["seed"].drawn) == LEVELS and {type(v) for v in axes["seed"].drawn} == {int}
    assert axes["seed"].drawn[-1] == 10**6 and axes["seed"].place(250_000) == 0.25
    assert axes["optim.lr"].place(1e-3) == pytest.approx(0.5) and axes["optim.lr"].drawn[32] == pytest.approx(1e-3)
    assert axes["optim.beta1"].place(0.6) == pytest.approx(0.25)
    assert axes["stack.lora.r"].places == (0.5, 0.0, 1.0)  # by rank, whatever the order they are listed in
    assert axes["stack.lora.use_rslora"].places == (0.0, 1.0) and axes["batch.size"].places == (0.0,)
    assert axes["schedule"].places == (0.0, 1.0, 2.0) and [a.ordered for a in axes.values()].count(False) == 1
    first = {key: axis.drawn[0] for key, axis in axes.items()}
    for axis in axes.values():
        assert [axis.nearest(axis.place(value)) for value in axis.drawn] == list(axis.drawn)
    for key, axis in axes.items():
        assert all(own[key]._contains(own[key].to_internal_repr(value)) for value in axis.drawn), key
        for value in axis.drawn:  # what a journal keeps of a proposal is the same place, so that it is not proposed again
            assert drawn_of(section, point_of(section, {**first, key: value}))[key] == value


def test_asked_for_without_botorch_it_says_what_to_install(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samplers, "is_installed", lambda name: False)
    assert app.run_command(["search", "recipe=mine", "search.sampler=saas_map"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "pip install 'llmrecipe[botorch]'" in said and "search.sampler=gp" in said and "Traceback" not in said
    assert lab.runs == [] and not Path("runs/mine-search/trials.jsonl").exists()


def test_auto_is_what_is_installed_and_a_search_keeps_the_sampler_it_began_with(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(*words: str) -> str:
        every = ["search.sampler=auto", "search.trials=2", *words]
        return Search("mine", every, compose("mine", every)).section.sampler

    monkeypatch.setattr(samplers, "is_installed", lambda name: False)
    assert chosen() == "gp" and "BoTorch is not installed" in capsys.readouterr().out
    searched("search.sampler=auto", "search.trials=2")
    assert json.loads(Path("runs/mine-search/trials.jsonl").read_text().splitlines()[0])["search"]["sampler"] == "gp"
    monkeypatch.setattr(samplers, "is_installed", lambda name: True)
    assert chosen() == "gp" and chosen("run.dir=elsewhere") == "saas_map"
    _, again = searched("search.sampler=auto", "search.trials=3")
    assert len(again) == 3 and len(lab.runs) == 3
    Path("runs/mine-search/trials.jsonl").write_text("no JSON\n")
    with pytest.raises(RunError, match=r"trials\.jsonl:1"):
        searched("search.sampler=auto")


@needs_botorch
@pytest.mark.slow
def test_no_point_is_tried_twice_until_none_is_left(lab: Lab) -> None:
    found, trials = searched(*FEW, "search.trials=16")
    points = [json.dumps(t.point) for t in trials]
    assert len(set(points[:15])) == 15 and points[15] in points[:15] and len(lab.runs) == 15
    assert found.best(trials).value == 0.0


@needs_botorch
@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2])
def test_a_stopped_search_goes_on_to_the_same_proposals(lab: Lab, parallel: int) -> None:
    space = (
        "search.space={optim.lr: {low: 1e-5, high: 1e-1, log: true}, batch.size: [2, 4, 8], schedule: [cosine, linear, wsd]}"
    )
    alike = [space, "search.trials=12", f"search.parallel={parallel}"]
    words = ["search.sampler=saas_map", *alike]
    _, whole = searched("run.dir=whole", *words)
    assert len({json.dumps(t.point) for t in whole}) == 12
    _, chance = searched("run.dir=chance", *alike, "search.sampler=random")
    assert [t.point for t in chance[:8]] == [t.point for t in whole[:8]] and chance[9].point != whole[9].point
    lab.stop_at = len(lab.runs) + 10
    with pytest.raises(Interrupted):
        searched("run.dir=stopped", *words)
    _, again = searched("run.dir=stopped", *words)
    assert [(t.point, t.values) for t in again] == [(t.point, t.values) for t in whole]


@needs_botorch
@pytest.mark.slow
@pytest.mark.parametrize("scores", [[1.0], [1.0, math.inf]], ids=["equal", "infinite"])
def test_scores_without_a_scale_break_nothing(scores: list[float]) -> None:
    """A column without spread, and losses that are no finite number; no point is proposed twice."""
    from optuna.trial import create_trial

    section = SearchSection(
        space={"a": {"low": 0, "high": 40}, "b": {"low": 0, "high": 40}}, sampler="saas_map", against=["parameters"]
    )
    study, points = new_study(section, "min"), []
    for number in range(8 * len(scores) + 1):
        drawn = sample_trial(study, section, number)
        points.append(tuple(point_of(section, drawn.params).values()))
        done = [t for t in study.trials if t.state.is_finished()]
        study = new_study(section, "min")
        about = {"params": drawn.params, "distributions": distributions(section)}
        study.add_trials([*done, create_trial(**about, values=[scores[number % len(scores)], 2.0])])
    assert len(set(points)) == len(points)


@needs_botorch
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_planted_front_of_autopeft_is_found_and_chance_is_beaten(record_property: Any) -> None:
    """24 trials, three seeds; area under the front of the planted score over numbers."""
    areas: dict[str, list[float]] = {"saas_map": [], "random": []}
    for sampler, seed in ((s, i) for s in areas for i in range(3)):
        areas[sampler].append(area(sampled(sampler, seed, 24)))
    record_property("areas", areas)
    assert sum(areas["saas_map"]) > 1.1 * sum(areas["random"])
