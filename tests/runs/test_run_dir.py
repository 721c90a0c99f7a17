"""Run directories: what they hold, who may write, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmrecipe.core.errors import RunError
from llmrecipe.recipe.schema import RunSection
from llmrecipe.runs.run_dir import RunDir, recipe_hash

ROOT = Path(__file__).resolve().parents[2]


def composition(mapping: dict | None = None, name: str = "sft_lora", **run):
    mapping = mapping or {"seed": 1, "optim": {"kind": "adamw", "lr": 1e-5}, "text": "plain ${not} a reference"}
    return SimpleNamespace(name=name, mapping=mapping, recipe=SimpleNamespace(run=RunSection(**run)))


def test_a_new_run_directory_holds_its_recipe_command_environment_and_status(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llmrecipe", "train", "recipe=a b", "data.path=x'y"])
    run = RunDir.create(composition(root=str(tmp_path)))
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", run.path.name) and run.path.parent == tmp_path / "sft_lora"
    assert run.recipe() == composition().mapping
    assert run.path.joinpath("command.txt").read_text() == "llmrecipe train 'recipe=a b' 'data.path=x'\"'\"'y'\n"
    environment = json.loads(run.path.joinpath("environment.json").read_text())
    assert environment["packages"]["torch"] and environment["cores"] == os.cpu_count()
    assert run.read_status()["status"] == "running"
    run.status("done", step=7)
    status = json.loads(run.path.joinpath("status.json").read_text())
    assert (status["status"], status["step"]) == ("done", 7)


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    runs = [RunDir.create(composition(root=str(tmp_path))) for _ in range(3)]
    assert len({r.path for r in runs}) == 3


def test_the_key_stands_for_the_recipe_and_not_for_its_folder():
    base = {"seed": 1, "run": {"dir": None}}
    assert recipe_hash(base) == recipe_hash({"seed": 1, "run": {"dir": "elsewhere"}})
    assert recipe_hash(base) != recipe_hash({"seed": 2, "run": {"dir": None}})


def test_a_finished_run_is_not_overwritten(tmp_path):
    target = str(tmp_path / "out")
    RunDir.create(composition(dir=target)).status("done")
    before = (tmp_path / "out" / "recipe.yaml").read_bytes()
    with pytest.raises(RunError, match=r"run\.dir: .*out contains a finished run"):
        RunDir.create(composition({"seed": 2}, dir=target))
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == before


def test_what_a_kill_after_the_end_left_is_deleted_when_the_command_is_given_again(tmp_path):
    target = tmp_path / "out"
    run = RunDir.create(composition(dir=str(target)))
    (target / "final").mkdir()
    run.status("done")
    run.unlock()
    for left in (".writing-best", "checkpoints/.writing-step-000004"):
        (target / left).mkdir(parents=True)
        (target / left / "delta.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="contains a finished run"):
        RunDir.create(composition(dir=str(target)))
    assert sorted(p.name for p in target.iterdir() if p.is_dir()) == ["checkpoints", "final"]
    assert not list((target / "checkpoints").iterdir())
    (target / ".writing-best").mkdir()
    holder = RunDir.open(target)
    with pytest.raises(RunError, match="contains a finished run"):
        RunDir.create(composition(dir=str(target)))
    assert (target / ".writing-best").is_dir(), "somebody else is writing to the run"
    holder.unlock()


def test_an_interrupted_run_with_checkpoints_is_to_be_resumed(tmp_path):
    target = tmp_path / "out"
    run = RunDir.create(composition(dir=str(target)))
    (target / "checkpoints").mkdir()
    run.status("interrupted")
    with pytest.raises(RunError, match=r"contains a run \(interrupted\) with checkpoints; continue it with resume="):
        RunDir.create(composition(dir=str(target)))


def test_a_run_that_failed_before_it_saved_anything_may_be_started_again(tmp_path):
    target = tmp_path / "out"
    run = RunDir.create(composition(dir=str(target)))
    (target / "events.jsonl").write_text("{}\n")
    run.status("failed", error="out of memory")
    RunDir.create(composition({"seed": 5}, dir=str(target)))
    assert not (target / "events.jsonl").exists()
    assert RunDir.open(target, write=False).recipe() == {"seed": 5}


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(RunError, match="exists and is not a run directory"):
        RunDir.create(composition(dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "left", [["lock"], ["lock", ".recipe.yaml.writing"], ["lock", "recipe.yaml", "command.txt", ".status.json.writing"]]
)
def test_a_start_killed_before_its_first_status_may_be_given_again(tmp_path, left):
    target = tmp_path / "out"
    target.mkdir()
    for name in left:
        (target / name).write_text("half")
    RunDir.create(composition({"seed": 5}, dir=str(target)))
    assert RunDir.open(target, write=False).recipe() == {"seed": 5}
    assert not list(target.glob(".*"))


@pytest.mark.parametrize("others", [["recipe.yaml"], ["lock", "recipe.yaml", "thesis.txt"]])
def test_a_folder_that_no_start_left_is_not_touched(tmp_path, others):
    for name in others:
        (tmp_path / name).write_text("important")
    with pytest.raises(RunError, match="exists and is not a run directory"):
        RunDir.create(composition(dir=str(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)
    assert all((tmp_path / name).read_text() == "important" for name in others)


def test_opening_what_is_not_a_run_names_the_nearest(tmp_path):
    RunDir.create(composition(dir=str(tmp_path / "my_run")))
    with pytest.raises(RunError, match=r"is not a run directory .*did you mean 'my_run'"):
        RunDir.open(tmp_path / "my_rum")


def test_a_second_writer_is_kept_out_until_the_first_is_gone(tmp_path):
    target = tmp_path / "out"
    first = RunDir.create(composition(dir=str(target)))
    with pytest.raises(RunError, match=rf"is being written by another process \(process {os.getpid()} since"):
        RunDir.open(target)
    assert RunDir.open(target, write=False).read_status()["status"] == "running"
    first.status("interrupted")
    RunDir.open(target).unlock()


def test_a_killed_run_reads_as_interrupted_and_can_be_opened(tmp_path):
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from types import SimpleNamespace
        from llmrecipe.recipe.schema import RunSection
        from llmrecipe.runs.run_dir import RunDir
        RunDir.create(SimpleNamespace(name="x", mapping={{"seed": 1}}, recipe=SimpleNamespace(run=RunSection(dir=sys.argv[1]))))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")], check=False)
    run = RunDir.open(tmp_path / "out", write=False)
    assert json.loads((run.path / "status.json").read_text())["status"] == "running"
    assert run.read_status()["status"] == "interrupted"
    RunDir.open(tmp_path / "out").unlock()


@pytest.mark.parametrize("step", ["x", None, [1], True, -1, 1e308, 10**400])
def test_a_status_without_a_number_of_steps_is_read(tmp_path, step):
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"status": "running", "step": step}))
    (run / "events.jsonl").write_text('{"event": "step", "step": 3}\n')
    assert RunDir(run).read_status() == {"status": "interrupted", "error": "the process was killed", "step": 3}


def test_only_the_main_process_writes(tmp_path):
    told = []
    runtime = SimpleNamespace(is_main=True, broadcast_json=lambda value: told.append(value) or value)
    run = RunDir.create(composition(dir=str(tmp_path / "out")), runtime)
    other = RunDir.create(composition(), SimpleNamespace(is_main=False, broadcast_json=lambda value: told[0]))
    assert other.path == run.path
    other.status("failed", error="rank 1")
    assert run.read_status()["status"] == "running"
    with pytest.raises(RunError, match="another process"):
        RunDir.create(composition(dir=str(tmp_path / "out")), runtime)
    with pytest.raises(RunError, match="another process"):
        RunDir.create(composition(), SimpleNamespace(is_main=False, broadcast_json=lambda value: told[1]))


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_run_directory_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        run = RunDir.create(composition(root=str(tmp_path)))
    finally:
        os.umask(before)
    modes = {path: (path.is_dir(), path.stat().st_mode & 0o777) for path in (run.path, *run.path.rglob("*"))}
    assert len(modes) > 3
    assert {path.name: mode for path, (folder, mode) in modes.items() if mode != (0o777 if folder else 0o666) & ~mask} == {}
