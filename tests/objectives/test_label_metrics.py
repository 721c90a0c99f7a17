"""Scores of predicted labels are the library's on the same predictions."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from llmrecipe.objectives.finetuning._engines.label_prediction import macro_f1
from llmrecipe.objectives.finetuning.classification import Classification
from llmrecipe.objectives.pretraining.nsp import Nsp


@pytest.mark.parametrize("seed", range(6))
def test_macro_f1_is_scikit_learns_with_classes_that_one_side_or_both_lack(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    gold, predicted = (torch.randint(low, high, (20,), generator=draws) for low, high in ((0, 5), (2, 7)))
    wanted = f1_score(gold, predicted, average="macro", zero_division=0)
    assert macro_f1(predicted, gold) == pytest.approx(wanted, abs=1e-12)
    found = Classification().finish_evaluation({}, {"predicted": predicted, "gold": gold})
    assert found == {"macro_f1": pytest.approx(wanted, abs=1e-12)}
    assert macro_f1(gold, gold) == 1.0


@pytest.mark.parametrize("seed", range(6))
def test_scores_of_several_labels_are_scikit_learns_with_labels_nobody_has(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    gold, predicted = ((torch.rand(30, 4, generator=draws) < share).long() for share in (0.3, 0.6))
    gold[:, 1] = predicted[:, 1] = 0
    found = Classification(problem="multi_label").finish_evaluation({}, {"predicted": predicted, "gold": gold})
    assert found["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0), abs=1e-6)
    right = (predicted == gold).all(-1).float().mean()
    assert float(right) == pytest.approx(accuracy_score(gold, predicted))


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
