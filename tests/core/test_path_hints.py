"""What an error says of a path that is not what it was given for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.core.path_hints import near_path, plain_path, runs_inside
from llmrecipe.runs.run_names import run_title

STAMPS = ("20260131-093000-0a1b2c3d", "20260131-093000-0a1b2c3d-2")


def make_runs(folder: Path) -> None:
    for number, stamp in enumerate(STAMPS):
        (folder / stamp).mkdir(parents=True)
        for name in ("recipe.yaml", "status.json"):
            (folder / stamp / name).write_text("{}")
        os.utime(folder / stamp / "status.json", (number, number))


def test_near_names_are_those_of_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "tea.csv").touch()
    assert near_path(tmp_path / "teas.csv") == "; did you mean 'tea.csv'?"
    assert near_path(tmp_path / "xyz") == ""
    assert near_path(tmp_path / "no" / "tea.csv") == f"; {tmp_path / 'no'} does not exist either"


def test_a_path_behind_a_key_is_taken_apart() -> None:
    assert plain_path("run.dir=runs/a") == "; it stands here without 'run.dir=': runs/a" and plain_path("runs/a") == ""


def test_the_newest_of_the_runs_inside_is_named_from_one_and_two_levels_above(tmp_path: Path) -> None:
    make_runs(tmp_path / "runs" / "tea")
    newest = tmp_path / "runs" / "tea" / STAMPS[1]
    for folder in (newest.parent, newest.parent.parent):
        assert runs_inside(folder) == f"; it holds 2 runs, the newest {newest}"
    assert runs_inside(newest) == runs_inside(tmp_path / "nothing") == ""


def test_a_run_without_a_name_of_its_own_is_called_by_the_folder_above() -> None:
    assert [run_title(Path("runs/tea") / stamp) for stamp in STAMPS] == ["tea", "tea"]
    assert run_title(Path("runs/tea/20260131")) == "20260131" and run_title(Path(STAMPS[0])) == STAMPS[0]


@pytest.mark.parametrize(
    "words",
    [
        ["report", "runs/tea"], ["compare", "runs/tea"], ["train", "resume=runs/tea"], ["export", "runs/tea", "--to", "merged"],
        ["verify", "runs/tea"], ["chat", "runs/tea", "--prompt", "a"], ["serve", "runs/tea"], ["check", "recipe=runs/tea"],
        ["chat", "runs", "--prompt", "a"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_verb_names_the_run_inside_a_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_runs(tmp_path / "runs" / "tea")
    monkeypatch.chdir(tmp_path)
    assert run_command(words) == 2
    assert f"it holds 2 runs, the newest runs/tea/{STAMPS[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["train", "recipe=recipes/tae.yaml"], "tea.yaml"),
        (["migrate", "recipes/tae.yaml"], "tea.yaml"),
        (["check", "recipe=tea", "data.path=tae.csv"], "tea.csv"),
        (["new", "--from-data", "tae.csv"], "tea.csv"),
        (["chat", "recipes/taes", "--prompt", "a"], "teas"),
        (["serve", "recipes/taes"], "teas"),
        (["push", "recipes/taes", "--repo", "me/tea", "--dry-run"], "teas"),
        (["list", "recipes", "--config-dir", "recipes/taes"], "teas"),
        (["eval", "tiny", "--tasks", "own", "--include", "recipes/taes"], "teas"),
        (["data", "recipe=sft", "data.path=tae.csv"], "tea.csv"),
        (["eval", "tiny", "--stereotypes", "tae.csv"], "tea.csv"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_every_verb_names_the_file_that_was_probably_meant(
    words: list[str], near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes" / "teas").mkdir(parents=True)
    (tmp_path / "recipes" / "tea.yaml").write_text("defaults: [/sft, _self_]\n")
    (tmp_path / "tea.csv").write_text("question,answer\na,b\n")
    monkeypatch.chdir(tmp_path)
    assert run_command(words) == 2
    assert f"did you mean '{near}'?" in capsys.readouterr().err
