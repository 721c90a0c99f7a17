"""Where machines find each other: each engine's variables and a hostfile become what torchrun makes of its own arguments."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import config_from_args, parse_args

from llmrecipe.cli.app import run_command
from llmrecipe.core.errors import UserError
from llmrecipe.recipe.schema import RuntimeSection
from llmrecipe.runtime.distributed_launch import Cluster, launch_config
from llmrecipe.runtime.processes import Runtime, _forget_accelerate
from llmrecipe.runtime.rendezvous import cluster_of, first_node, read_hostfile
from tests.support import ROOT
from tests.trainings import curve

SLURM = {"SLURM_JOB_ID": "4412345", "SLURM_JOB_NODELIST": "gpu[007-009,020]", "SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "2"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.9", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
INDEXED = {"PET_NNODES": "3", "PET_MASTER_ADDR": "sft-node-0-0.sft", "PET_MASTER_PORT": "29400", "JOB_COMPLETION_INDEX": "2"}
TRAINJOB = {"PET_NNODES": "2", "PET_MASTER_ADDR": "t-node-0-0.t", "PET_MASTER_PORT": "29500", "PET_NODE_RANK": "0"}
CASES = {
    "slurm": ("slurm", SLURM, "--nnodes=4 --node-rank=2 --master-addr=gpu007 --master-port=22345"),
    "a step of a slurm job": (
        "slurm",
        {**SLURM, "SLURM_STEP_NODELIST": "gpu[009,020]", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0"},
        "--nnodes=2 --node-rank=0 --master-addr=gpu009 --master-port=22345",
    ),
    "skypilot": ("skypilot", SKYPILOT, "--nnodes=2 --node-rank=1 --master-addr=10.0.0.4 --master-port=29400"),
    "indexed job": ("kubernetes", INDEXED, "--nnodes=3 --node-rank=2 --master-addr=sft-node-0-0.sft --master-port=29400"),
    "trainjob": ("kubernetes", TRAINJOB, "--nnodes=2 --node-rank=0 --master-addr=t-node-0-0.t --master-port=29500"),
}
COMPARED = ("min_nodes", "max_nodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_configs", "max_restarts")


@pytest.mark.parametrize("case", CASES)
def test_variables_become_the_arguments_of_torchrun(case: str) -> None:
    engine, environment, arguments = CASES[case]
    ours = launch_config(8, cluster_of(engine, environment))
    theirs, *_ = config_from_args(parse_args([*arguments.split(), "--nproc-per-node=8", "train.py"]))
    assert {key: getattr(ours, key) for key in COMPARED} == {key: getattr(theirs, key) for key in COMPARED}


def test_one_machine_of_an_engine_needs_no_meeting_place() -> None:
    config = launch_config(2, cluster_of("slurm", {**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}))
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "localhost:0")


@pytest.mark.parametrize(
    ("names", "first"),
    [("n1", "n1"), ("n[01-10]", "n01"), ("a,b[1-2]", "a"), ("r[1-2]-n[3,5-6]", "r1-n3"), ("gpu-a1[2],gpu-b", "gpu-a12")],
)
def test_the_first_node_of_a_slurm_list(names: str, first: str) -> None:
    assert first_node(names) == first


@pytest.mark.parametrize(
    ("engine", "environment", "says"),
    [
        ("kubernets", {}, "did you mean 'kubernetes'"),
        ("slurm", {}, "SLURM_JOB_NODELIST or SLURM_NODELIST is not set"),
        ("slurm", {**SLURM, "SLURM_LOCALID": "3"}, "--ntasks-per-node=1"),
        ("slurm", {**SLURM, "SLURM_NODEID": "4"}, "machine 4 of 4"),
        ("skypilot", {**SKYPILOT, "SKYPILOT_NODE_RANK": "one"}, "must be a whole number; got 'one'"),
        ("kubernetes", {**TRAINJOB, "PET_NODE_RANK": ""}, "PET_NODE_RANK or JOB_COMPLETION_INDEX is not set"),
        ("kubernetes", {**TRAINJOB, "PET_NNODES": "1:4"}, "PET_NNODES must be a whole number; got '1:4'"),
    ],
)
def test_missing_and_wrong_variables_are_named(engine: str, environment: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        cluster_of(engine, environment)


def test_a_machine_finds_itself_in_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"# two machines\nother.invalid slots=4\n\n{socket.gethostname()} slots=4  # here\n", encoding="utf-8")
    assert read_hostfile(path) == (Cluster(2, 1, "other.invalid:29400"), 4)
    path.write_text("a.invalid\nb.invalid\n", encoding="utf-8")
    assert read_hostfile(path, 1) == (Cluster(2, 1, "a.invalid:29400"), None)
    with pytest.raises(UserError, match="none of them is it; say which with --node"):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a slots=2\nb slots=3\n", "the same slots="),
        ("a\nb\na\n", "hosts:3: a is named twice"),
        ("a slots=0\n", "hosts:1: a line is HOST or HOST slots=N; got 'a slots=0'"),
        ("# nobody\n", "names no machine"),
    ],
)
def test_a_wrong_hostfile_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        read_hostfile(path, 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which another program listens."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_of_machine_0_that_is_in_use_is_named(taken: int, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=sft_lora", "runtime.device=cpu", "--nodes", "2", "--nproc", "1", "--master", f"127.0.0.1:{taken}"]
    assert run_command(["launch", *words]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert f"launch: 127.0.0.1:{taken} is in use by another program" in said and "--master HOST:PORT" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("master", ["somewhere", "somewhere:", ":29400", "somewhere:0", "somewhere:65536", "somewhere:http"])
def test_a_meeting_place_that_is_none_is_refused(master: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--master: must be HOST:PORT, with a port from 1 to 65535; got '{master}'")):
        launch_config(1, Cluster(2, 0, master))


def test_a_process_says_which_port_is_in_use_and_leaves_nothing_behind(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_accelerate()  # what a trainer of another library has left in this process
    started = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**started, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken)}.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"runtime\.processes: 127\.0\.0\.1:{taken} is in use .*\(MASTER_PORT\)"):
            Runtime.start(RuntimeSection(device="cpu", processes=2))
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(
        UserError, match=r"runtime\.processes: the processes could not connect to each other at 127\.0\.0\.1:http"
    ):
        Runtime.start(RuntimeSection(device="cpu", processes=2))


@pytest.mark.slow
def test_two_launchers_of_an_indexed_job_train_one_run(tmp_path: Path) -> None:
    words = [
        "recipe=sft_lora",
        "data.limit=8",
        "batch.size=4",
        "steps=2",
        "eval.batches=1",
        "eval.test=false",
        "data.cache=false",
    ]
    words += ["log.live=off", "runtime.device=cpu"]
    start = [sys.executable, "-P", "-m", "llmrecipe"]
    meet = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    ours = ["launch", *words, f"run.dir={tmp_path / 'two'}", "--nproc", "1", "--rendezvous", "kubernetes"]
    nodes = [
        subprocess.Popen([*start, *ours], env={**os.environ, **meet, "JOB_COMPLETION_INDEX": str(index)}, cwd=ROOT)
        for index in (0, 1)
    ]
    assert [node.wait(300) for node in nodes] == [0, 0]
    assert subprocess.run([*start, "train", *words, f"run.dir={tmp_path / 'one'}"], cwd=ROOT).returncode == 0
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert two[1] == pytest.approx(one[1], abs=1e-5)
