"""Scores of predicted labels are the library's on the same predictions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

from llmrecipe.core.errors import RecipeError
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.objectives.finetuning._engines.label_prediction import (
    binary_focal_loss,
    cross_entropy,
    expected_calibration_error,
    focal_loss,
    single_label_scores,
)
from llmrecipe.objectives.finetuning.classification import Classification
from llmrecipe.objectives.pretraining.nsp import Nsp
from tests.trainings import events, train_recipe


def roles_of(classes: int) -> Any:
    """What a breakdown reads of a model: the names of its outputs, of which there are more than ten."""
    return SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(id2label={i: f"c{i}" for i in range(classes)})))


@pytest.mark.parametrize("seed", range(6))
def test_scores_of_classes_are_scikit_learns_with_classes_that_one_side_or_both_lack(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    gold, predicted = (torch.randint(low, high, (20,), generator=draws) for low, high in ((0, 5), (2, 7)))
    wanted = {f"{kind}_f1": f1_score(gold, predicted, average=kind, zero_division=0) for kind in ("macro", "weighted")}
    wanted["mcc"] = matthews_corrcoef(gold, predicted)
    assert single_label_scores(predicted, gold) == pytest.approx(wanted, abs=1e-12)
    tensors = {"predicted": predicted, "gold": gold, "confidence": torch.rand(20, generator=draws)}
    found = Classification().finish_evaluation({}, tensors)
    assert found.keys() | {"accuracy"} == Classification().measures().keys()
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    assert single_label_scores(gold, gold) == {"macro_f1": 1.0, "weighted_f1": 1.0, "mcc": pytest.approx(1.0)}
    alike = torch.full_like(gold, 3)
    assert single_label_scores(alike, gold)["mcc"] == 0.0 == matthews_corrcoef(gold, alike)
    (table,) = Classification().breakdown(tensors, roles_of(12)).values()
    names = list(range(12))
    assert table["labels"] == [f"c{i}" for i in names]
    assert table["confusion"] == confusion_matrix(gold, predicted, labels=names).tolist()
    theirs = precision_recall_fscore_support(gold, predicted, labels=names, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "rows"), theirs, strict=True):
        assert table[name] == pytest.approx(values.tolist(), abs=1e-12), name


@pytest.mark.parametrize("seed", range(6))
def test_scores_of_several_labels_are_scikit_learns_with_labels_nobody_has(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    gold, predicted = ((torch.rand(30, 4, generator=draws) < share).long() for share in (0.3, 0.6))
    gold[:, 1] = predicted[:, 1] = 0
    objective = Classification(problem="multi_label")
    found = objective.finish_evaluation({}, {"predicted": predicted, "gold": gold})
    kinds = ("macro", "weighted", "micro")
    assert found == pytest.approx({f"{k}_f1": f1_score(gold, predicted, average=k, zero_division=0) for k in kinds}, abs=1e-12)
    assert found.keys() | {"accuracy"} == objective.measures().keys()
    right = (predicted == gold).all(-1).float().mean()
    assert float(right) == pytest.approx(accuracy_score(gold, predicted))
    (table,) = objective.breakdown({"predicted": predicted, "gold": gold}, roles_of(4)).values()
    theirs = precision_recall_fscore_support(gold, predicted, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "rows"), theirs, strict=True):
        assert table[name] == pytest.approx(values.tolist(), abs=1e-12), name


def test_the_calibration_error_by_hand() -> None:
    """Two bins: 0.9 twice, right once (a gap of 0.4), and 0.5 twice, both right (0.5): half of each."""
    confidence, right = torch.tensor([0.9, 0.9, 0.5, 0.5]), torch.tensor([True, False, True, True])
    assert expected_calibration_error(confidence, right) == pytest.approx(0.45, abs=1e-6)
    assert expected_calibration_error(torch.ones(3), torch.tensor([True, True, True])) == 0.0


def test_weights_of_classes_are_torchs_weighted_mean_over_the_step_and_not_in_evaluations() -> None:
    objective = Classification(class_weights={"b": 3.0, "c": 0.5}, label_smoothing=0.1)
    labels = torch.tensor([0, 1, 1, 2, 0])
    data = SimpleNamespace(labels=["a", "b", "c"], column=lambda name: ['"a"'] * 5)
    objective.check(SimpleNamespace(stack={}), data)  # type: ignore[arg-type]
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective.__dict__["scores"] = lambda batch, roles: scores[batch.extra["at"]]
    parts = []
    for rows in ([0, 1], [2, 3, 4]):
        batch = pad([Sequence([1], [0])] * len(rows), 0, extra={"labels": labels[rows], "at": torch.tensor(rows)})
        parts.append((objective.loss(batch, None).total, objective.weight(batch), objective.evaluate(batch, None)["loss"]))  # type: ignore[arg-type]
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    wanted = torch.nn.functional.cross_entropy(scores, labels, weights, label_smoothing=0.1)
    # With smoothing torch divides by the weights of the labels, too.
    torch.testing.assert_close(sum(p[0] for p in parts) / sum(p[1] for p in parts), wanted, rtol=1e-6, atol=0)
    plain = torch.nn.functional.cross_entropy(scores, labels, label_smoothing=0.1)
    torch.testing.assert_close(sum(p[2][0] for p in parts) / sum(p[2][1] for p in parts), plain, rtol=1e-6, atol=0)
    for given, problem, said in (({"d": 1.0}, "single_label", "no training row"), ({"a": 2.0}, "multi_label", "one class")):
        with pytest.raises(RecipeError, match=rf"objective\.class_weights.*{said}"):
            Classification(class_weights=given, problem=problem).check(SimpleNamespace(stack={}), data)  # type: ignore[arg-type]


def test_a_run_leaves_the_confusion_of_its_test_rows(tmp_path: Path) -> None:
    words = ["steps=2", "batch.size=8", "eval.batches=1", "eval.bootstrap=0", "eval.test=true", "data.limit=16"]
    train_recipe(tmp_path / "run", "classify", *words, "+objective.class_weights.mixed=4.0")
    table = json.loads((tmp_path / "run" / "final" / "test_labels.json").read_text(encoding="utf-8"))
    (scored,) = [e for e in events(tmp_path / "run", "evaluation") if "test/accuracy" in e]
    matrix = torch.tensor(table["confusion"])
    assert table["labels"] == ["mixed", "negative", "neutral", "positive"]
    assert scored["test/accuracy"] == pytest.approx(float(matrix.diagonal().sum() / matrix.sum()))
    seen = [f for f, *counts in zip(table["f1"], matrix.sum(0), matrix.sum(1), strict=True) if any(counts)]
    assert scored["test/macro_f1"] == pytest.approx(sum(seen) / len(seen))
    assert matrix.sum(1).tolist() == table["rows"]


@pytest.mark.parametrize("seed", range(3))
def test_the_scores_of_sentence_order_are_scikit_learns_with_equal_margins(seed: int) -> None:
    """The area is the share of (positive, negative) pairs in the right order, an equal margin for half."""
    draws = torch.Generator().manual_seed(seed)
    gold = torch.rand(40, generator=draws) < 0.4
    margin = torch.randint(-3, 4, (40,), generator=draws).float() + gold
    found = Nsp(with_mlm=False).finish_evaluation({}, {"margin": margin, "is_next": gold})
    apart = margin[gold][:, None] - margin[~gold][None]
    assert found["nsp/auc"] == pytest.approx(float((apart > 0).double().mean() + 0.5 * (apart == 0).double().mean()), abs=1e-12)
    assert found["nsp/auc"] == pytest.approx(roc_auc_score(gold, margin), abs=1e-12)
    assert found["nsp/f1"] == pytest.approx(f1_score(gold, margin > 0), abs=1e-12)
    assert Nsp(with_mlm=False).finish_evaluation({}, {"margin": margin, "is_next": torch.ones_like(gold)}) == {}


def test_the_focal_loss_by_hand_and_against_plain_cross_entropy() -> None:
    """Right labels with p = 0.5 and 0.9: 0.25 log 2 = 0.17329 and 0.01 log(10/9) = 0.0010536."""
    scores = torch.tensor([[0.5, 0.5], [0.1, 0.9]], dtype=torch.float64).log()
    labels = torch.tensor([0, 1])
    assert float(focal_loss(scores, labels, 2.0)) == pytest.approx(0.1732868 + 0.0010536, abs=1e-6)
    weighted = float(focal_loss(scores, labels, 2.0, torch.tensor([3.0, 1.0])))
    assert weighted == pytest.approx(3 * 0.1732868 + 0.0010536, abs=1e-6)
    assert float(focal_loss(scores, labels, 0.0)) == pytest.approx(float(cross_entropy(scores, labels)))
    # Of two labels a row: log-odds 0 and log 9, right where p is 0.5 and 0.9, or wrong where p is 0.1; the mean over labels.
    odds = torch.tensor([[0.0, 9.0], [0.0, 9.0]], dtype=torch.float64)
    odds[:, 1] = odds[:, 1].log()
    found = float(binary_focal_loss(odds, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 2.0))
    assert found == pytest.approx((0.1732868 + 0.0010536 + 0.1732868 + 0.81 * 2.3025851) / 2, abs=1e-6)


def test_the_focal_loss_has_a_slope_where_an_answer_is_certain() -> None:
    scores = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    for loss in (focal_loss(scores, torch.tensor([0, 0]), 0.5), binary_focal_loss(scores, torch.eye(2), 0.5)):
        (slope,) = torch.autograd.grad(loss, scores)
        assert torch.isfinite(slope).all() and torch.isfinite(loss)


def test_a_step_is_the_focal_loss_and_smoothing_is_refused_with_it() -> None:
    scores, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    batch: Any = SimpleNamespace(extra={"labels": labels})
    assert Classification(focal_gamma=1.5)._loss(batch, scores, None).total == focal_loss(scores, labels, 1.5)
    several: Any = SimpleNamespace(extra={"labels": torch.eye(3)})
    total = Classification(focal_gamma=1.5, problem="multi_label")._loss(several, scores[:3], None).total
    assert total == binary_focal_loss(scores[:3], torch.eye(3), 1.5)
    data: Any = SimpleNamespace(labels=["a", "b"], column=lambda _: ["a"])
    with pytest.raises(RecipeError, match=r"objective\.focal_gamma: label smoothing"):
        Classification(focal_gamma=1.0, label_smoothing=0.1).check(SimpleNamespace(stack={}), data)  # type: ignore[arg-type]
