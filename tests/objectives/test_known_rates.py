"""Objectives on synthetic rows of which the best possible rate is known, trained directly, without a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.pretraining.contrastive import Contrastive
from llmrecipe.objectives.pretraining.nsp import Nsp
from tests.tiny import roles_for, tiny_masked_model

Rows = list[dict[str, Any]]


def roles_of(objective: Any, **config: Any) -> Roles:
    """A small native encoder with the heads of an objective."""
    model = tiny_masked_model("llmrecipe_native", num_key_value_heads=4, **config)
    objective.prepare_model(model, 0)
    return roles_for(model, packing=True)


def descend(objective: Any, roles: Roles, rows: Callable[[int], Rows], steps: int, lr: float) -> None:
    """Take steps of Adam at a rate that falls to 0, each on the mean loss of its own rows."""
    model: nn.Module = roles.model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = objective.collate(rows(step), roles)
        optimizer.zero_grad()
        (objective.loss(batch, roles).total / objective.weight(batch)).backward()
        optimizer.step()
    model.eval()


def share(sums: dict[str, tuple[Any, float]], name: str) -> float:
    """A metric as the mean of its parts."""
    return float(sums[name][0]) / sums[name][1]


# --- nsp --------------------------------------------------------------------------------------------------------------

TOPICS, WORDS, SENTENCES = 24, 2, 6


def documents(first: int, count: int, topical: bool) -> Rows:
    """Documents of six sentences of two tokens: of one topic each, or of any tokens."""
    found = []
    for number in range(first, first + count):
        draws = np.random.default_rng([7, number])
        topic = int(draws.integers(TOPICS))
        low, high = (WORDS * topic, WORDS * (topic + 1)) if topical else (0, WORDS * TOPICS)
        ids = [10 + int(i) for i in draws.integers(low, high, 2 * SENTENCES)]
        found.append({"row": number, "ids": ids, "words": list(range(len(ids))), "sentences": [2] * SENTENCES, "epoch": 0})
    return found


def pairs_told_apart(topical: bool) -> tuple[float, int]:
    """Accuracy on pairs of documents that were not trained on, and how many pairs there were."""
    torch.manual_seed(0)
    objective = Nsp(balance="exact")
    roles = roles_of(objective, type_vocab_size=2, positions="none")
    roles.max_length = 2 * SENTENCES + 3

    def rows(step: int) -> Rows:
        roles.data = documents(32 * step, 32, topical)
        return list(roles.data)

    descend(objective, roles, rows, 400, 5e-3)
    roles.data = documents(1_000_000, 1000, topical)
    with torch.no_grad():
        batch: Batch = objective.collate(roles.data, roles)
        return share(objective.evaluate(batch, roles), "nsp/accuracy"), int(objective.weight(batch))


@pytest.mark.slow
def test_a_segment_of_another_topic_is_told_and_without_structure_none_is() -> None:
    """Of one topic in 24 come 1 in 24 partners from elsewhere too, so that no one is right more often than 0.979."""
    accuracy, _ = pairs_told_apart(topical=True)
    assert accuracy > 0.95
    accuracy, pairs = pairs_told_apart(topical=False)
    assert pairs > 1000 and abs(accuracy - 0.5) < 3 * 0.5 / pairs**0.5


# --- contrastive ------------------------------------------------------------------------------------------------------

MEANINGS = 20


def paraphrases(first: int, count: int) -> Rows:
    """Pairs of texts that name the same four of twenty things in words of their own, each in an order of its own."""
    found = []
    for number in range(first, first + count):
        draws = np.random.default_rng([8, number])
        things = draws.choice(MEANINGS, 4, replace=False)
        a, b = (([int(i) for i in base + draws.permutation(things)]) for base in (10, 35))
        found.append({"row": number, "ids_a": a, "ids_b": b, "ids_c": None, "score": None, "label": None})
    return found


def test_paraphrases_are_found_among_a_hundred_from_chance_on() -> None:
    """No word of a text is in its paraphrase, so fresh weights find 1 in 100."""
    objective = Contrastive(loss_type="infonce", pool="avg")
    roles = roles_of(objective, positions="none")

    def found() -> float:
        with torch.no_grad():
            kept = objective.collect(objective.collate(paraphrases(1_000_000, 100), roles), roles)
        return objective.finish_evaluation({}, kept)["recall@1"]

    assert found() <= 0.05
    descend(objective, roles, lambda step: paraphrases(32 * step, 32), 60, 5e-3)
    assert found() > 0.9
