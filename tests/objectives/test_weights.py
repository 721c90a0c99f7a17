"""Weights of turns and of tokens: read from rows, joined with the mask, one denominator of weights, refused where wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import DataError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.objectives.token_math import dynamic_fine_tuning, negative_log_likelihood
from tests.data.test_masks import BYTES, encode
from tests.data.toys import trained_text, turn
from tests.objectives.test_encoder_decoder import pair_model
from tests.tiny import roles_for, tiny_model
from tests.trainings import events, train_recipe

TALK = [
    turn("user", "q"), {**turn("assistant", "first"), "weight": 0.5}, turn("user", "r"),
    {**turn("assistant", "second"), "weight": 0}, turn("user", "s"), turn("assistant", "third"),
]  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"ids": [5, 9, 3, 44, 7], "trained": [0, 0, 0, 1, 1], "weights": [0.0, 0.0, 0.0, 0.25, 2.0], "row": 0},
    {"ids": [6, 21, 40], "trained": [0, 1, 1], "weights": [], "row": 1},
    {"ids": [33, 4, 17, 9, 1, 12], "trained": [0, 0, 1, 0, 0, 1], "weights": [0.0, 0.0, 3.0, 0.0, 0.0, 0.5], "row": 2},
]


def weighted_text(tokenizer: Any, row: dict[str, Any], weight: float) -> str:
    return trained_text(tokenizer, row["ids"], [int(w == weight) for w in row["weights"]])


@pytest.mark.parametrize("name", ["marks", "prefixes"])
def test_turns_have_the_weight_of_their_message_and_the_mask_decides_first(name: str) -> None:
    row, _ = encode(BYTES[name], {"messages": TALK}, "assistant")
    assert weighted_text(BYTES[name], row, 0.5) == "first<|im_end|>"
    assert weighted_text(BYTES[name], row, 1.0) == "third<|im_end|>"
    assert trained_text(BYTES[name], row["ids"], row["trained"]) == "first<|im_end|>third<|im_end|>"
    last, _ = encode(BYTES[name], {"messages": TALK[:2]}, "last")
    assert weighted_text(BYTES[name], last, 0.5) == "first<|im_end|>"
    _, report = encode(BYTES[name], {"messages": TALK[:4]}, "last")
    assert (report.kept, dict(report.dropped)) == (0, {"no trained token": 1})


@pytest.mark.parametrize("mask", ["completion", "assistant"])
def test_an_answer_to_a_prompt_has_the_weight_of_its_message(mask: str) -> None:
    raw = {"prompt": TALK[:3], "completion": [{**turn("assistant", "answer"), "weight": 2.0}]}
    row, _ = encode(BYTES["marks"], raw, mask, name="prompt_completion")
    assert weighted_text(BYTES["marks"], row, 2.0).rstrip("\n") == "answer<|im_end|>"
    assert sum(row["trained"]) == sum(w == 2.0 for w in row["weights"])


def test_weights_are_cut_with_their_tokens() -> None:
    whole, _ = encode(BYTES["marks"], {"messages": TALK}, "assistant")
    for policy, kept in (("keep_start", "first<|im_end|>"), ("truncate_prompt_left", "third<|im_end|>")):
        row, _ = encode(BYTES["marks"], {"messages": TALK}, "assistant", max_length=len(whole["ids"]) // 2, truncation=policy)
        weight = 0.5 if policy == "keep_start" else 1.0
        assert weighted_text(BYTES["marks"], row, weight) == kept
        assert [int(w > 0) for w in row["weights"]] == row["trained"]


def test_token_ids_have_weights_of_their_own_and_labels_decide_first() -> None:
    raw = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "weights": [9, 0.5, 7, 0]}
    row, _ = encode(BYTES["marks"], raw, name="tokens")
    assert row["trained"] == [0, 1, 0, 0]
    assert row["weights"] == [0.0, 0.5, 0.0, 0.0]
    _, report = encode(BYTES["marks"], {**raw, "weights": [1, 2]}, name="tokens")
    assert next(iter(report.dropped)).startswith("'weights' is not a list with a number for each")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "high"])
def test_a_weight_that_is_none_is_refused_at_its_line(value: Any) -> None:
    messages = [TALK[0], {**turn("assistant", "a"), "weight": value}]
    with pytest.raises(DataError, match=r"row 1: messages\[1\]\.weight is .*finite number from 0 up"):
        encode(BYTES["marks"], {"messages": messages}, "assistant")
    with pytest.raises(DataError, match=r"row 1: weights\[1\] is"):
        encode(BYTES["marks"], {"input_ids": [4, 5], "weights": [1.0, value]}, name="tokens")


def test_weights_that_no_mask_of_turns_reads_are_refused() -> None:
    with pytest.raises(DataError, match=r"objective\.mask=all does not tell turns apart"):
        encode(BYTES["marks"], {"messages": TALK}, "all")
    with pytest.raises(DataError, match=r"messages\[0\]\.weight is 2 for a turn of the user"):
        encode(BYTES["marks"], {"messages": [{**turn("user", "q"), "weight": 2}, turn("assistant", "a")]}, "assistant")
    both = {"prompt": TALK[:1], "completion": TALK[1:4]}
    with pytest.raises(DataError, match=r"objective\.mask=completion does not tell turns apart"):
        encode(BYTES["marks"], both, "completion", name="prompt_completion")


def test_formulas_by_hand() -> None:
    logprobs, weights = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0.5, 0.0, 2.0])
    assert negative_log_likelihood(logprobs, weights=weights).item() == pytest.approx(1.5)
    smoothed = negative_log_likelihood(logprobs, 0.1, torch.tensor([-3.0, -3.0, -4.0]), weights)
    assert smoothed.item() == pytest.approx(0.5 * 1.2 + 2.0 * 0.85)
    p = [torch.tensor(t).exp().item() for t in (-1.0, -0.5)]
    assert dynamic_fine_tuning(logprobs, weights).item() == pytest.approx(0.5 * p[0] + 2.0 * p[1] * 0.5)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_a_step_is_a_weighted_mean_whatever_the_layout(family: str, packing: bool) -> None:
    model: Any = (pair_model("t5") if family == "t5" else tiny_model()).double()
    objective, roles = Sft(), roles_for(model, Stack([]), packing and family != "t5")
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for row in ROWS:
        first = row["trained"].index(1)
        ids = torch.tensor(row["ids"])
        if family == "t5":
            own = torch.cat([torch.tensor([model.config.decoder_start_token_id]), ids[first:]])
            logits, target, at = (
                model(input_ids=ids[None, :first], decoder_input_ids=own[None]).logits[0, :-1],
                ids[first:],
                first,
            )
        else:
            logits, target, at = model(ids[None]).logits[0, :-1], ids[1:], 1
        weights = torch.tensor(row["weights"] or [float(t) for t in row["trained"]], dtype=torch.float64)[at:]
        total = total - (weights * logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]).sum()
        count += float(weights.sum())
    assert count == 0.25 + 2.0 + 2.0 + 3.0 + 0.5
    micros = [objective.collate(part, roles) for part in (ROWS[:1], ROWS[1:])]
    losses = [objective.loss(micro, roles) for micro in micros]
    torch.testing.assert_close(sum(x.total for x in losses), total, rtol=1e-7, atol=1e-9)
    assert sum(map(objective.weight, micros)) == count
    assert [x.metrics["nll"][1] for x in losses] == [2.0, 4.0]


def test_a_run_reports_the_weighted_mean_of_a_step_over_micro_batches(tmp_path: Path) -> None:
    ids = [[5, 9, 30, 44], [6, 21, 40, 41, 50, 3]]
    weights = [[0, 0.5, 0, 2], [0, 1, 1, 0, 3, 0.25]]
    lines = [json.dumps({"input_ids": i, "weights": w}) for i, w in zip(ids, weights, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [f"data.path={tmp_path / 'rows.jsonl'}", "steps=1", "batch.size=2", "batch.micro=1", "data.max_length=64"]
    run = train_recipe(tmp_path / "run", "sft_lora", *words, "schedule.warmup=0", "stack.lora.dropout=0", "eval.at_start=false")
    total = 0.0
    with torch.no_grad(), activate(Context(off=frozenset({"lora"}))):
        for one, w in zip(ids, weights, strict=True):
            logprobs = run.model.eval()(torch.tensor([one])).logits[0, :-1].log_softmax(-1)
            total -= float((torch.tensor(w[1:]) * logprobs.gather(-1, torch.tensor(one[1:])[:, None])[:, 0]).sum())
    assert events(tmp_path / "run")[0]["loss"] == pytest.approx(total / 7.75, rel=1e-5)
