"""Calibration reads data as a training step does: in micro-batches, each row at most once, with lines of progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core import console
from llmrecipe.engine.forward import Engine
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.sparse_method import base_weights
from llmrecipe.recipe.compose import compose
from llmrecipe.training.run import Run
from tests.trainings import QUIET

WORDS = ["data.limit=12", "eval.test=false", "steps=1", "batch.size=6", "data.packing=off"]


def opened(folder: Path, *words: str, recipe: str = "sft_lora") -> Run:
    run = Run.open(compose(recipe, [*QUIET, f"run.dir={folder}", *WORDS, *words]))
    run.roles.engine.eval()
    return run


POWERS = [("square", "mean"), ("absolute", "sum"), ("signed", "mean")]


def test_scores_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    """The power is taken of a batch's whole gradient: that of each micro-batch would give another score."""
    run = opened(tmp_path / "run")
    weights = {n: w for n, w in base_weights(run.model).items() if "layers.3.mlp" in n}
    for power, reduction in POWERS:
        found = []
        for rows, tokens in ((None, 100_000), (1, None), (None, 60)):
            run.roles.micro_rows, run.roles.micro_tokens = rows, tokens
            arguments: dict[str, Any] = {"rows": None, "power": power, "reduction": reduction}
            found.append(selection.score_entries(run.model, run.probe(), weights, 2, **arguments))
        assert all(bool(value.any()) for value in found[0].values())
        for other in found[1:]:
            for name, value in found[0].items():
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


def test_each_row_is_read_at_most_once_and_the_last_batch_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = opened(tmp_path / "run").probe()
    for size, rows, wanted in ((None, 100, [6, 6]), (5, 100, [5, 5, 2]), (1, 100, [1] * 12), (5, 2, [5, 5])):
        batches = list(probe.batches(rows, size))
        assert [len(b.rows) for b in batches] == wanted
        seen = [row for b in batches for row in b.rows]
        assert len(seen) == len(set(seen)) and probe.count(rows, size) == len(wanted)
        said = f"{rows} batches of {size or 6} rows were requested and the data fill {len(wanted)}"
        assert (said in capsys.readouterr().out) == (len(wanted) < rows)
        assert [row for micros in probe.groups(rows, size) for m in micros for row in m.rows] == seen


SPT = ["stack.spt.num_batches=1", "stack.spt.batch_size=6"]
TAYLOR = ["stack.group_mask.score=taylor", "stack.group_mask.num_samples=1"]
SLOW = [
    ("spt", SPT, ["batch.tokens=64"]),
    ("group_mask", TAYLOR, ["batch.micro=2"]),
    ("sft_lora", ["stack.lora.init=eva"], ["batch.micro=2"]),
    ("sft_lora", ["stack.lora.init=lora_ga"], ["batch.tokens=64"]),
]


@pytest.mark.parametrize(
    ("recipe", "more", "words"),
    [("spt", SPT, ["batch.micro=2"]), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_no_pass_of_a_calibration_is_larger_than_one_of_training(
    recipe: str, more: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path / "run", *words, *more, recipe=recipe)
    sizes: list[tuple[int, int]] = []
    original = Engine.states

    def watched(self: Engine, batch: Any) -> Any:
        sizes.append((batch.input_ids.shape[0], batch.tokens))
        return original(self, batch)

    monkeypatch.setattr(Engine, "states", watched)
    run.stack.calibrate(run.model, run.probe())
    rows, tokens = max(r for r, _ in sizes), max(t for _, t in sizes)
    assert len(sizes) >= 3 and sum(r for r, _ in sizes) % 6 == 0
    assert rows <= 2 if "batch.micro=2" in words else tokens <= 64


def test_progress_is_shown_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], []
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "say_progress", lines.append)
    for _ in console.counted(range(6), "calibration", 6):
        now[0] += 3.0
    assert lines == ["calibration: 2 of 6", "calibration: 4 of 6"]
    for _ in console.counted(range(6), "calibration", 0):
        now[0] += 30.0
    assert len(lines) == 2
