"""compare, report and launch: what they read, what they say, what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.runs.events import Events
from llmrecipe.runs.run_record import differences, read_runs

ROOT = Path(__file__).resolve().parents[2]


def make_run(folder: Path, lr: float, losses: list[float], status: str = "done") -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"optim:\n  kind: adamw\n  lr: {lr}\nseed: 0\nrun:\n  dir: {folder}\n")
    (folder / "status.json").write_text(
        json.dumps({"status": status, "error": "<b>no</b>"} if status == "failed" else {"status": status})
    )
    (folder / "command.txt").write_text("llmrecipe train 'recipe=<x>'\n")
    (folder / "environment.json").write_text('{"python": "3.11"}\n')
    events = Events(folder, live="off")
    for step, loss in enumerate(losses, 1):
        events.step(step=step, loss=loss, lr=lr, tokens=100 * step, tokens_per_s=50.0 * step, peak_mem_mb=10.0 + step)
    events.evaluation(step=len(losses), **{"eval/loss": losses[-1] + 0.5})
    events.sample(step=len(losses), prompt="<script>alert(1)</script>", answer="ok")
    events.warning("mind & this")
    events.close()
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    return [
        str(make_run(tmp_path / "a" / "first", 1e-4, [3.0, 2.0, 1.0])),
        str(make_run(tmp_path / "a" / "second", 2e-4, [3.0, 2.5, float("nan")], "failed")),
    ]


def test_compare_as_json(two, capsys):
    assert run_command(["compare", *two, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["differences"] == {"optim.lr": [1e-4, 2e-4]}, "folders do not count as a difference"
    first, second = value["runs"]["first"], value["runs"]["second"]
    assert first == {
        "status": "done",
        "steps": 3,
        "loss": 1.0,
        "eval/loss": 1.5,
        "tokens": 300.0,
        "tokens_per_s": 100.0,
        "peak_mem_mb": 13.0,
    }
    assert (second["status"], second["steps"], second["loss"]) == ("failed", 3, 2.5)
    assert value["curves"]["second"]["loss"] == [[1, 3.0], [2, 2.5]]


def test_compare_as_text(two, capsys):
    assert run_command(["compare", *two]) == 0
    out = capsys.readouterr().out
    for part in ("first", "second", "optim.lr", "eval/loss", "3 -> 1", "█▅▁", "done", "failed"):
        assert part in out, part


def test_metrics_of_training_with_a_slash_in_their_name_have_a_curve(tmp_path):
    folder = make_run(tmp_path / "run", 1e-4, [1.0])
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": "step", "step": 2, "loss": 0.5, "rewards/margins": 0.25}\n')
    (record,) = read_runs([str(folder)])
    assert record.curve("rewards/margins") == [(2, 0.25)] and record.facts()["rewards/margins"] == 0.25


def test_scores_stand_with_their_intervals(tmp_path, capsys):
    """Ends that a run gives, and those of the standard errors of harness tasks, in one cell."""
    run = make_run(tmp_path / "run", 1e-4, [1.0])
    events = Events(run, live="off")
    events.evaluation(step=1, **{"test/accuracy": 0.75, "test/accuracy/low": 0.5, "test/accuracy/high": 0.875})
    events.close()
    scores = {"metrics": {"acc": 0.5, "f1": 0.25}, "errors": {"acc": 0.1}, "shots": 0, "limit": None, "rows": 4}
    (run / "tasks.json").write_text(json.dumps({"own": scores}))
    assert run_command(["compare", str(run)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip()]
    found = {name: rest[0].strip() for name, *rest in lines if rest}
    assert found["test/accuracy"] == "0.75 [0.5, 0.875]" and found["own/acc"] == "0.5 [0.304, 0.696]"
    assert found["own/f1"] == "0.25" and not any(name.endswith(("/low", "/high")) for name in found)


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [str(make_run(tmp_path / folder / "same", 1e-4, [1.0])) for folder in ("x", "y")]
    records = read_runs(paths)
    assert [r.name for r in records] == ["x/same", "y/same"]
    assert differences(records) == {}


def test_a_run_in_a_folder_of_its_own_making_has_the_name_above_and_keys_stand_apart(tmp_path, capsys):
    first, second, third = "20260131-093000-0a1b2c3d", "20260131-094000-0a1b2c3d", "20260131-095000-0a1b2c3d"
    paths = [str(make_run(tmp_path / name, lr, [1.0])) for name, lr in ((f"tea/{first}", 1e-3), (f"sft/{second}", 1e-4))]
    assert [record.name for record in read_runs(paths)] == ["tea", "sft"]
    again = str(make_run(tmp_path / "tea" / third, 1e-3, [1.0]))
    assert [record.name for record in read_runs([paths[0], again])] == [first, third]
    assert run_command(["compare", *paths]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("keys of the recipe") + 1].startswith("optim.lr ")
    assert run_command(["compare", paths[0], again]) == 0
    assert "keys of the recipe" not in capsys.readouterr().out


def test_what_compare_refuses(two, tmp_path, capsys):
    assert run_command(["compare", *two, "-m", "los"]) == 2
    assert "no run has a metric 'los'; did you mean 'loss'?" in capsys.readouterr().err
    assert run_command(["compare", str(tmp_path / "a" / "frist")]) == 2
    assert "is not a run directory (it has no recipe.yaml and status.json); did you mean 'first'?" in capsys.readouterr().err
    assert run_command(["compare", *two, "--plot", str(tmp_path / "x.nothing")]) == 2
    assert "--plot: cannot write" in capsys.readouterr().err


def test_compare_draws_curves(two, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run_command(["compare", *two, "--plot", str(tmp_path / "x.svg"), "-m", "loss", "-m", "lr"]) == 0
    text = (tmp_path / "x.svg").read_text()
    assert text.lstrip().startswith("<?xml") and len(text) > 5000


def test_plot_without_matplotlib_says_how_to_get_it(two, tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_command(["compare", *two, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'llmrecipe[plots]'" in capsys.readouterr().err
    assert run_command(["compare", *two]) == 0


def test_report_writes_its_page_into_the_run_or_into_a_file(two, tmp_path, capsys):
    assert run_command(["report", two[0]]) == 0
    assert capsys.readouterr().out == f"report: {two[0]}/report.html\n"
    assert run_command(["report", two[0], "-o", str(tmp_path / "here.html")]) == 0
    text = (tmp_path / "here.html").read_text()
    assert text == (Path(two[0]) / "report.html").read_text() and "&lt;script&gt;alert(1)" in text
    assert run_command(["report", two[0], "-o", str(tmp_path / "missing" / "here.html")]) == 2
    assert "report: cannot write" in capsys.readouterr().err


def test_compare_and_report_import_no_torch(two):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom llmrecipe.cli.app import run_command\n"
        f"assert run_command(['compare', *{two!r}]) == 0 and run_command(['report', {two[0]!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_launch_tells_a_mistake_once_and_starts_nothing(capsys, monkeypatch):
    import llmrecipe.runtime.distributed_launch as launcher

    started = []
    monkeypatch.setattr(launcher, "launch", lambda args, nproc, cluster: started.append((args, nproc, cluster.nodes)) or 0)
    assert run_command(["launch", "recipe=dpo_lora", "stack.lora.rr=8", "--nproc", "2"]) == 2
    assert "did you mean 'r'?" in capsys.readouterr().err and started == []
    assert run_command(["launch", "recipe=dpo_lora", 'data.path="a b=c"', "-n", "3", "--nodes", "2"]) == 0
    assert started == [(["train", "recipe=dpo_lora", 'data.path="a b=c"', "runtime.processes=6"], 3, 2)]


def test_launch_hands_on_the_exit_code_of_the_workers(monkeypatch):
    import llmrecipe.runtime.distributed_launch as launcher

    monkeypatch.setattr(launcher, "launch", lambda args, nproc, cluster: 130)
    assert run_command(["launch", "recipe=dpo_lora"]) == 130
