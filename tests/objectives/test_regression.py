"""Regression: the loss and gradients of Transformers' head with one label, and correlations against SciPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from llmrecipe.core.errors import RecipeError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.attention import install_attention
from llmrecipe.objectives.correlations import correlation, mean_ranks, rank_correlation
from llmrecipe.objectives.finetuning.regression import Regression
from tests.objectives.harness import rows_of
from tests.tiny import Tokenizer, tiny_config
from tests.trainings import events, train_recipe


def classifier(family: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(family, num_labels=1))
    install_attention(model, "sdpa")
    return model.double().eval()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_loss_and_gradients_are_those_of_the_stock_head_with_one_label(family: str) -> None:
    model, objective = classifier(family), Regression()
    roles = Roles(Engine(model), Stack([]), Tokenizer(), torch.device("cpu"), packing=True)
    batch = objective.collate(rows_of(objective), roles)
    assert (batch.layout is not None) == (family == "llama"), "decoders read packed rows, encoders pool padded ones"
    batch = batch.with_extra(scores=batch.extra["scores"].double())
    loss = objective.loss(batch, roles).total / objective.weight(batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = rows_of(objective)
    width = max(len(r["ids"]) for r in rows)
    ids = torch.tensor([r["ids"] + [0] * (width - len(r["ids"])) for r in rows])
    mask = torch.tensor([[1] * len(r["ids"]) + [0] * (width - len(r["ids"])) for r in rows])
    labels = torch.tensor([r["score"] for r in rows], dtype=torch.float64)
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-10)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-9, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_correlations_are_scipys_and_undefined_ones_are_0() -> None:
    torch.manual_seed(1)
    for _ in range(5):
        x, y = torch.randn(30).round(decimals=1), torch.randn(30).round(decimals=0)  # ties on both sides
        assert correlation(x, y) == pytest.approx(float(pearsonr(x.numpy(), y.numpy()).statistic), abs=1e-7)
        assert rank_correlation(x, y) == pytest.approx(float(spearmanr(x.numpy(), y.numpy()).statistic), abs=1e-12)
    assert mean_ranks(torch.tensor([5.0, 1.0, 5.0, 9.0]).numpy()).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert correlation(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) == 0.0
    assert rank_correlation(torch.tensor([1.0]), torch.tensor([2.0])) == 0.0


def test_a_run_reports_both_correlations_with_intervals_and_eval_repeats_them(tmp_path: Path) -> None:
    """Whole numbers are numbers too, and the one output survives the run directory."""
    from llmrecipe.evaluation.evaluate_model import evaluate_path

    rows = [{"text": f"the {'very ' * (i % 4)}red hen", "score": i % 4} for i in range(24)]
    for split in ("train", "valid", "test"):
        lines = rows if split == "train" else rows[:8]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    words = [f"data.path={tmp_path}/train.jsonl", f"data.validation={tmp_path}/valid.jsonl", f"data.test={tmp_path}/test.jsonl"]
    words += ["steps=2", "batch.size=8", "eval.test=true", "eval.bootstrap=50"]
    train_recipe(tmp_path / "run", "regression", "stack=[lora]", *words)
    held, test = events(tmp_path / "run", "evaluation")[-2:]
    assert {"eval/pearson", "eval/spearman", "eval/absolute_error"} <= held.keys() and "eval/pearson/low" not in held
    for name in ("pearson", "spearman", "loss", "absolute_error"):
        assert test[f"test/{name}/low"] <= test[f"test/{name}"] <= test[f"test/{name}/high"]
    again = evaluate_path(str(tmp_path / "run"), ["eval.bootstrap=50", "data.cache=false"], "test")
    assert again["spearman"] == pytest.approx(test["test/spearman"]) and again["loss"] == pytest.approx(test["test/loss"])
    assert again["spearman/low"] == pytest.approx(test["test/spearman/low"])


def test_classification_refuses_numbers_and_lists_of_labels_by_name(tmp_path: Path) -> None:
    for label, wanted in ((0.5, "objective=regression"), (["a", "b"], "problem=multi_label")):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": "a hen", "label": label}) + "\n" for _ in range(4)), encoding="utf-8")
        with pytest.raises(RecipeError, match=wanted):
            train_recipe(tmp_path / "run", "classify", f"data.path={path}", "steps=1")


def test_several_labels_a_row_are_a_1_for_each(tmp_path: Path) -> None:
    """Rows with one, two and no labels of three; the stock loss on the same rows is that of the objective."""
    from transformers import AutoModelForSequenceClassification

    from llmrecipe.objectives.finetuning.classification import Classification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        tiny_config("llama", num_labels=3, problem_type="multi_label_classification")
    )
    install_attention(model, "sdpa")
    roles = Roles(Engine(model.eval()), Stack([]), Tokenizer(), torch.device("cpu"), packing=True)
    objective = Classification(problem="multi_label")
    rows = [{"row": i, "ids": [5 + i, 9, 11], "label": label} for i, label in enumerate([[0], [2, 0], []])]
    batch = objective.collate(rows, roles)
    assert batch.extra["labels"].tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    loss = objective.loss(batch, roles).total / objective.weight(batch)
    theirs = model(input_ids=torch.tensor([r["ids"] for r in rows]), labels=batch.extra["labels"]).loss
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    found = objective.finish_evaluation(
        {}, {"predicted": torch.tensor([[1, 0, 1], [1, 0, 0]]), "gold": torch.tensor([[1, 0, 0], [1, 1, 0]])}
    )
    assert found["macro_f1"] == pytest.approx(1 / 3)  # F1 of the classes: 1, 0, 0
