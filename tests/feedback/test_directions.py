"""Whether more or less of a metric is better: declared by what reports it, asked by everything that chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.cli.app import run_command as command
from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.lazy import is_installed
from llmrecipe.feedback.directions import declares, direction, direction_of, measured
from llmrecipe.objectives.base import Objective
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import EvalSection
from llmrecipe.recipe.validate import build_object
from llmrecipe.training import run as run_module
from llmrecipe.training.best import BestTracker
from tests.support import shared
from tests.trainings import learned, train_recipe

REWARD = {"reward": {"length": {}, "exact_match": {}}}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"problem": p} for p in ("single_label", "multi_label")],
    "dpo": [{}, {"nll_coef": 0.5}],
    "ipo": [{}, {"loss_type": "sigmoid_reg"}],
    "grpo": [REWARD],
    "rloo": [REWARD],
    "ppo": [REWARD],
}
KINDS = [(name, options) for name in registry.names("objective") for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize(("name", "options"), KINDS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_every_objective_declares_what_it_reports(name: str, options: dict[str, Any]) -> None:
    objective = build_object("objective", {"kind": name, **options}, "objective")
    known = measured(objective)
    assert declares(objective) and known["loss"] == "min" and set(known.values()) <= {"min", "max", None}
    assert len(known) > 1


@pytest.mark.parametrize("name", registry.names("metric"))
def test_every_text_metric_has_a_direction(name: str) -> None:
    metric = registry.load_class("metric", name)
    assert metric.direction in ("min", "max")
    if metric.library and not is_installed(metric.library):
        with pytest.raises(RecipeError, match=rf"{name} is computed by {metric.library}.*llmrecipe\[metrics\]"):
            measured(Sft(), [name])
    else:
        assert measured(Sft(), [name])[name] == "max"


@pytest.mark.parametrize(
    ("kind", "metric", "wanted"),
    [
        ({"kind": "sft"}, "eval/loss", "min"),
        ({"kind": "sft"}, "eval/accuracy", "max"),
        ({"kind": "clm"}, "eval/perplexity", "min"),
        ({"kind": "classification"}, "eval/macro_f1", "max"),
        ({"kind": "regression"}, "eval/absolute_error", "min"),
        ({"kind": "regression"}, "eval/spearman", "max"),
        ({"kind": "choices"}, "eval/rank_accuracy/sum", "max"),
        ({"kind": "dpo"}, "eval/rewards/accuracies", "max"),
        ({"kind": "reward"}, "eval/calibration_error", "min"),
        ({"kind": "grpo", **REWARD}, "eval/rewards/exact_match", "max"),
        ({"kind": "grpo", **REWARD}, "eval/score", "max"),
    ],
)
def test_what_is_better(kind: dict[str, Any], metric: str, wanted: str) -> None:
    objective = build_object("objective", kind, "objective")
    assert direction(EvalSection(monitor=metric), objective) == wanted
    other = "min" if wanted == "max" else "max"
    assert direction(EvalSection(monitor=metric, mode=other), objective) == other
    assert direction_of(metric.replace("eval/", "test/"), objective) == wanted


def test_what_has_to_be_told() -> None:
    dpo = build_object("objective", {"kind": "dpo"}, "objective")
    with pytest.raises(RecipeError, match=r"nothing says .* eval/logps/chosen .* set eval\.mode=max or eval\.mode=min"):
        direction(EvalSection(monitor="eval/logps/chosen"), dpo)
    assert direction(EvalSection(monitor="eval/logps/chosen", mode="max"), dpo) == "max"


class Unsaid(Objective):
    """An objective of somebody who declared nothing."""


def test_an_objective_that_declares_nothing_may_report_anything() -> None:
    with pytest.raises(RecipeError, match=r"nothing says whether a large or a small eval/speed is better"):
        direction(EvalSection(monitor="eval/speed"), Unsaid())
    assert direction(EvalSection(monitor="eval/speed", mode="max"), Unsaid()) == "max"


NONE = "eval.monitor: no evaluation of this recipe reports"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["eval.monitor=eval/acuracy"],
            f"{NONE} 'eval/acuracy'; did you mean 'eval/accuracy'?",
        ),
        (
            ["eval.monitor=eval/exact_match", "eval.mode=max"],
            f"{NONE} 'eval/exact_match'",
        ),
        (
            ["eval.monitor=accuracy"],
            f"{NONE} 'accuracy'; did you mean 'eval/accuracy'?",
        ),
        (["eval.metrics=[exact_mach]"], "eval.metrics: there is no metric 'exact_mach'; did you mean 'exact_match'?"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_metric_that_is_never_reported_is_refused_before_training(
    verb: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([verb, "recipe=sft_lora", f"run.dir={tmp_path / 'run'}", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["eval.patience=2", "eval.every=1"], "eval.patience: there are no validation rows, so that nothing is ever evaluated"),
    (["eval.monitor=eval/accuracy"], "eval.monitor: there are no validation rows"),
    (["data.validation=0.5", "eval.patience=2"], "eval.patience: evaluations are at the start and the end alone"),
    (["data.validation=0.5", "eval.patience=2", "eval.every=1", "eval.monitor=eval/accuracy"], None),
    (["eval.monitor=eval/loss"], None),
])  # fmt: skip
def test_what_no_evaluation_computes_is_refused_before_training(
    words: list[str], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Say {i}", "completion": "It is {i}"}}\n' for i in range(8)))
    assert command(["check", "recipe=sft_lora", f"data.path={rows}", *words]) == (2 if message else 0)
    assert (message or "") in " ".join(capsys.readouterr().err.split())


def test_text_metrics_need_rows_that_can_be_answered() -> None:
    clm = build_object("objective", {"kind": "clm"}, "objective")
    with pytest.raises(RecipeError, match=r"eval\.metrics: rouge_l scores generated answers, and rows of type text"):
        direction(EvalSection(metrics=["rouge_l"]), clm)
    assert direction(EvalSection(metrics=["rouge_l"], monitor="eval/rouge_l"), Sft()) == "max"


@pytest.mark.parametrize("values", [[0.1, 0.3, 0.2, 0.3], [0.5, 0.4, 0.3, 0.2]])
def test_the_best_tracker_keeps_the_largest_of_what_is_better_large(values: list[float]) -> None:
    section = EvalSection(monitor="eval/accuracy")
    tracker = BestTracker(section, direction(section, Sft()))
    for step, value in enumerate(values):
        tracker.see(step, {"eval/accuracy": value})
    assert (tracker.best, tracker.best_step) == (max(values), values.index(max(values)))


def test_another_metric_does_not_go_on_from_what_one_judged() -> None:
    loss, accuracy = BestTracker(EvalSection(), "min"), BestTracker(EvalSection(monitor="eval/accuracy"), "max")
    loss.see(3, {"eval/loss": 0.01})
    again = BestTracker(EvalSection(), "min")
    assert again.load_state(loss.state()) and (again.best, again.best_step) == (0.01, 3)
    assert not accuracy.load_state(loss.state()) and accuracy.best is None


def test_a_run_ends_with_the_weights_of_the_highest_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    script = iter([0.1, 0.4, 0.2])

    def told(evaluation: Any, data: Any) -> dict[str, float]:
        roles = evaluation.roles
        kept[evaluation.step] = {k: v.detach().clone() for k, v in roles.stack.delta(roles.model).items()}
        return {"loss": 1.0 / (1 + evaluation.step), "accuracy": next(script)}

    monkeypatch.setattr(run_module, "evaluate", told)
    common = ["steps=2", "batch.size=1", "data.limit=3", "data.packing=off", "eval.every=1"]
    train_recipe(tmp_path / "run", "sft_lora", *common, "eval.monitor=eval/accuracy")
    metrics = json.loads((tmp_path / "run" / "final" / "metrics.json").read_text())
    assert metrics == {"steps": 2, "best_step": 1, "eval/accuracy": 0.4}
    assert all(torch.equal(v, kept[1][k]) for k, v in learned(tmp_path / "run").items())


@pytest.mark.slow
def test_the_case_that_kept_the_worst(tmp_path: Path) -> None:
    case = shared("cases", "monitor-accuracy-keeps-worst")
    data = [f"data.path={case / 'sft.jsonl'}", f"data.validation={case / 'val.jsonl'}"]
    run = train_recipe(
        tmp_path / "run", "sft_lora", *data, "batch.size=8", "steps=6", "eval.every=2", "eval.monitor=eval/accuracy"
    )
    curve = {e["step"]: e["eval/accuracy"] for e in _evaluations(tmp_path / "run")}
    best = max(curve, key=lambda step: curve[step])
    assert run.best.best_step == best != 0 and run.best.best == max(curve.values())
    metrics = json.loads((tmp_path / "run" / "final" / "metrics.json").read_text())
    assert metrics["eval/accuracy"] == max(curve.values())
    assert any(bool(v.any()) for k, v in learned(tmp_path / "run").items() if k.endswith("lora.B"))


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [e for line in lines if (e := json.loads(line))["event"] == "evaluation"]


def test_a_search_asks_the_same_place(tmp_path: Path) -> None:
    from llmrecipe.pipelines.search.display import ranked
    from llmrecipe.pipelines.search.study import Search
    from llmrecipe.pipelines.search.trial import Trial

    for monitor, best in (("eval/accuracy", 1), ("eval/loss", 0)):
        words = ["search.space.optim.lr=[1e-3, 1e-2]", f"eval.monitor={monitor}", f"run.dir={tmp_path}"]
        search = Search("sft_lora", words, compose("sft_lora", words))
        trials = [Trial(0, {}, [0.2]), Trial(1, {}, [0.7])]
        assert search.best(trials).number == best and ranked(search, trials)[0].number == best


def test_a_leaderboard_asks_the_same_place(tmp_path: Path) -> None:
    from llmrecipe.evaluation.leaderboard_table import better_of
    from llmrecipe.runs.run_dir import RunDir

    paths = []
    for seed in (0, 1):
        made = RunDir.create(compose("sft_lora", [f"run.dir={tmp_path / str(seed)}", f"seed={seed}"]))
        made.status("done")
        paths.append(str(made.path))
    wanted = {"test/loss": "min", "test/accuracy": "max", "eval/perplexity": "min"}
    assert {metric: better_of(metric, paths, "best") for metric in wanted} == wanted
    with pytest.raises(RecipeError, match=r"best: nothing says whether a large or a small test/words is better"):
        better_of("test/words", paths, "best")
