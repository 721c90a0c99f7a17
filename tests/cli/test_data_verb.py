"""`llmrecipe data` shows what is trained, in text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.runs import tracker


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))


def rows(tmp_path: Path, name: str = "talks.jsonl") -> str:
    talk = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]
    path = tmp_path / name
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(4)))
    return f"data.path={path}"


def test_json_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "recipe=sft_lora", rows(tmp_path), "--rows", "1", "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["report"]["format"] == "messages" and facts["report"]["kept"] == 4
    assert facts["report"]["ended_share"] == 1.0 and facts["report"]["bos"] == {"1": 4}
    (row,) = facts["rows"]
    assert "".join(t["text"] for t in row["tokens"]["ids"] if t["trained"]) == "three<eos>"
    assert facts["lengths"]["longest"] == len(row["tokens"]["ids"])
    assert facts["lengths"]["padding_if_padded"] == 0.0


def test_text_marks_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "recipe=sft_lora", rows(tmp_path), "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("«three<eos>»") == 2 and "rows: 4 read, 4 kept, 0 dropped (0.0%)" in out
    assert "answers that end with an end token: 100.0%" in out


def test_rows_need_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that names a tracker which is missing here cannot train, and its rows can be looked at."""
    monkeypatch.setattr(tracker, "is_installed", lambda _: False)
    words = ["recipe=sft_lora", rows(tmp_path), "log.trackers=[wandb]"]
    assert run_command(["data", *words]) == 0
    assert run_command(["check", *words]) == 2
    assert "log.trackers: wandb is not installed" in capsys.readouterr().err


def test_mistakes_end_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "recipe=sft_lora", rows(tmp_path), "--split", "validation"]) == 2
    assert "no validation split" in capsys.readouterr().err
    assert run_command(["data", "recipe=sft_lora", rows(tmp_path), "--split", "test"]) == 2
    assert "sealed" in capsys.readouterr().err
    assert run_command(["data", "recipe=dpo_lora", rows(tmp_path)]) == 2
    assert "needs prompt+chosen+rejected" in capsys.readouterr().err
