"""Both sides of a case of the harness are given the same: rows, reward, sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.cases import ANSWERS, BATCH, NEW_TOKENS, Case, peer_command, product_command
from tests.benchmarks.peer import arguments, even_words
from tests.benchmarks.rewards import even_words as product_reward
from tests.benchmarks.workload import dpo_rows, grpo_rows, sft_rows


@pytest.mark.parametrize(("text", "share"), [("w12 w7 w8 w9", 0.5), ("w4", 1.0), ("", 0.0), ("w31 w30 w33", 1 / 3)])
def test_the_reward_of_both_sides_is_the_share_of_even_words(text: str, share: float) -> None:
    assert product_reward(text) == pytest.approx(share)
    assert even_words([text, text], prompts=["", ""]) == [product_reward(text)] * 2


def test_sampling_is_the_same_on_both_sides(tmp_path: Path) -> None:
    case = Case("grpo", "tiny", "best_float32", 3, "long_answers", beta=0.04)
    command, _ = peer_command(case, tmp_path, tmp_path, tmp_path)
    peer = arguments(json.loads(Path(command[-1]).read_text(encoding="utf-8")))
    ours = dict(word.split("=", 1) for word in product_command(case, tmp_path, tmp_path, tmp_path)[0] if "=" in word)
    assert peer["num_generations"] == ANSWERS == int(ours["objective.answers"])
    assert peer["max_completion_length"] == NEW_TOKENS["long_answers"] == int(ours["objective.max_new_tokens"])
    assert peer["beta"] == 0.04 == float(ours["objective.beta"])
    answers = peer["per_device_train_batch_size"] * peer["gradient_accumulation_steps"]
    assert answers == ANSWERS * BATCH["grpo"] == ANSWERS * int(ours["batch.size"])
    assert case.name == "grpo, beta 0.04, long answers"


def test_a_case_without_an_own_weight_takes_that_of_trl() -> None:
    assert [Case(recipe, "tiny", "defaults", 1).divergence for recipe in ("sft_lora", "dpo_lora", "grpo")] == [None, 0.1, 0.0]


@pytest.mark.parametrize(("share", "low", "high"), [(0.4, 0.6, 0.75), (2 / 3, 1.8, 2.3)])
def test_answers_are_as_long_as_the_workload_says(share: float, low: float, high: float) -> None:
    def words(rows: list[dict[str, str]], column: str) -> int:
        return sum(len(row[column].split()) for row in rows)

    rows, pairs = sft_rows(300, 1, share), dpo_rows(300, 1, share)
    assert low < words(rows, "completion") / words(rows, "prompt") < high
    assert low < words(pairs, "chosen") / words(pairs, "prompt") < high
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in grpo_rows(300, 1, share)]
