"""Values of a step that are read while the next one is computed: the same events in the same order, weights and errors.

An accelerator reads late; a CPU can be made to, and then has to give what it gives when it reads at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RunError
from llmrecipe.methods._base.late_values import Largest, MetricSums, Smallest
from llmrecipe.methods._base.stack import Stack
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.training.run import Run
from llmrecipe.training.run_state import RunState
from tests.trainings import curve, learned, resume, stop_after, train_recipe

WORDS = ["steps=5", "batch.size=2", "batch.micro=1", "data.limit=8", "data.max_length=48", "eval.batches=1"]
OFTEN = [*WORDS, "eval.every=2", "save.every=2", "save.keep=5"]
CLOCKS = ("tokens_per_s", "peak_mem_mb", "mfu")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run reads late."""
    opened = Run.open.__func__  # type: ignore[attr-defined]

    def open_late(cls: type[Run], *arguments: Any) -> Run:
        run: Run = opened(cls, *arguments)
        run.reads_late = True
        return run

    monkeypatch.setattr(Run, "open", classmethod(open_late))


def lines(folder: Path) -> list[dict[str, Any]]:
    """All events without what a clock says."""
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in event.items() if k not in CLOCKS} for event in found]


def status(folder: Path) -> dict[str, Any]:
    return RunDir.open(folder, write=False).read_status()


def test_a_late_run_reports_and_learns_what_a_prompt_one_does(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_recipe(tmp_path / "prompt", "sft_lora", *OFTEN)
    request.getfixturevalue("late")
    made: list[int] = []
    seen: list[int] = []
    context, arrived = RunState.step_context, Run._arrived
    monkeypatch.setattr(RunState, "step_context", lambda run: (made.append(run.progress.step), context(run))[1])
    monkeypatch.setattr(Run, "_arrived", lambda run, *rest: (seen.append(len(made)), arrived(run, *rest))[1])
    train_recipe(tmp_path / "late", "sft_lora", *OFTEN)
    assert lines(tmp_path / "late") == lines(tmp_path / "prompt")
    assert [e["event"] for e in lines(tmp_path / "late")].count("step") == 5
    whole, parts = learned(tmp_path / "prompt"), learned(tmp_path / "late")
    assert whole and all(torch.equal(whole[name], parts[name]) for name in whole)
    # Updates that have begun when the second, third, ... step is read: the first one is proved at once, an evaluation or a save
    # waits for the step before it, and so does the end.
    assert seen == [2, 4, 4, 5]


@pytest.mark.usefixtures("late")
def test_a_stopped_late_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    train_recipe(tmp_path / "whole", "sft_lora", *WORDS)
    stop_after(3, tmp_path / "parts", "sft_lora", *WORDS)
    assert [step for step, *_ in curve(tmp_path / "parts")] == [1, 2, 3], "the newest step is written before the checkpoint"
    resume(tmp_path / "parts")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    whole, parts = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    assert whole and all(torch.equal(whole[name], parts[name]) for name in whole)


def bad_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The gradient norm of a step is no number."""
    clip = RunState.clip

    def broken(run: RunState) -> Any:
        norm = clip(run)
        return norm * float("nan") if run.progress.step + 1 == step else norm

    monkeypatch.setattr(RunState, "clip", broken)


@pytest.mark.parametrize("every", ["eval.every=3", "save.every=3", "log.every=2", "seed=1"])
def test_a_step_that_is_not_finite_ends_a_late_run_as_it_ends_a_prompt_one(
    every: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the step is followed by another, an evaluation or a save, and whether it is reported."""
    bad_at(monkeypatch, 3)
    found = []
    for name in ("prompt", "late"):
        if name == "late":
            request.getfixturevalue("late")
        with pytest.raises(
            RunError, match=r"step 3: loss [\d.]+, gradient norm nan; the batch is in .*bad_step_000003_rank0"
        ) as e:
            train_recipe(tmp_path / name, "sft_lora", *WORDS, every)
        text = str(e.value).replace(str(tmp_path / name), "RUN")
        state = status(tmp_path / name)
        events = [{**event, "message": ""} for event in lines(tmp_path / name)]
        batch = (tmp_path / name / "bad_step_000003_rank0.json").read_text(encoding="utf-8")
        found.append((text, state["status"], state["step"], events, batch))
    assert found[0] == found[1]
    assert found[0][1:3] == ("failed", 2)


@pytest.mark.usefixtures("late")
def test_the_step_that_was_not_finite_explains_what_fails_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_at(monkeypatch, 3)
    before = Stack.before_step

    def fails(stack: Stack, model: Any, step: int) -> bool:
        if step == 3:
            raise ValueError("a matrix of NaN has no decomposition")
        return before(stack, model, step)

    monkeypatch.setattr(Stack, "before_step", fails)
    with pytest.raises(RunError, match=r"step 3: .* gradient norm nan"):
        train_recipe(tmp_path / "run", "sft_lora", *WORDS)


def test_steps_that_may_be_skipped_are_judged_before_their_update(tmp_path: Path) -> None:
    """Only a run that ends at the first bad step may make an update before it is known whether it is one."""
    run = train_recipe(tmp_path / "run", "sft_lora", "steps=1", *WORDS[1:], "run.on_nan=skip")
    assert not run.reads_late and not run.late


class Alone:
    world = 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    maximum = sum


def test_means_and_extremes_by_hand() -> None:
    """Tensors and numbers, sums and counts of either kind; an extreme of nothing is no number, and NaN is never the larger."""
    nan, sums = float("nan"), MetricSums()
    for value, count in ((torch.tensor(3.0), 2.0), (torch.tensor(5.0), torch.tensor(3))):
        sums.add({"mean": (value, count), "plain": (1, 4), "none": (0.0, 0.0)})
    sums.add({"top": Largest(torch.tensor(2.0), 1.0), "low": Smallest(torch.tensor(2.0), 1.0), "empty": Largest(0.0, 0.0)})
    sums.add({"top": Largest(torch.tensor(nan), 1.0), "low": Smallest(-7.0, 1.0), "empty": Largest(0.0, 0.0)})
    found = sums.mean(Alone())
    assert (found["mean"], found["plain"], found["top"], found["low"]) == (1.6, 0.25, 2.0, -7.0)
    assert all(found[name] != found[name] for name in ("none", "empty"))
