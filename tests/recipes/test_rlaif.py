"""RLAIF as a pipeline: its stages, a few steps of each, a kill in any of them, and the rule's score on held-out prompts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrecipe.cli import app
from llmrecipe.pipelines import run_stages
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan
from tests.trainings import events

STAGES = ["drafts", "critique", "sft", "pairs", "labels", "reward", "ppo"]
FEW = [
    "stages.drafts.limit=12",
    "stages.pairs.limit=64",
    "stages.sft.steps=2",
    "stages.sft.batch.size=4",
    "stages.reward.epochs=null",
    "+stages.reward.steps=2",
    "+stages.reward.batch={size: 4}",
    "+stages.reward.eval={test: false}",
    "stages.ppo.steps=4",
    "+stages.ppo.batch={size: 4}",
    "+stages.ppo.eval={batches: 1}",
]


def test_the_stages_and_what_each_reads() -> None:
    made = plan(compose("rlaif", []))
    assert [s.name for s in made.stages] == STAGES
    assert {s.name: s.stage.inputs for s in made.stages} == {
        "drafts": (), "critique": ("drafts",), "sft": ("critique",), "pairs": ("sft",), "labels": ("pairs",),
        "reward": ("sft", "labels"), "ppo": ("sft", "reward"),
    }  # fmt: skip
    # Another judge changes its own stage and those behind it, no other.
    other = plan(compose("rlaif", ["stages.labels.judge.sure=0.8"]))
    changed = [a.name for a, b in zip(made.stages, other.stages, strict=True) if a.key != b.key]
    assert changed == ["labels", "reward", "ppo"]
    assert [s.name for s in plan(compose("rlaif_dpo", [])).stages] == [*STAGES[:5], "dpo"]


@pytest.mark.slow
def test_a_few_steps_of_each_stage(tmp_path: Path, started: list[str]) -> None:
    results = run_stages.run_all_stages(compose("rlaif", [*FEW, f"run.dir={tmp_path / 'run'}"]))
    assert started == STAGES and [r.stage for r in results] == STAGES
    labels = Path(next(r.dir for r in results if r.stage == "labels"))
    rows = [json.loads(line) for line in (labels / "train.jsonl").read_text().splitlines()]
    metrics = json.loads((labels / "final" / "metrics.json").read_text())
    assert rows and all(r["p"] == pytest.approx(0.9) for r in rows) and metrics["train/agreement"] == 1.0
    assert all("rewards/rule" in e for e in events(Path(results[-1].dir)))
    again = run_stages.run_all_stages(compose("rlaif", [*FEW, f"run.dir={tmp_path / 'run'}"]))
    assert started == STAGES and {r.how for r in again} == {"reused"}


@pytest.mark.faults
def test_a_kill_in_a_step_loses_nothing(tmp_path: Path) -> None:
    """The step is killed once some of its answers are on disk; the same command ends with the rows of a run left alone."""
    words = ["step", "critique", f"answers={tmp_path / 'drafts'}", "constitution=manners", "batch=1", "log.live=off"]
    model = ["generate", "model=tiny", "prompts=builtin:constitution", "limit=40", "max_new_tokens=24"]
    assert app.run_command([*model, f"run.dir={tmp_path / 'drafts'}", "log.live=off"]) == 0

    def begin(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "llmrecipe", *words, f"run.dir={folder}"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    killed = begin(tmp_path / "killed")
    journal = tmp_path / "killed" / "journal" / "judge.jsonl"
    while killed.poll() is None and not (journal.is_file() and journal.stat().st_size > 2000):
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = journal.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert begin(tmp_path / "killed").wait() == 0 == begin(tmp_path / "whole").wait()
    rows = [(tmp_path / name / "train.jsonl").read_text() for name in ("killed", "whole")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 160
    # A line is a reply with the count that includes it.
    entries = [json.loads(line)["values"] for line in journal.read_text().splitlines()]
    assert all("count" in entry and len(entry) == 2 for entry in entries)
    keys = [key for entry in entries for key in entry if key != "count"]
    assert journal.read_bytes().startswith(before) and len(keys) == len(set(keys))
