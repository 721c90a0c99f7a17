"""The test split is scored once, at the end of a training; every further look is counted in the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.core.errors import DataError
from llmrecipe.data.prepare import prepare
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.runs.looks import FILE, note_look, read_looks
from llmrecipe.runs.run_record import read_run
from tests.data.toys import byte_tokenizer
from tests.trainings import events, train_recipe

WORDS = ["steps=2", "batch.size=8", "eval.batches=1", "data.limit=16", "eval.bootstrap=0", "save.every=1"]


def test_every_look_at_the_test_split_is_kept_and_nothing_else_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_recipe(run, "classify", *WORDS, "eval.test=true", "eval.every=1")
    scored = [e for e in events(run, "evaluation") if any(name.startswith("test/") for name in e)]
    assert [e["step"] for e in scored] == [2], "once, after the last step, however often validation was scored"
    assert [(look["by"], look["step"]) for look in read_looks(run)] == [("training", 2)]
    words = [*WORDS[2:5], "data.cache=false"]
    assert run_command(["eval", str(run), *words]) == 0
    (tmp_path / "other").mkdir()
    row = json.dumps({"text": "I can not find it.", "label": "neutral"}) + "\n"
    for split in ("train", "test"):
        (tmp_path / "other" / f"{split}.jsonl").write_text(row, encoding="utf-8")
    assert run_command(["eval", str(run), "--split", "test", f"data.path={tmp_path / 'other'}", *words]) == 0
    assert len(read_looks(run)) == 1, "neither validation rows nor the test rows of other data are the run's test split"
    capsys.readouterr()
    assert run_command(["eval", str(run), "--split", "test", "--json", *words]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["metrics"]["accuracy"] == pytest.approx(scored[0]["test/accuracy"])
    assert "look 2 at the test split" in shown.err
    assert run_command(["eval", str(run / "final"), "--split", "test", *words]) == 0
    assert [look["by"] for look in read_looks(run)] == ["training", "eval", "eval"]
    assert read_run(run).facts()["test_looks"] == 3


def test_training_without_a_test_leaves_the_split_closed(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "classify", *WORDS, "eval.test=false")
    assert read_looks(tmp_path / "run") == [] and "test_looks" not in read_run(tmp_path / "run").facts()
    with pytest.raises(DataError, match="the test split is sealed"):
        prepare(DataSection(path="builtin:classify"), byte_tokenizer(), "labelled", split="test", seed=0)


def test_a_cut_or_damaged_line_stops_nothing_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = '{"by": "eval"}\n'
    (tmp_path / FILE).write_text(whole + '{"by": "trai', encoding="utf-8")
    assert read_looks(tmp_path) == [{"by": "eval"}] and not caplog.records, "a process was killed while it wrote the line"
    assert note_look(tmp_path, "training", step=2) == 2
    assert [look["by"] for look in read_looks(tmp_path)] == ["eval", "training"] and f"{FILE}:2" in caplog.text
    assert note_look(tmp_path, "training", step=2) == 2, "the same weights"
    assert (note_look(tmp_path, "training", step=4), note_look(tmp_path, "eval"), note_look(tmp_path, "eval")) == (3, 4, 5)
    (tmp_path / FILE).write_bytes(b"\xff\xfe\n[1]\n" + whole.encode())
    caplog.clear()
    assert read_looks(tmp_path) == [{"by": "eval"}] and len(caplog.records) == 2
