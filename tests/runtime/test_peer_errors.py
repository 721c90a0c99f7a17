"""An error that one process of several meets alone is reported by that process; one that all meet is reported once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from llmrecipe.cli import app
from llmrecipe.core.errors import DataError, RunError
from llmrecipe.runtime import peer_errors
from llmrecipe.runtime.peer_errors import reported
from tests.support import ROOT

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:51348.")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    """The store of a process group, without the group."""
    made = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: made)
    monkeypatch.setattr(peer_errors, "WAIT", 0.1)
    return made


def speaks(error: Exception, rank: int) -> str:
    """Which process an error names; empty where process 0 speaks for all."""
    return getattr(reported(error, rank, 2), "process", "")


@pytest.mark.usefixtures("store")
def test_an_error_of_all_processes_is_reported_once() -> None:
    assert [speaks(DataError("no rows"), rank) for rank in (0, 1)] == ["", ""]


@pytest.mark.usefixtures("store")
def test_an_error_of_one_process_is_reported_by_it() -> None:
    assert speaks(DataError("row 7"), 1) == "process 1 of 2"


@pytest.mark.usefixtures("store")
def test_two_processes_with_different_errors_both_report() -> None:
    assert [speaks(DataError(f"row {rank}"), rank) for rank in (0, 1)] == ["", "process 1 of 2"]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("error", [GLOO, dist.DistBackendError("NCCL communicator was aborted.")], ids=["gloo", "nccl"])
def test_a_lost_process_is_no_bug(error: Exception) -> None:
    """Process 0 says that it lost one; another process repeats it only where process 0 has said nothing."""
    assert speaks(error, 1) == "process 1 of 2"
    met = reported(error, 0, 2)
    assert isinstance(met, RunError) and "another process of this run has ended" in str(met) and met.process == ""
    assert speaks(error, 1) == ""


def test_a_store_that_is_gone_keeps_nobody_from_reporting(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> dist.Store:
        raise dist.DistStoreError("Connection reset by peer")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    assert speaks(DataError("row 7"), 1) == "process 1 of 2"


def test_other_errors_and_one_process_are_left_alone() -> None:
    bug, own = ValueError("oops"), DataError("no rows")
    assert reported(bug, 1, 2) is bug
    assert reported(own, 0, 1) is own and own.process == ""
    assert reported(GLOO, 0, 1) is GLOO


@pytest.mark.parametrize(("rank", "process", "said"), [
    ("0", "", "Error: no rows"), ("1", "", ""), ("1", "process 1 of 2", "Error: process 1 of 2: no rows"),
])  # fmt: skip
def test_what_the_command_line_prints(
    rank: str, process: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        error = DataError("no rows")
        error.process = process
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(app, "build_app", refuse)
    assert app.run_command(["train"]) == 2
    assert capsys.readouterr().err.strip() == said


PROGRAM = """
import os, sys
from llmrecipe.core.errors import RunError
from llmrecipe.objectives.finetuning.sft import Sft

rank, plain, calls = sys.argv.pop(1), Sft.loss, []
def loss(self, *rest):
    calls.append(1)
    if os.environ["RANK"] == rank and len(calls) > 2:
        raise RunError("the disk of this machine is full")
    return plain(self, *rest)
Sft.loss = loss
from llmrecipe.cli.app import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_launched_run_says_what_one_process_met(rank: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    words = ["train", "recipe=sft_lora", "steps=4", "runtime.processes=2", "eval.batches=1", f"run.dir={tmp_path / 'run'}"]
    launch = (
        "import sys; from llmrecipe.runtime.distributed_launch import launch; "
        f"sys.exit(launch({words}, 2, program=[sys.executable, {str(program)!r}, '{rank}']))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", launch], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
    )
    assert done.returncode == 2, done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if "the disk of this machine is full" in line]
    assert told == [f"Error: {'process 1 of 2: ' if rank else ''}the disk of this machine is full"]
    assert "Bug" not in done.stderr
