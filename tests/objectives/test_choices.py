"""Answer choices: T-Few's three losses against the formulas written out, from row to gradient."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe import compose
from llmrecipe.core.errors import DataError, RecipeError
from llmrecipe.data.prepare import prepare
from llmrecipe.engine.generation import prompt_and_references
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.finetuning.choices import Choices, choice_softmax, ranked_texts, unlikelihood
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.training.recipe_checks import check_objective
from tests.data.toys import byte_tokenizer
from tests.models.configs import tiny
from tests.tiny import roles_for, tiny_model

ROWS: list[tuple[list[int], list[list[int]]]] = [
    ([5, 9, 3], [[7, 2], [11, 12, 2], [13, 2]]),
    ([6, 21, 8, 30], [[40, 41, 42, 2]]),
    ([33, 4], [[9, 9, 2], [10, 2]]),
]
"""(prompt, choices, the right one first)."""
HARNESS_TASK = """task: which
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/asked.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}, {{metric: acc_mutual_info}}]
"""


def token_rows(rows: list[tuple[list[int], list[list[int]]]] = ROWS) -> list[dict[str, Any]]:
    return [
        {
            "row": i,
            "prompt_ids": p,
            "choice_ids": [t for c in choices for t in c],
            "choice_lengths": [len(c) for c in choices],
            "choice_tokens": [len(c) - 1 for c in choices],
            "right": len(choices) - 1,
            "choice_chars": [2 * len(c) for c in choices],
            "choice_bytes": [3 * len(c) for c in choices],
        }
        for i, (p, choices) in enumerate(rows)
    ]


def token_logprobs(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """(T,) log p of an answer's tokens, one sequence at a time."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id, *answer[:-1]]
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def by_hand(model: nn.Module, u: float = 1.0, n: float = 1.0, floor: float = 0.0) -> tuple[Tensor, list[float]]:
    """The mean of the rows' losses, and by how much the right answer's b is above the best wrong one's."""
    total, margins = torch.zeros((), dtype=torch.float64), []
    for prompt, choices in ROWS:
        t = [token_logprobs(model, prompt, choice) for choice in choices]
        b = torch.stack([x.mean() for x in t])
        loss = -b[0]
        if len(t) > 1:
            wrong = torch.cat(t[1:])
            loss = loss - u * (1 - wrong.exp() + floor).log().sum() / len(wrong)
            loss = loss - n * (b[0].exp() / b.exp().sum()).log()
            margins.append(float((b[0] - b[1:].max()).detach()))
        total = total + loss / len(ROWS)
    return total, margins


def model_of(family: str) -> nn.Module:
    if family == "t5":
        torch.manual_seed(0)
        return tiny("t5", dropout_rate=0.0).double().eval()
    return tiny_model(family).double()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("options", [{}, {"u": 0.5, "n": 2.0}, {"floor": 0.01}], ids=["plain", "weighted", "floor"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_loss_and_gradients_are_the_papers_formula_in_float64(family: str, options: dict[str, float], packing: bool) -> None:
    names = {"u": "unlikelihood_weight", "n": "ranking_weight", "floor": "unlikelihood_floor"}
    objective = Choices(**{names[key]: value for key, value in options.items()})
    model = model_of(family)
    wanted, margins = by_hand(model, **options)
    gradients = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    roles = roles_for(model, Stack([]), packing)
    batch = objective.collate(token_rows(), roles)
    assert objective.weight(batch) == 3
    loss = objective.loss(batch, roles)
    (loss.total / 3).backward()
    torch.testing.assert_close(loss.total.detach() / 3, wanted.detach(), atol=1e-10, rtol=1e-10)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    right, asked = loss.metrics["rank_accuracy"]
    assert (int(right), asked) == (sum(m > 0 for m in margins), 2.0)


def test_only_the_positions_of_choices_are_scored_and_a_packed_prompt_is_read_once() -> None:
    batch = Choices().collate(token_rows(), roles_for(tiny_model()))
    assert batch.target.numel() == sum(len(c) for _, choices in ROWS for c in choices)
    assert batch.tokens == batch.target.numel() + sum(len(p) for p, _ in ROWS)


def test_the_terms_by_hand() -> None:
    """p = 1/4: -log(3/4), with a floor of 0.01 -log(0.76); b = log 3, 0 | 0: -log(3/4) and 0."""
    p = torch.tensor([0.25], dtype=torch.float64).log()
    assert float(unlikelihood(p)) == pytest.approx(-math.log(0.75), abs=1e-12)
    assert float(unlikelihood(p, 0.01)) == pytest.approx(-math.log(0.76), abs=1e-12)
    assert math.isfinite(float(unlikelihood(torch.zeros(1))))
    scores = torch.tensor([math.log(3.0), 0.0, 0.0], dtype=torch.float64)
    found = choice_softmax(scores, torch.tensor([0, 0, 1]), torch.tensor([0, 2]), 2)
    torch.testing.assert_close(found, torch.tensor([-math.log(0.75), 0.0], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("listed", "wanted"), [([0, 1, 0, 1, 0], 2), ([0, 1, 1, 0, 0], 1), ([1, 0, 1, 0, 0], 1)])
def test_ranks_count_rows_that_have_a_choice_and_of_equal_ones_the_first_is_chosen(listed: list[int], wanted: int) -> None:
    """Row 0 prefers the right answer, row 1 neither, row 2 has no choice."""
    scores = torch.tensor([0.0, -1.0, -2.0, -2.0, -5.0])
    sums = torch.tensor([-3.0, -1.0, -2.0, -1.0, float("nan")])
    places = {"right_places": torch.tensor([0, 2, 4]), "wrong_places": torch.tensor([1, 3])}
    rows = {"choice_row": torch.tensor([0, 0, 1, 1, 2]), "choice_place": torch.tensor(listed)}
    batch: Any = SimpleNamespace(extra={**rows, **places})
    batch.here = batch
    found = Choices()._ranks({"rank_accuracy": scores, "rank_accuracy/sum": sums}, batch, 3)
    assert {name: (int(n), count) for name, (n, count) in found.items()} == {
        "rank_accuracy": (wanted, 2.0),
        "rank_accuracy/sum": (0, 2.0),
    }


def test_each_rank_divides_the_sum_by_its_own_size() -> None:
    """Weights of zero give every token log p = -log 64: texts of 1 and 2 tokens and an end, by hand."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    roles = roles_for(model)
    lengths = {"choice_lengths": [2, 3], "choice_tokens": [1, 2]}
    row = {"row": 0, "prompt_ids": [5, 9], "choice_ids": [7, 2, 11, 12, 2], **lengths}
    for sizes, wanted in (
        ({"choice_chars": [2, 5], "choice_bytes": [2, 2]}, {"sum": 1, "characters": 0, "bytes": 1}),
        ({"choice_chars": [4, 4], "choice_bytes": [2, 9]}, {"sum": 1, "characters": 1, "bytes": 0}),
    ):
        for right in (0, 1):
            loss = Choices().loss(Choices().collate([{**row, **sizes, "right": right}], roles), roles)
            found = {name: int(loss.metrics[f"rank_accuracy/{name}"][0]) for name in wanted}
            first = int(right == 0)
            assert found == wanted and loss.metrics["rank_accuracy/tokens"] == (first, 1.0), (
                "of equal means the first is chosen"
            )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_texts_are_scored_without_their_end_and_without_the_prompt_where_that_is_wanted(family: str, packing: bool) -> None:
    """The sums of each text, and what they gain over the same text after nothing but the start token, one by one."""
    model = model_of(family)
    roles = roles_for(model, Stack([]), packing)
    start = roles.tokenizer.bos_token_id if roles.tokenizer.bos_token_id is not None else roles.tokenizer.eos_token_id
    objective = Choices(mutual_information=True)
    data: Any = token_rows()
    batch = objective.collate(objective.evaluation_rows(data, [0, 1, 2]), roles)
    logprobs = roles.policy(batch)["logprobs"].detach()
    found = ranked_texts(logprobs, batch)
    texts = [(prompt, choice) for prompt, choices in ROWS for choice in choices]
    sums = torch.stack([token_logprobs(model, p, c)[:-1].sum() for p, c in texts]).detach()
    alone = torch.stack([token_logprobs(model, [start], c)[:-1].sum() for _, c in texts]).detach()
    torch.testing.assert_close(found["rank_accuracy/sum"], sums, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found["rank_accuracy/mutual_information"], sums - alone, atol=1e-10, rtol=1e-10)
    sizes = torch.tensor([len(c) - 1 for _, c in texts])
    torch.testing.assert_close(found["rank_accuracy/tokens"], sums / sizes, atol=1e-10, rtol=1e-10)
    plain = Choices()
    with torch.no_grad():
        without, shown = plain.evaluate(plain.collate(data, roles), roles), objective.evaluate(batch, roles)
    assert set(shown) - {"loss"} == set(objective.measures()) and "rank_accuracy/mutual_information" not in without
    for name, (value, count) in without.items():
        assert (float(shown[name][0]), shown[name][1]) == pytest.approx((float(value), count)), name


def test_the_ranks_are_those_of_lm_evaluation_harness(tmp_path: Path) -> None:
    """acc, acc_norm, acc_bytes and acc_mutual_info of rows with ties, by the harness itself on the same model and texts."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'llmrecipe[eval]'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = ["blue", "seven", "a red hen", "Köln", "the old barn", "no", "日本", "eight"]
    chance = random.Random(0)
    asked = [{"q": f"{i}: which of these is it?", "choices": chance.sample(words, 4), "gold": i % 4} for i in range(40)]
    for row in asked[:4]:
        row["choices"] = ["no", "no", "no", "no"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    (tmp_path / "which.yaml").write_text(HARNESS_TASK.format(tmp_path), encoding="utf-8")
    torch.manual_seed(0)
    model, tokenizer = tiny("gpt2", vocab_size=300).eval(), byte_tokenizer(template=None)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, add_bos_token=False)
    out = lm_eval.simple_evaluate(model=theirs, tasks=["which"], task_manager=TaskManager(include_path=str(tmp_path)))
    wanted = out["results"]["which"]
    rows = [
        {"prompt": row["q"], "completion": f" {row['choices'][row['gold']]}", "options": [f" {c}" for c in row["choices"]]}
        for row in asked
        if len({*row["choices"]}) == 4
    ]
    objective, roles = Choices(mutual_information=True), roles_for(model)
    roles.tokenizer = tokenizer
    data = read(tmp_path, rows, validation=0)
    found = objective.evaluate(objective.collate(objective.evaluation_rows(data, [*range(len(data))]), roles), roles)
    names = {"sum": "acc", "characters": "acc_norm", "bytes": "acc_bytes", "mutual_information": "acc_mutual_info"}
    same = 1.0  # of the four rows of equal options, the harness chooses the first, which is right in one
    for name, harness in names.items():
        right, count = found[f"rank_accuracy/{name}"]
        assert (float(right) + same) / (count + 4) == pytest.approx(wanted[f"{harness},none"]), name


def test_characters_and_bytes_are_those_of_the_answers_text(tmp_path: Path) -> None:
    rows = [{"prompt": "which? ", "completion": " Köln", "options": [" Köln", "\u65e5\u672c", "a b"]}]
    (found,) = read(tmp_path, rows)
    assert (found["choice_chars"], found["choice_bytes"]) == ([4, 2, 3], [5, 6, 3])


@pytest.mark.parametrize("policy", ["truncate_prompt_left", "keep_start", "drop"])
def test_no_choice_loses_its_end(policy: str, tmp_path: Path) -> None:
    """A byte a token and an end token: a long prompt gives way where the policy says so; no answer does."""
    rows = [
        {"prompt": "a? ", "completion": "yes", "options": ["yes", "no"]},
        {"prompt": "a question that is long? ", "completion": "yes", "options": ["yes", "no"]},
        {"prompt": "b? ", "completion": "right to the end", "options": ["right to the end", "right to the edge"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(path=str(path), cache=False, max_length=12, truncation=policy, max_dropped=0.9)
    tokenizer, found = byte_tokenizer(template=None), []
    data: Any = prepare(section, tokenizer, "choices", seed=0)
    for row in (data[i] for i in range(len(data))):
        texts, start = [], 0
        for length in row["choice_lengths"]:
            ids = row["choice_ids"][start : start + length]
            assert ids[-1] == tokenizer.eos_token_id
            texts.append(tokenizer.decode(ids, skip_special_tokens=True))
            start += length
        assert row["choice_chars"] == [len(text) for text in texts]
        found.append((tokenizer.decode(row["prompt_ids"], skip_special_tokens=True), *texts))
    short, cut = ("a? ", "yes", "no"), ("s long? ", "yes", "no")
    assert found == ([short, cut] if policy == "truncate_prompt_left" else [short])


def test_no_rows_give_a_loss_of_zero() -> None:
    model = tiny_model()
    roles = roles_for(model)
    loss = Choices().loss(Choices().collate([], roles), roles)
    assert float(loss.total.detach()) == 0.0


def read(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(DataSection(path=str(path), cache=False, **more), byte_tokenizer(), "choices", seed=0)


def test_rows_become_a_prompt_and_its_choices_the_right_one_first_and_each_once(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = read(
        tmp_path,
        [
            {"prompt": "a or bc? ", "completion": "bc", "options": ["a", "bc", "a"]},
            {"prompt": "say d ", "completion": "d", "options": None},
            {"prompt": "x", "completion": "y", "options": "no"},
        ],
        max_dropped=0.5,
    )
    rows = [data[i] for i in range(len(data))]
    assert len(rows) == 2
    first = next(row for row in rows if len(row["choice_lengths"]) == 2)
    cut = first["choice_lengths"][0]
    assert tokenizer.decode(first["prompt_ids"], skip_special_tokens=True) == "a or bc? "
    answers = [first["choice_ids"][:cut], first["choice_ids"][cut:]]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers] == ["bc", "a"]
    assert prompt_and_references(first, tokenizer)[1] == ["bc"]
    other = next(row for row in rows if len(row["choice_lengths"]) == 1)
    assert tokenizer.decode(other["choice_ids"], skip_special_tokens=True) == "d"


def test_pairs_are_questions_of_two_choices_and_soft_labels_are_refused(tmp_path: Path) -> None:
    data = read(tmp_path, [{"prompt": "p ", "chosen": "good", "rejected": "bad"}])
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(data[0]["choice_ids"], skip_special_tokens=True) == "goodbad"
    assert len(data[0]["choice_lengths"]) == 2
    with pytest.raises(DataError, match="right or wrong"):
        read(tmp_path, [{"prompt": "p ", "chosen": "good", "rejected": "bad", "p": 0.7}])


def test_rows_none_of_which_has_a_wrong_answer_are_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p ", "completion": "a", "options": ["a"]}] * 2
    with pytest.raises(RecipeError, match="give them `options`"):
        Choices().check(compose("choices"), read(tmp_path, rows))
    data = read(tmp_path, [*rows, {"prompt": "q ", "completion": "a", "options": ["a", "b"]}])
    assert sorted(map(len, data.column("choice_lengths"))) == [1, 1, 2]
    Choices().check(compose("choices"), data)


def test_mutual_information_needs_a_token_for_an_empty_prompt_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read(tmp_path, [{"prompt": "q ", "completion": "a", "options": ["a", "b"]}])
    without = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    monkeypatch.setattr("llmrecipe.objectives.finetuning.choices.tokenizer_of", lambda *_: without)
    Choices().check(compose("choices").recipe, data)
    with pytest.raises(RecipeError, match=r"objective\.mutual_information: the tokenizer has no start and no end token"):
        Choices(mutual_information=True).check(compose("choices").recipe, data)
    without.eos_token_id = 2
    Choices(mutual_information=True).check(compose("choices").recipe, data)


def test_the_error_is_the_share_of_rows_whose_right_answer_is_not_first_and_has_no_gradient() -> None:
    """The middle row has one choice, which is never above another one."""
    roles, objective = roles_for(tiny_model().double()), Choices(loss_type="error")
    margins = by_hand(roles.model)[1]
    batch = objective.collate(token_rows(), roles)
    loss = objective.loss(batch, roles)
    assert float(loss.total) == 2 - sum(margin > 0 for margin in margins) == 2 - float(loss.metrics["rank_accuracy"][0])
    assert not loss.total.requires_grad and not objective.has_gradient() and Choices().has_gradient()
    with pytest.raises(RecipeError, match="it has no gradient; add an update rule"):
        check_objective(objective, [])
