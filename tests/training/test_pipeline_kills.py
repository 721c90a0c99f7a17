"""RLHF stopped everywhere: each stage is killed while it writes its first checkpoint, killed later, and stopped by Ctrl-C.

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
from pathlib import Path

import pytest
import torch

from llmrecipe.cli import app
from tests.runs import curve, learned

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
STOPS = {"sft": (1, 2, 3), "reward": (1, 2, 3), "ppo": (4, 8, 12)}
"""Stage -> the checkpoints it is stopped at. PPO writes one after the four updates of a rollout."""
ACT = """
import os, signal, time

at, how, mark = (os.environ.get(f"STOP_{name}", "") for name in ("AT", "HOW", "MARK"))
rename = os.rename


def stopping(source, target, *rest, **named):
    if at and at in str(target) and not os.path.exists(mark):
        open(mark, "w").close()
        if how == "kill both":
            os.kill(os.getppid(), signal.SIGKILL)
        if how != "interrupt":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(2)  # the pipeline passes it on meanwhile
    return rename(source, target, *rest, **named)


os.rename = stopping
"""


def run(capsys: pytest.CaptureFixture[str], at: str = "", how: str = "", mark: Path = Path()) -> tuple[int, str]:
    """`llmrecipe train` on the pipeline in the working directory, stopped at a checkpoint where asked: exit code and output."""
    words = ["train", "recipe=rlhf_small.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        if at:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(Path("act").resolve()), os.environ.get("PYTHONPATH", "")]))
            for name, value in (("AT", at), ("HOW", how), ("MARK", str(mark))):
                patch.setenv(f"STOP_{name}", value)
        if how == "kill both":
            ended = subprocess.run([sys.executable, "-m", "llmrecipe", *words], capture_output=True, text=True, timeout=900)
            return ended.returncode, ended.stdout + ended.stderr
        code = app.run(words)
    output = capsys.readouterr()
    return code, output.out + output.err


def folders() -> dict[str, Path]:
    return {name: next(Path("runs/rlhf_small").glob(f"{name}-*")) for name in STOPS}


@pytest.mark.slow
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
