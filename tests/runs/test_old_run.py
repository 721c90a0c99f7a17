"""A run directory written by version 0.1.0 opens: every verb that reads one does, and training goes on from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmrecipe.cli.app import main
from tests.support import ROOT

LOSS, ACCURACY = 5.750286, 0.234043
"""What the version that wrote it measured on the validation rows."""


@pytest.fixture(autouse=True)
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "tests/fixtures/old_run", tmp_path / "old_run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "old_run"


def cli(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["llmrecipe", *words])
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code


def test_eval_measures_what_the_run_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cli(monkeypatch, "eval", "old_run", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["loss"] == pytest.approx(LOSS, rel=1e-4)
    assert found["metrics"]["accuracy"] == pytest.approx(ACCURACY, abs=1e-4)


def test_chat_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cli(monkeypatch, "chat", "old_run", "--prompt", "hello")
    assert capsys.readouterr().out.strip()


def test_export_writes_a_peft_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    cli(monkeypatch, "export", "old_run", "--to", "peft", "--out", "adapter")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["r"] == 1


SMALL = ("steps=1", "eval.batches=1", "data.limit=64", "run.dir=new", "log.live=off")


def test_training_starts_from_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cli(monkeypatch, "train", "recipe=sft_lora", "model.path=old_run", "stack.lora.r=1", "stack.lora.target=attn.q", *SMALL)
    assert json.loads(Path("new/status.json").read_text())["status"] == "done"


def test_its_recipe_trains_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cli(monkeypatch, "train", "recipe=old_run/recipe.yaml", *SMALL)
    assert json.loads(Path("new/status.json").read_text())["status"] == "done"
