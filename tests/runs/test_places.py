"""A run opens and goes on from any folder and after a move; the name of a folder never becomes that of a hub model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from llmrecipe import load
from llmrecipe.cli.app import run_command
from llmrecipe.core.errors import ModelError
from llmrecipe.core.paths import ASSETS
from llmrecipe.models import checkpoint_path
from llmrecipe.models.checkpoint_path import describe_base, find_base
from llmrecipe.runs.run_dir import RunDir

WORDS = ["recipe=sft_lora", "model.path=base", "data.path=rows.jsonl", "stack.lora.r=1", "batch.size=2", "log.live=off"]
SHORT = ["steps=1", "eval.at_start=false", "eval.test=false", "run.dir=runs/one"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, a run on both, and a run on that run, all named by relative paths."""
    place = tmp_path_factory.mktemp("project")
    shutil.copytree(ASSETS / "tiny", place / "base")
    rows = [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(6)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run_command(["train", *WORDS, *SHORT]) == 0
        assert run_command(["train", *WORDS, *SHORT, "model.path=runs/one", "run.dir=runs/two"]) == 0
    return place


def moved(project: Path, place: Path) -> Path:
    """A copy of the project, and nothing where it was."""
    shutil.copytree(project, place / "first")
    for name in ("one", "two"):
        file = place / "first" / "runs" / name / "final" / "stack.yaml"
        file.write_text(file.read_text().replace(str(project), str(place / "first")))
        (file.parent / "checksums.json").unlink()
    (place / "first").rename(place / "second")
    return place / "second"


@pytest.mark.parametrize("run", ["one", "two"])
def test_a_run_opens_from_any_folder_and_after_a_move(
    run: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = load(project / "runs" / run)
    base = yaml.safe_load((project / "runs" / run / "final" / "stack.yaml").read_text())["base"]
    assert (base["path"], base["relative"]) == (str(project / "base"), "../../../base")
    place = moved(project, tmp_path)
    again, _ = load(Path("second/runs") / run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (place / "base").rename(place / "elsewhere")
    with pytest.raises(ModelError, match=r"the base of .*final is gone: there is neither .*first/base nor .*second/base"):
        load(place / "runs" / run)


def test_a_run_goes_on_from_any_folder_and_after_a_move(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = moved(project, tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_command(["train", "resume=../second/runs/one", "steps=2"]) == 0
    assert f"continuing in {place}, where the run was started" in capsys.readouterr().out
    assert RunDir.open(place / "runs" / "one", write=False).read_status()["step"] == 2


def test_an_older_result_finds_a_relative_base_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "work" / "runs" / "one" / "final"
    final.mkdir(parents=True)
    (tmp_path / "work" / "base").mkdir()
    (tmp_path / "work" / "base" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_base({"path": "base"}, final) == str(tmp_path / "work" / "base")
    assert find_base({"path": "gpt2"}, final) == "gpt2" and find_base({"path": "tiny"}, final) == "tiny"


def test_a_hub_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = describe_base("someone/model", tmp_path / "final")
    assert base == {"path": "someone/model", "hub": True} and find_base(base, tmp_path / "final") == "someone/model"
    (tmp_path / "someone" / "model").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"stands on the hub model 'someone/model'.*here is a folder of that name"):
        find_base(base, tmp_path / "final")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(tmp_path / "snapshot" / "config.json"))
    assert find_base(base, tmp_path / "final") == str(tmp_path / "snapshot")
    assert describe_base("tiny", tmp_path) == {"path": "tiny"} and checkpoint_path.TINY.is_dir()


def test_a_folder_may_have_any_name_and_a_path_stands_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commas, equals signs, quotes and braces mean something in an override, and nothing in a path."""
    from llmrecipe.evaluation.eval_recipe import recipe_of

    monkeypatch.chdir(project)
    odd = tmp_path / 'it\'s a=1, [b] {c} (d) "e"'
    shutil.copytree(project / "runs" / "one", odd)
    assert recipe_of(str(odd), ["seed=3"]).recipe.model.path == str(odd)
    shutil.copytree(ASSETS / "tiny", tmp_path / "m = {n}")
    assert recipe_of(str(tmp_path / "m = {n}"), []).recipe.model.path == str(tmp_path / "m = {n}")
    for verb in (["eval"], ["chat"], ["report"], ["compare"], ["export", "--to", "merged"]):
        assert run_command([verb[0], "run=runs/one", *verb[1:]]) == 2
        assert "it stands here without 'run=': runs/one" in capsys.readouterr().err
