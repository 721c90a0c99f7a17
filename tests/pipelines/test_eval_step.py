"""`eval` as a step measures what the verb measures, and rewards greedy answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.pipelines.steps.run_step import run_step
from llmrecipe.recipe.step_spec import compose_step

WORDS = ["model=tiny", "data=builtin:sums", "batch=4", "limit=8", "max_new_tokens=12", "log.live=off"]


def measured(folder: Path, *words: str) -> dict[str, Any]:
    run_step(compose_step("eval", [*WORDS, *words, f"run.dir={folder}"]))
    return json.loads((folder / "final" / "metrics.json").read_text(encoding="utf-8"))


def test_a_step_measures_what_the_verb_measures(tmp_path: Path) -> None:
    found = measured(tmp_path / "step", "data=builtin:sft", 'words=["eval.batches=1"]')
    wanted = evaluate_path("tiny", ["data.path=builtin:sft", "eval.batches=1"])
    assert found == {f"eval/{name}": value for name, value in wanted.items()}


def test_rewards_are_means_over_greedy_answers(tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1), "answer": str(i + 1)} for i in range(1, 7)]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    reward = "reward={right: {kind: exact_match, weight: 2.0}, short: {kind: length, most: 4}}"
    found = measured(tmp_path / "step", f"data={source}", "split=train", "limit=4", reward)
    kept = (tmp_path / "step" / "journal" / "rewards.jsonl").read_text().splitlines()
    values = [v for line in kept for v in json.loads(line)["value"]]
    assert len(values) == 4
    from llmrecipe.engine.sampling import Sampling
    from llmrecipe.evaluation.chat import Chat

    chat = Chat.open(["tiny"], [], Sampling(12))
    assert [v["answer"] for v in values] == [chat.answer(r["prompt"], remember=False) for r in rows[:4]]
    assert all(v["reward"] == pytest.approx(2 * v["reward/right"] + v["reward/short"]) for v in values)
    assert found["train/reward"] == pytest.approx(sum(v["reward"] for v in values) / 4)
    assert found["train/reward/right"] == pytest.approx(sum(v["reward/right"] for v in values) / 4)


def test_the_share_of_answers_that_match_a_list_of_phrases(tmp_path: Path) -> None:
    """A refusal rate: the mean over greedy answers of [one of the patterns is found]."""
    reward = 'reward={refusals: {kind: regex, pattern: ["^THE LIST", "[0-9]"], ignore_case: true}}'
    found = measured(tmp_path / "step", "data=builtin:sft", reward, 'words=["eval.batches=1"]')
    kept = (tmp_path / "step" / "journal" / "rewards.jsonl").read_text().splitlines()
    answers = [v["answer"] for line in kept for v in json.loads(line)["value"]]
    share = sum(a.lower().startswith("the list") or any(c.isdigit() for c in a) for a in answers) / len(answers)
    assert len(answers) == 8 and 0 < share < 1
    assert found["eval/reward/refusals"] == found["eval/reward"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["metrics=[exact_mach]"], "did you mean 'exact_match'?"),
        (["reward={rul: {}}"], "eval.reward.rul: 'rul' is not a kind of reward; did you mean 'rule'?"),
        (["reward={exact_match: {column: anser}}", "split=train"], "no column 'anser'; did you mean 'answer'?"),
        (["split=dev"], "split: must be one of 'train', 'validation', 'test'; got 'dev'"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_told_before_a_weight_is_read(
    tmp_path: Path, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrecipe.evaluation.evaluate_model.open_subject", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(RecipeError) as caught:
        measured(tmp_path / "step", *words)
    assert told in str(caught.value)
