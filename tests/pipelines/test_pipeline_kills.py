"""RLHF stopped everywhere: each stage is killed while it writes its first checkpoint, killed later, and stopped by Ctrl-C.
RLAIF killed in each stage: trainings while they write a checkpoint, steps when all their answers are there and no row is yet.

The same command goes on each time, and what it leaves in the end equals, bit for bit, what a pipeline leaves that ran through.
The stops are placed exactly: a `sitecustomize` module in the stages' processes acts when a certain checkpoint is about to get
its name. Once the pipeline's own process is killed with its stage; it keeps nothing that is not on disk, so the other times it
runs inside the test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llmrecipe.cli import app
from tests.recipes.test_rlaif import FEW, STAGES
from tests.trainings import curve, learned

STEPS = 5
SMALL = f"steps: {STEPS}, save: {{every: 1}}, batch: {{size: 2}}, eval: {{batches: 1, test: false}}"
RLHF = f"""
stages:
  sft: {{recipe: sft_lora, stack: {{lora: {{r: 2}}}}, data: {{limit: 8}}, {SMALL}}}
  reward: {{recipe: reward_lora, with: ["model.path=${{stage:sft}}"], stack: {{lora: {{r: 2}}}}, data: {{limit: 8}}, {SMALL}}}
  ppo:
    recipe: ppo
    with: ["model.path=${{stage:sft}}", 'objective.reward={{model: {{path: "${{stage:reward}}"}}}}', objective.max_new_tokens=6]
    data: {{limit: 8}}
    steps: {4 * STEPS}
    save: {{every: 1}}
    batch: {{size: 2}}
    eval: {{batches: 1, test: false}}
"""
SMALL_RLHF = ("recipe=rlhf_small.yaml",)
STOPS = {"sft": (1, 2, 3), "reward": (1, 2, 3), "ppo": (4, 8, 12)}
"""Stage -> the checkpoints it is stopped at. PPO writes one after the four updates of a rollout."""
ACT = """
import os, signal, time

at, how, mark = (os.environ.get(f"STOP_{name}", "") for name in ("AT", "HOW", "MARK"))
rename, replace = os.rename, os.replace


def stop(target):
    if at and all(part in str(target) for part in at.split("*")) and not os.path.exists(mark):
        open(mark, "w").close()
        if how == "kill both":
            os.kill(os.getppid(), signal.SIGKILL)
        if how != "interrupt":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(2)  # the pipeline passes it on meanwhile


def stopping(call):
    def stopped(source, target, *rest, **named):
        stop(target)
        return call(source, target, *rest, **named)

    return stopped


os.rename, os.replace = stopping(rename), stopping(replace)
"""


def run(
    capsys: pytest.CaptureFixture[str], at: str = "", how: str = "", mark: Path = Path(), words: Sequence[str] = SMALL_RLHF
) -> tuple[int, str]:
    """`llmrecipe train` on a pipeline, stopped where a file is about to get its name: exit code and output.

    Args:
        at: what the file's path has to hold, its parts joined by `*`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        if at:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(Path("act").resolve()), os.environ.get("PYTHONPATH", "")]))
            for name, value in (("AT", at), ("HOW", how), ("MARK", str(mark))):
                patch.setenv(f"STOP_{name}", value)
        if how == "kill both":
            ended = subprocess.run(
                [sys.executable, "-m", "llmrecipe", "train", *words], capture_output=True, text=True, timeout=900
            )
            return ended.returncode, ended.stdout + ended.stderr
        code = app.run_command(["train", *words])
    output = capsys.readouterr()
    return code, output.out + output.err


def folders() -> dict[str, Path]:
    return {name: next(Path("runs/rlhf_small").glob(f"{name}-*")) for name in STOPS}


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_rlhf_stopped_in_every_stage_ends_where_a_pipeline_ends_that_ran_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("stopped", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rlhf_small.yaml").write_text(RLHF, encoding="utf-8")
    (tmp_path / "stopped" / "act").mkdir()
    (tmp_path / "stopped" / "act" / "sitecustomize.py").write_text(ACT, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "stopped")
    for stage, stops in STOPS.items():
        before: list[str] = []
        for step, how in zip(stops, ("kill both" if stage == "sft" else "kill", "kill", "interrupt"), strict=True):
            mark = tmp_path / f"{stage}-{step}"
            ended, told = run(capsys, f"checkpoints/step-{step:06d}", how, mark)
            assert mark.exists() and ended == {"kill both": -9, "kill": 2, "interrupt": 130}[how], told
            kept = sorted(p.name for p in next(Path("runs/rlhf_small").glob(f"{stage}-*/checkpoints")).glob("step-*"))
            if how != "interrupt":  # the checkpoint that was being written is not there
                assert kept == before
            else:  # it is, and so may be the one that was next when the signal came
                assert f"step-{step:06d}" in kept
            before = [f"step-{step:06d}"]
    ended, told = run(capsys)
    assert ended == 0, told
    how = re.findall(r"\[(\w+)\] (reused|continued):", told)
    assert how == [("sft", "reused"), ("reward", "reused"), ("ppo", "continued")]
    stopped = {name: (curve(folder), learned(folder)) for name, folder in folders().items()}

    monkeypatch.chdir(tmp_path / "whole")
    ended, told = run(capsys)
    assert ended == 0, told
    for name, folder in folders().items():
        losses, tensors = stopped[name]
        assert [step for step, *_ in losses] == list(range(1, (4 * STEPS if name == "ppo" else STEPS) + 1))
        assert losses == curve(folder)
        whole = learned(folder)
        assert tensors.keys() == whole.keys() and all(torch.equal(tensors[k], whole[k]) for k in whole)


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_rlaif_killed_in_every_stage_ends_where_a_pipeline_ends_that_ran_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = ("sft", "reward", "ppo")
    words = ["recipe=rlaif", *FEW, *(f"stages.{stage}.save.every=1" for stage in trained)]
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    (tmp_path / "killed" / "act").mkdir()
    (tmp_path / "killed" / "act" / "sitecustomize.py").write_text(ACT, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "killed")
    for stage in STAGES:
        mark = tmp_path / stage
        ended, told = run(
            capsys, f"/{stage}-*/{'checkpoints/step-' if stage in trained else 'train.jsonl'}", "kill", mark, words
        )
        assert mark.exists() and ended == 2, told
    ended, told = run(capsys, words=words)
    assert ended == 0, told
    assert re.findall(r"\[(\w+)\] reused:", told) == STAGES[:-1]

    monkeypatch.chdir(tmp_path / "whole")
    ended, told = run(capsys, words=words)
    assert ended == 0, told
    for stage in STAGES:
        one, other = (next((tmp_path / name / "runs" / "rlaif").glob(f"{stage}-*")) for name in ("killed", "whole"))
        assert one.name == other.name
        if stage in trained:
            mine, theirs = learned(one), learned(other)
            assert curve(one) == curve(other) and mine.keys() == theirs.keys()
            assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
        else:
            assert (one / "train.jsonl").read_bytes() == (other / "train.jsonl").read_bytes()
