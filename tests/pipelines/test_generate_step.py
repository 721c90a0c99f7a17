"""`generate`: what a model answers becomes rows, the same rows wherever it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.core.errors import DataError, Interrupted, RecipeError, RunError
from llmrecipe.data.formats.prompts import read_prompts
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.chat import Chat
from llmrecipe.pipelines.steps.generate import Generate
from llmrecipe.pipelines.steps.run_step import run_step
from llmrecipe.recipe.step_spec import compose_step

SMALL = ["model=tiny", "prompts=builtin:prompts", "limit=6", "max_new_tokens=6", "batch=4", "log.live=off"]


def generated(folder: Path, *words: str) -> list[dict[str, Any]]:
    run_step(compose_step("generate", [*SMALL, *words, f"run.dir={folder}"]))
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def test_greedy_rows_are_what_chat_answers(tmp_path: Path) -> None:
    rows = generated(tmp_path / "rows", "temperature=0", "max_new_tokens=24")
    chat = Chat.open(["tiny"], [], Sampling(24))
    prompts = read_prompts("builtin:prompts", limit=6)
    assert [r["prompt"] for r in rows] == [p.prompt for p in prompts]
    assert [r["completion"] for r in rows] == [chat.answer(p.turns[0]["content"], remember=False) for p in prompts]
    assert all({"topic", "avoid"} <= set(r) for r in rows)
    metrics = json.loads((tmp_path / "rows" / "final" / "metrics.json").read_text())
    assert (metrics["train/rows"], metrics["answers"]) == (6, 6)


def test_answers_end_before_a_stop_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rows as without, cut; an answer that reached one has come to its end. `chat` and `eval` cut alike."""
    words = ["temperature=0", "max_new_tokens=24", "limit=3"]
    whole = [row["completion"] for row in generated(tmp_path / "whole", *words)]
    stop = whole[0].split()[1]
    rows = [row["completion"] for row in generated(tmp_path / "cut", *words, f"stop=[{stop}]", "cut=drop")]
    assert rows == [text.split(stop)[0].strip() for text in whole] and rows != whole
    prompts = read_prompts("builtin:prompts", limit=3)
    assert [Chat.open(["tiny"], [], Sampling(24, stop=(stop,))).answer(p.turns[0]["content"]) for p in prompts[:1]] == rows[:1]
    capsys.readouterr()
    assert app.run_command(["chat", "tiny", "-p", prompts[0].turns[0]["content"], "--stop", stop]) == 0
    assert capsys.readouterr().out.strip() == rows[0]
    assert app.run_command(["chat", "tiny", "-p", "Hello", "--stop", ""]) == 2 and "--stop: an empty" in capsys.readouterr().err
    assert app.run_command(["generate", *SMALL, "stop=['']"]) == 2 and "stop" in capsys.readouterr().err


def test_a_stopped_generation_goes_on_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generated(tmp_path / "whole", "n=2")
    assert all(len(r["completions"]) == 2 for r in whole)
    ask, asked = Generate._ask, []

    def stop(self: Generate, subject: Any, part: list[list[int]], *more: Any) -> Any:
        asked.append(len(part))
        for count, each in enumerate(ask(self, subject, part, *more)):
            if len(asked) == 1 and count == 4:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(Generate, "_ask", stop)
    with pytest.raises(Interrupted, match="the same command resumes"):
        generated(tmp_path / "stopped", "n=2")
    assert json.loads((tmp_path / "stopped" / "status.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "stopped" / "train.jsonl").exists()
    assert generated(tmp_path / "stopped", "n=2") == whole
    assert asked == [6, 2]
    assert generated(tmp_path / "stopped", "n=2") == whole and len(asked) == 2
    with pytest.raises(RunError, match=r"other options \(n\)"):
        generated(tmp_path / "stopped", "n=3")


def test_answers_do_not_depend_on_how_many_are_drawn_at_once(tmp_path: Path) -> None:
    assert generated(tmp_path / "a", "n=2", "batch=1") == generated(tmp_path / "b", "n=2", "batch=12")


def test_another_seed_draws_other_answers(tmp_path: Path) -> None:
    first, again, other = (generated(tmp_path / name, f"seed={seed}") for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again != other


def test_a_prompt_keeps_its_columns_and_the_answer_it_had(tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "a", "completion": "b", "topic": "t"}\n{"prompt": "c", "chosen": "d", "rejected": "e"}\n')
    first, second = read_prompts(str(source))
    assert (first.prompt, first.columns) == ("a", {"reference": "b", "topic": "t"})
    assert second.columns == {}
    assert len(read_prompts(str(source), limit=1)) == 1
    with pytest.raises(DataError, match=r"prompts: .*no validation split"):
        read_prompts(str(source), "validation")


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["n=2", "temperature=0"], RecipeError, "the 2 answers to a prompt would be the same"),
        (["temperatur=1"], RecipeError, "did you mean 'temperature'?"),
        (["prompts=builtin:promts"], DataError, "did you mean 'prompts'?"),
        (["top_p=2.0"], RecipeError, "top_p: must be <= 1; got 2.0"),
        (["splits=[trane]"], RecipeError, "did you mean 'train'?"),
        (["model=${stage:x}"], RunError, "only a recipe with `stages` has stages"),
        (["seed=a"], RecipeError, "seed: must be a whole number"),
    ],
)
def test_what_cannot_be_done_is_told_before_a_weight_is_read(
    tmp_path: Path, words: list[str], error: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrecipe.evaluation.evaluate_model.open_subject", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(error) as caught:
        generated(tmp_path / "rows", *words)
    assert told in str(caught.value)
    assert not (tmp_path / "rows").exists()


def test_the_verb_finds_what_the_same_words_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [w for w in SMALL if not w.startswith("limit")] + ["limit=2"]
    assert app.run_command(["generate", *words]) == 0
    done = capsys.readouterr().out.split("done: ")[1].strip()
    assert app.run_command(["step", "generate", *words]) == 0
    assert f"reused: {done}" in capsys.readouterr().out
    assert app.run_command(["generate", "model=tiny"]) == 2
    assert "prompts: must be given" in capsys.readouterr().err
