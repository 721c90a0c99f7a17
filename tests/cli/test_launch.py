"""`launch` and `resume=auto`: one command that starts a run and continues it, here and from a rendered job."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.cli.app import run_command
from llmrecipe.training import run as run_module
from llmrecipe.training.run import Run
from tests.support import ROOT
from tests.trainings import QUIET, curve, learned

SHORT = ["recipe=sft_lora", "data.limit=8", "batch.size=4", "eval.batches=1", "save.every=1", "runtime.device=cpu", *QUIET]


def same(one: Path, other: Path) -> None:
    """Curves and tensors of two runs are equal to the bit."""
    assert curve(one) == curve(other)
    ours, theirs = learned(one), learned(other)
    assert ours and ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_one_command_starts_a_run_continues_it_and_leaves_it_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *SHORT, "steps=3"]
    assert run_command([*words, f"run.dir={tmp_path / 'whole'}"]) == 0
    original = Run.report_step

    def stopped(self: Run, *arguments: Any) -> None:
        original(self, *arguments)
        if self.progress.step == 1:
            signal.raise_signal(signal.SIGTERM)

    again = [*words, f"run.dir={tmp_path / 'parts'}", "resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "report_step", stopped)
        assert run_command(again) == 130
    assert run_command(again) == 0
    same(tmp_path / "whole", tmp_path / "parts")
    capsys.readouterr()
    assert run_command(again) == 0
    assert "is finished: it ended at step 3" in capsys.readouterr().out
    import llmrecipe.runtime.distributed_launch as launcher

    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("nothing is left to do"))
    assert run_command(["launch", *again[1:], "--nproc", "1"]) == 0
    assert run_command([*again, "optim.lr=1"]) == 2
    assert "optim.lr" in capsys.readouterr().err


def test_resume_auto_needs_a_folder_and_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", *SHORT, "resume=auto"]) == 2
    assert "resume=auto: needs run.dir=FOLDER" in capsys.readouterr().err
    assert run_command(["train", "resume=auto", "run.dir=x"]) == 2
    assert "no recipe given" in capsys.readouterr().err


def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int, Any]]:
    import llmrecipe.runtime.distributed_launch as launcher

    calls: list[tuple[list[str], int, Any]] = []
    monkeypatch.setattr(launcher, "launch", lambda args, nproc, cluster: calls.append((args, nproc, cluster)) or 0)
    return calls


def test_launch_reads_the_machines_of_an_engine_and_of_a_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = started(monkeypatch)
    for name, value in {"PET_NNODES": "2", "PET_MASTER_ADDR": "a", "JOB_COMPLETION_INDEX": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_command(["launch", "recipe=sft", "--rendezvous", "kubernetes", "--nproc", "4"]) == 0
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=3\nb slots=3\n", encoding="utf-8")
    assert run_command(["launch", "recipe=sft", "--hostfile", str(hosts), "--node", "1", "--master", "c:1"]) == 0
    (one, four, kubernetes), (two, three, listed) = calls
    assert (one[-1], four, kubernetes.nodes, kubernetes.node, kubernetes.master) == ("runtime.processes=8", 4, 2, 1, "a:29400")
    assert (two[-1], three, listed.nodes, listed.node, listed.master) == ("runtime.processes=6", 3, 2, 1, "c:1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rendezvous", "slurm", "--nodes", "2"], "--nodes: --rendezvous reads it from variables"),
        (["--hostfile", "gone"], "--hostfile: gone cannot be read"),
        (["--env", "A", "--gpus", "2"], "--gpus, --env: only a job file has it"),
        (["--to", "slurm", "--node", "1"], "--node: is for the machines themselves"),
        (["--to", "slurm", "run.dir=x"], "leave run.dir= out"),
        (["--to", "slurm", "resume=x"], "leave resume= out"),
        (["--to", "slurm", "--gpus", "H100"], "--gpus: must be a number, or TYPE:NUMBER"),
        (["--to", "slurm", "stack.lora.r=2"], "stack"),
        (["--to", "slurm", "runtime=zero3", "runtime.dp_shard=3"], "make 3 processes, and runtime.processes is 2"),
    ],
)
def test_launch_refuses_what_makes_no_sense(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["launch", "recipe=sft", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_pipeline_starts_its_own_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["launch", "recipe=sft_dpo", "--to", "slurm"]) == 2
    assert "run it with `llmrecipe train`" in capsys.readouterr().err


def client(folder: Path, name: str, code: int) -> Path:
    """A stand-in for an engine's client, which records its arguments."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/{name}.words\nexit {code}\n', encoding="utf-8")
    path.chmod(0o755)
    return folder / f"{name}.words"


def test_a_job_file_is_written_and_handed_to_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["launch", "recipe=sft", "--to", "skypilot", "--volume", "v", "--env", "HF_TOKEN"]
    assert run_command(words) == 0
    text = capsys.readouterr().out
    assert run_command([*words, "-o", "job.yaml"]) == 0
    assert (tmp_path / "job.yaml").read_text() == text
    assert "submit it with: sky jobs launch --yes --secret HF_TOKEN job.yaml" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command([*words, "--submit"]) == 2
    assert "sky is not installed here; submit the file where it is" in capsys.readouterr().err
    recorded = client(tmp_path, "sky", 0)
    assert run_command([*words, "--submit"]) == 0
    assert recorded.read_text().split() == ["jobs", "launch", "--yes", "--secret", "HF_TOKEN", "sft.yaml"]
    assert (tmp_path / "sft.yaml").read_text() == text
    client(tmp_path, "sky", 3)
    assert run_command([*words, "--submit"]) == 2
    assert "sky refused the job (exit code 3)" in capsys.readouterr().err


def test_a_job_that_cannot_be_printed_is_an_error() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        start = [sys.executable, "-P", "-m", "llmrecipe", "launch", "recipe=sft", "--to", "slurm"]
        done = subprocess.run(start, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "the output cannot be written" in done.stderr


def test_variables_a_recipe_names_are_in_its_job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "a-secret-value")
    words = ["recipe=grpo", "objective.reward={kind: http, url: 'http://h/', key_env: JUDGE_KEY}"]
    assert run_command(["launch", *words, "--to", "slurm", "--env", "NCCL_DEBUG"]) == 0
    text = capsys.readouterr().out
    assert "${JUDGE_KEY:?" in text and "${NCCL_DEBUG:?" in text and "a-secret-value" not in text


SRUN = """#!/bin/bash
while [ "$1" != llmrecipe ]; do shift; done
shift
echo $$ > "$STAND_IN/pid"
export SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=localhost
exec "$PYTHON" -P -m llmrecipe "$@"
"""


def stand_ins(folder: Path) -> dict[str, str]:
    """Programs of Slurm that this machine does not have: srun on one node, and scontrol, which is recorded."""
    folder.mkdir()
    (folder / "srun").write_text(SRUN, encoding="utf-8")
    (folder / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$STAND_IN/requeued"\n', encoding="utf-8")
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    found = {"STAND_IN": str(folder), "PYTHON": sys.executable, "SLURM_JOB_ID": "71", "PATH": f"{folder}:{os.environ['PATH']}"}
    return {**os.environ, **found, "PYTHONPATH": str(ROOT)}


def descendants(process: int) -> list[int]:
    """A process and all that it started, as the end of a machine ends them."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [process]
    for known in found:
        found.extend(parents.get(known, []))
    return found


def last_step(run: Path) -> int:
    return max((step for step, *_ in curve(run)), default=0) if (run / "events.jsonl").exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_preempted_job_continues_by_the_same_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes, stopped by SIGTERM, then killed; the third start ends as a run that was never stopped."""
    words = [*SHORT, "steps=30"]
    assert run_command(["launch", *words, "--to", "slurm", "--name", "parts", "--checkpoints", str(tmp_path)]) == 0
    script = tmp_path / "job.sbatch"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    environment, run = stand_ins(tmp_path / "bin"), tmp_path / "parts"
    for restart, (number, at) in enumerate([(signal.SIGTERM, 2), (signal.SIGKILL, 8)]):
        job = subprocess.Popen(["bash", str(script)], env={**environment, "SLURM_RESTART_COUNT": str(restart)})
        while last_step(run) < at and job.poll() is None:
            time.sleep(0.02)
        if number == signal.SIGKILL:
            for process in descendants(job.pid):
                os.kill(process, number)
            job.wait(60)
        else:
            os.kill(int((tmp_path / "bin" / "pid").read_text()), number)
            assert job.wait(120) == 130
            assert (tmp_path / "bin" / "requeued").read_text() == "requeue 71\n"
        assert at <= last_step(run) < 30
    assert subprocess.run(["bash", str(script)], env=environment).returncode == 0
    whole = ["launch", *words, f"run.dir={tmp_path / 'whole'}", "--nproc", "2"]
    assert subprocess.run([sys.executable, "-P", "-m", "llmrecipe", *whole], env=environment).returncode == 0
    same(tmp_path / "whole", run)
