"""`--quiet`, `-v` and `--json` on the verbs that work: what is on stdout, what on stderr, and what is left out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from llmrecipe.cli.app import build_app
from llmrecipe.cli.app import run_command as command
from llmrecipe.core import verbosity

WORKING = [
    "train",
    "launch",
    "search",
    "step",
    "generate",
    "label",
    "export",
    "push",
    "adapt",
    "eval",
    "verify",
    "check",
    "serve",
    "migrate",
    "new",
    "report",
    "compare",
    "data",
]
SHORT = ["recipe=sft_lora", "steps=2", "eval.batches=1", "eval.at_start=false", "data.limit=16"]


def options(verb: str) -> set[str]:
    """The names of a verb's options."""
    group = typer.main.get_command(build_app())
    return {name for option in group.commands[verb].params for name in option.opts}  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """A command leaves the environment and the log as they were."""

    def state() -> tuple[list[str], int, int]:
        logger = logging.getLogger("llmrecipe")
        return [name for name in os.environ if name.startswith("LLMRECIPE")], logger.level, len(logger.handlers)

    before = state()
    yield
    assert state() == before


def test_every_verb_that_works_has_them() -> None:
    for verb in WORKING:
        missing = {"--quiet", "-q", "--verbose", "-v", "--json"} - options(verb) - ({"--json"} if verb == "new" else set())
        assert not missing, f"{verb}: {missing}"


def test_training_quietly_prints_where_the_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert command(["train", "--quiet", *SHORT, f"run.dir={run}"]) == 0
    found = capsys.readouterr()
    assert found.out == f"done: {run}\n"
    assert not [line for line in found.err.splitlines() if not line.startswith("warning") and "shards" not in line]


def test_training_with_json_prints_facts_and_its_progress_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert command(["train", "--json", *SHORT, f"run.dir={run}"]) == 0
    found = capsys.readouterr()
    facts = json.loads(found.out)
    assert (facts["run"], facts["status"], facts["steps"]) == (str(run), "done", 2)
    assert "step 2/2" in found.err


def test_training_verbosely_prints_every_step_every_metric_and_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["train", *SHORT, f"run.dir={tmp_path / 'a'}"]) == 0
    usual = capsys.readouterr().out
    assert command(["train", "-v", *SHORT, f"run.dir={tmp_path / 'b'}"]) == 0
    found = capsys.readouterr()
    assert "grad_norm" in found.out and "grad_norm" not in usual
    assert "step 1/2" in found.out and "step 2/2" in found.out


def test_both_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["check", "-q", "-v", "recipe=sft_lora"]) == 2
    assert "one leaves out what the other adds" in capsys.readouterr().err


def test_the_log_is_shown_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrecipe.recipe import compose

    real = compose.compose

    def logged(*given: object, **options: object) -> object:
        logging.getLogger("llmrecipe").info("composed %s", given[0])
        return real(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(compose, "compose", logged)
    assert command(["check", "-v", "recipe=sft_lora", "data.limit=8"]) == 0
    assert "log: composed sft_lora" in capsys.readouterr().err
    assert command(["check", "recipe=sft_lora", "data.limit=8"]) == 0
    assert "composed" not in capsys.readouterr().err
    assert not verbosity.is_verbose()
