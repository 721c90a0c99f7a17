"""Weights that are not finite end no run as done: not at a save, not at a best, not after the last step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrecipe.cli.app import run_command as command
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.training import final_folder
from llmrecipe.training import run as run_module
from llmrecipe.training.finite_check import WINDOW, nonfinite_names, skip
from llmrecipe.training.run import Run
from llmrecipe.training.run_state import Progress
from tests.interop.saved_runs import base_folder
from tests.trainings import resume, train_recipe

ONE = ["steps=1", "batch.size=1", "data.limit=3", "data.packing=off", "eval.batches=1", "eval.at_start=false"]
HUGE = {
    "lora": ["sft_lora", "optim.lr=1e38", "schedule=constant"],
    "mezo": ["mezo_lora", "optim.lr=1e38", "schedule=constant"],
}

SLOW = [("optimizer", "save"), ("weights", "best"), ("optimizer", "final")]


def state(folder: Path) -> dict[str, Any]:
    return RunDir.open(folder, write=False).read_status()


def test_norms_by_hand() -> None:
    inf, nan = float("inf"), float("nan")
    tensors = {
        "good": torch.tensor([1.0, -2.0]),
        "nan": torch.tensor([1.0, nan]),
        "inf": torch.tensor([[0.0], [-inf]]),
        "nan16": torch.tensor([nan, 1.0], dtype=torch.bfloat16),
        "largest half": torch.full((4,), 65504.0, dtype=torch.float16),
        "eight bits": torch.tensor([1.0, nan]).to(torch.float8_e4m3fn),
        "squares overflow": torch.full((9,), 1e20),
        "squares fit": torch.full((9,), 1e18),
        "double": torch.full((9,), 1e100, dtype=torch.float64),
        "whole": torch.tensor([1, 2]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(nan),
    }
    exactly = ["nan", "inf", "nan16", "eight bits", "scalar"]
    assert nonfinite_names(tensors) == exactly
    assert sorted(nonfinite_names(tensors, 2.0)) == sorted([*exactly, "squares overflow"])


@pytest.mark.parametrize(("name", "on_nan"), [("lora", "stop"), ("mezo", "skip")])
def test_a_rate_that_is_finite_and_far_too_large_ends_failed(name: str, on_nan: str, tmp_path: Path) -> None:
    recipe, *options = HUGE[name]
    with pytest.raises(RunError, match=r"step 1: trained weights are not finite, or too large .*: [\w.]+lora") as error:
        train_recipe(tmp_path / "run", recipe, *ONE, *options, f"run.on_nan={on_nan}")
    found = state(tmp_path / "run")
    assert found["status"] == "failed" and found["error"] == str(error.value) and found["step"] == 1
    assert not (tmp_path / "run" / "final").exists()


def planted(where: str, value: float) -> Any:
    """A step that leaves one number in a trained tensor, or in the optimizer's state of one."""
    original = Run.zero_gradients

    def step(run: Run) -> None:
        original(run)
        parameter = next(p for p in run.model.parameters() if p.requires_grad)
        tensor = parameter if where == "weights" else run.optimizer.state[parameter]["exp_avg_sq"]
        with torch.no_grad():
            tensor.view(-1)[0] = value

    return step


@pytest.mark.parametrize(
    ("where", "writing"),
    [
        ("weights", "save"),
        ("optimizer", "best"),
        ("weights", "final"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_nothing_is_kept_that_is_not_finite(where: str, writing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, text = {"weights": (float("nan"), "trained weights"), "optimizer": (float("inf"), "optimizer state")}[where]
    monkeypatch.setattr(run_module, "evaluate", lambda evaluation, data: {"loss": 1.0})
    monkeypatch.setattr(Run, "zero_gradients", planted(where, value))
    more = {"save": ["steps=2", "save.every=1"], "best": [], "final": ["eval.load_best=false"]}[writing]
    with pytest.raises(RunError, match=rf"step 1: {text} are not finite.*\(1 of \d+ tensors\); nothing of this step is kept"):
        train_recipe(tmp_path / "run", "sft_lora", *ONE, *more)
    assert state(tmp_path / "run")["status"] == "failed"
    assert not [name for name in ("checkpoints", "best", "final") if (tmp_path / "run" / name).exists()]


def test_finite_best_weights_do_not_excuse_last_ones_that_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1.0, float("nan")])
    monkeypatch.setattr(run_module, "evaluate", lambda evaluation, data: {"loss": next(values)})
    monkeypatch.setattr(Run, "zero_gradients", planted("weights", float("nan")))
    with pytest.raises(RunError, match="trained weights are not finite"):
        train_recipe(tmp_path / "run", "sft_lora", *ONE, "eval.at_start=true")
    assert state(tmp_path / "run")["status"] == "failed" and not (tmp_path / "run" / "final").exists()


def test_a_run_whose_every_step_was_skipped_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "clip", lambda run: float("nan"))
    with pytest.raises(RunError, match="all 2 steps had a loss or a gradient that was not finite and were skipped"):
        train_recipe(tmp_path / "run", "sft_lora", *ONE, "steps=2", "run.on_nan=skip", "run.max_skipped=1.0")
    assert state(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize(
    ("share", "steps", "skipped", "stops_at"),
    [
        (0.1, 1000, [*range(5, 205, 20), *range(300, 310), 320], 320),
        (0.1, 1000, range(1, 1001, 10), None),
        (0.1, 1000, range(1, 1001, 9), 91),
        (0.1, 2, [2], None),
        (0.1, 2, [1, 2], 2),
        (0.0, 50, [7], 7),
        (1.0, 50, range(1, 51), None),
    ],
)
def test_the_share_of_recent_steps_that_may_be_skipped(share: float, steps: int, skipped: Any, stops_at: int | None) -> None:
    """Counted by hand: the eleventh of the last 100 stops a run that allows a tenth."""
    run: Any = SimpleNamespace(progress=Progress(), steps=steps, recipe=SimpleNamespace(run=SimpleNamespace(max_skipped=share)))
    stopped = None
    for number in skipped:
        run.progress.step = number - 1
        try:
            skip(run, f"step {number}: loss nan")
        except RunError as error:
            stopped = number
            assert f"step {number}: loss nan" in str(error) and f"run.max_skipped={share:g} allows" in str(error)
            break
    assert stopped == stops_at
    assert len(run.progress.skipped_lately) <= WINDOW


def test_a_run_that_does_not_recover_stops_and_a_resume_knows_what_it_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "clip", lambda run: float("nan") if run.progress.step else 1.0)
    words = [*ONE, "steps=30", "data.limit=64", "run.on_nan=skip", "save.every=2"]
    with pytest.raises(RunError, match=r"step 5: .*skipped step 4 of the last 5, and run\.max_skipped=0\.1 allows 3 of 30"):
        train_recipe(tmp_path / "run", "sft_lora", *words)
    assert state(tmp_path / "run")["status"] == "failed" and not (tmp_path / "run" / "final").exists()
    with pytest.raises(RunError, match=r"step 5: .*skipped step 4 of the last 5"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "A lower optim.lr often helps; run.on_nan=skip leaves such steps out"),
        (["run.on_nan=skip"], "skipped step 4 of the last 4, and run.max_skipped=0.1 allows 3 of 30"),
        (["run.on_nan=skip", "run.max_skipped=1.0", "steps=3"], "all 3 steps had a loss or a gradient that was not finite"),
    ],
)
def test_the_command_line_ends_with_code_two_and_the_run_failed(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "clip", lambda run: float("nan"))
    assert command(["train", "recipe=sft_lora", *ONE, "steps=30", f"run.dir={tmp_path / 'run'}", *words]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    found = state(tmp_path / "run")
    assert message in shown and "Traceback" not in shown
    assert found["status"] == "failed" and message in found["error"]
    assert not (tmp_path / "run" / "final").exists()


def test_a_model_that_is_not_finite_itself_is_said_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = base_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[5] = float("inf")
    model.save_pretrained(folder)
    assert command(["train", "recipe=sft_lora", f"model.path={folder}", *ONE, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "log-probabilities that are not finite, before anything is trained" in " ".join(capsys.readouterr().err.split())


def test_no_step_at_all_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"steps: must be .*; got 0"):
        train_recipe(tmp_path / "run", "sft_lora", "steps=0")


@pytest.mark.slow
def test_a_run_that_skipped_one_step_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = iter([float("nan"), 1.0])
    monkeypatch.setattr(Run, "clip", lambda run: next(norms))
    run = train_recipe(tmp_path / "run", "sft_lora", *ONE, "steps=2", "run.on_nan=skip")
    assert state(tmp_path / "run")["status"] == "done" and run.progress.skipped == 1
    assert json.loads((tmp_path / "run" / "final" / "metrics.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_a_weight_beyond_the_dtype_it_is_written_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        final_folder.stored_heads, "split", lambda state: ({**state, "model.norm.weight": torch.full((3,), 1e6)}, {})
    )
    with pytest.raises(RunError, match=r"model\.dtype: weights of model\.norm\.weight are beyond the range of float16"):
        train_recipe(tmp_path / "run", "sft", *ONE, "model.dtype=float16", "eval.load_best=false")
    assert state(tmp_path / "run")["status"] == "failed"
