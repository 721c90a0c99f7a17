"""A trained tensor that no update changes is named in a warning; one that changes by a single bit is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.training.checksum import named_checksums as checksums
from llmrecipe.training.run import Run
from llmrecipe.training.startup_report import rows_text
from llmrecipe.training.unchanged import UnchangedCheck
from tests.trainings import events, train_recipe

SHORT = ["batch.size=1", "data.limit=8", "data.packing=off", "eval.at_start=false", "eval.load_best=false", "eval.batches=1"]


def warnings(folder: Path) -> list[str]:
    return [e["message"] for e in events(folder, "warning") if "not changed by one bit" in e["message"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_every_change_of_one_bit_shows(dtype: torch.dtype) -> None:
    tensor = (torch.arange(13) % 3).to(dtype).view(13, 1)
    whole = checksums({"a": tensor})["a"]
    bits = tensor.view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    for place in range(13):
        for bit in (0, 8 * tensor.element_size() - 2):
            bits[place] ^= 1 << bit
            assert checksums({"a": tensor})["a"] != whole
            bits[place] ^= 1 << bit
    assert checksums({"a": tensor})["a"] == whole


def test_changes_that_a_plain_sum_would_lose_show() -> None:
    tensor = torch.zeros(6)
    before = checksums({"a": tensor})
    for changed in (torch.full((6,), 1e-3), torch.tensor([1.0, -1.0, 0, 0, 0, 0]), torch.full((6,), -0.0)):
        assert checksums({"a": changed}) != before
    assert checksums({"a": torch.tensor([1.0, 2.0])}) != checksums({"a": torch.tensor([2.0, 1.0])})
    assert checksums({"a": tensor.view(2, 3)}) != before
    assert checksums({"a": torch.zeros(2, 6).t()[:, 0]}) == before


def test_updates_that_round_away_are_named(tmp_path: Path) -> None:
    """At this rate B moves from its zeros, and A, whose entries are near 0.1, stays as it was."""
    train_recipe(tmp_path / "run", "sft_lora", *SHORT, "steps=3", "optim.lr=1e-30", "schedule=constant")
    found = warnings(tmp_path / "run")
    assert len(found) == 1 and "in 3 updates" in found[0]
    assert "lora.A" in found[0] and "lora.B" not in found[0] and found[0].startswith("28 of 56 trained tensors")


def test_a_run_that_learns_gets_no_warning(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "sft_lora", *SHORT, "steps=3", "schedule=constant")
    assert warnings(tmp_path / "run") == []


class Fake:
    """What the check reads of a run."""

    def __init__(self, **tensors: torch.Tensor):
        self.model = torch.nn.ParameterDict({n: torch.nn.Parameter(t) for n, t in tensors.items()})
        self.stack: list[Any] = []
        self.runtime: Any = self
        self.events: Any = self
        self.unread: frozenset[str] = frozenset()
        self.progress: Any = self
        self.step, self.steps = 0, 100
        self.said: list[str] = []

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def warning(self, text: str) -> None:
        self.said.append(text)


def test_twenty_updates_are_counted_and_skipped_steps_are_none() -> None:
    run: Any = Fake(still=torch.ones(3), late=torch.ones(3), read=torch.ones(2))
    run.unread = frozenset({"read"})
    check = UnchangedCheck(run)
    for step in range(1, 25):
        run.step = step
        check.see(run, updated=step not in (4, 9))
        if step == 21:
            assert not run.said
            run.model["late"].data[1] += 1.0
    assert len(run.said) == 1 and run.said[0].startswith("1 of 2 trained tensors") and ": still." in run.said[0]


def test_tensors_that_go_or_change_their_shape_are_left_out() -> None:
    run: Any = Fake(cut=torch.ones(4), gone=torch.ones(2), same=torch.ones(2))
    check = UnchangedCheck(run)
    run.model = torch.nn.ParameterDict({"cut": torch.nn.Parameter(torch.ones(3)), "same": run.model["same"]})
    run.steps = run.step = 2
    check.updates = 1
    check.see(run, updated=True)
    assert run.said and run.said[0].startswith("1 of 2") and ": same." in run.said[0]


@pytest.mark.parametrize(
    ("rows", "size", "text"),
    [(8, 16, "8 rows"), (16, 16, "16 rows"), (48, 16, "16 rows"), (20, 8, "at most 8 rows"), (1, 4, "1 row"), (3, 1, "1 row")],
)
def test_rows_of_a_step_are_counted_as_they_are(rows: int, size: int, text: str) -> None:
    assert rows_text(rows, size) == text


def test_the_report_says_the_rows_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("llmrecipe.training.startup_report.say_progress", said.append)
    run: Run = train_recipe(tmp_path / "run", "sft_lora", *SHORT, "steps=1", "batch.size=16")
    line = next(text for text in said if text.startswith("run: "))
    assert "1 steps of 8 rows," in line
    model = next(text for text in said if text.startswith("model: "))
    own = sum(p.numel() for n, p in run.model.named_parameters() if ".lora." not in n)
    assert f"{own:,} parameters; trained: " in model
