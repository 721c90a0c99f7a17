"""What a run left is verified when it is used: a byte that changed is noticed, whatever file it is in."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from llmrecipe import load
from llmrecipe.core import file_hashes
from llmrecipe.core.errors import RunError
from llmrecipe.runs import checksums
from llmrecipe.runs.checksums import read_checksums, verify, write_checksums
from llmrecipe.runs.run_dir import RunDir
from tests.trainings import train_recipe

SHORT = ["steps=1", "batch.size=2", "data.limit=4", "eval.at_start=false", "save.end=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an adapter, and one of every weight."""
    place = tmp_path_factory.mktemp("runs")
    train_recipe(place / "sft_lora", "sft_lora", *SHORT, "stack.lora.r=1")
    train_recipe(place / "sft", "sft", *SHORT)
    return place


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("sft_lora", "delta.safetensors"), ("sft_lora", "stack.yaml"), ("sft_lora", "tokenizer.json"),
     ("sft", "model/model.safetensors"), ("sft", "model/config.json")],
)  # fmt: skip
def test_a_changed_byte_is_noticed(recipe: str, name: str, runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / recipe, run)
    load(run)
    flip(run / "final" / name)
    with pytest.raises(RunError, match=f"{Path(name).name} has changed since it was written, so it is not used"):
        load(run)
    (run / "final" / name).unlink()
    with pytest.raises(RunError, match=f"{Path(name).name} is missing|is not a run directory|has not finished"):
        load(run)


def test_what_may_be_edited_and_a_lost_or_damaged_list_stop_nothing(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "sft_lora", run)
    listed = json.loads((run / "final" / "checksums.json").read_text())["files"]
    assert {"README.md", "metrics.json", "delta.safetensors", "stack.yaml"} <= listed.keys()
    (run / "final" / "README.md").write_text("my own words")
    load(run)
    (run / "final" / "checksums.json").write_text('{"files": {"delta')
    load(run)
    assert "cannot be verified" in caplog.text
    (run / "final" / "checksums.json").unlink()
    load(run)
    assert RunDir.open(run, write=False).read_status()["status"] == "done"


def test_a_large_file_is_read_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "LARGE", 4)
    (tmp_path / "weights").write_bytes(b"large")
    write_checksums(tmp_path)
    verify(tmp_path, lambda name: name == "weights")
    monkeypatch.setattr("llmrecipe.core.file_hashes.hashlib.file_digest", None)
    verify(tmp_path, lambda name: name == "weights")
    monkeypatch.undo()
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))
    flip(tmp_path / "weights")
    with pytest.raises(RunError, match="weights has changed"):
        verify(tmp_path, lambda name: name == "weights")


def test_reading_a_large_file_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, in megabytes; the hash is that of the whole file, also where the last part is short."""
    monkeypatch.setattr(file_hashes, "Pace", functools.partial(file_hashes.Pace, every=0.0))
    monkeypatch.setattr(file_hashes, "CHUNK", 1 << 20)
    content = bytes(range(256)) * (10 << 10) + b"end"
    (tmp_path / "model.safetensors").write_bytes(content)
    write_checksums(tmp_path)
    assert read_checksums(tmp_path)["model.safetensors"]["sha256"] == hashlib.sha256(content).hexdigest()
    verify(tmp_path, lambda name: True)
    shown = capsys.readouterr()
    lines = [f"{doing} model.safetensors, megabytes: {n} of 2" for doing in ("hashing", "verifying") for n in (1, 2, 2)]
    assert [line for line in shown.err.splitlines() if "model.safetensors" in line] == lines and shown.out == ""
