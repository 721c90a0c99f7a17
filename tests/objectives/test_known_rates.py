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
from llmrecipe.objectives.pretraining.dae import Dae
from llmrecipe.objectives.pretraining.mmlm import Mmlm
from llmrecipe.objectives.pretraining.nsp import Nsp
from tests.objectives.test_encoder_decoder import pair_model
from tests.pictures import Held
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


# --- mmlm -------------------------------------------------------------------------------------------------------------

VALUES = 4


def drawings(first: int, count: int) -> Rows:
    """Pictures of 8 x 8 pixels, each patch of which has one half lit in one of four colours, and texts that name both."""
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=np.float32)
    upper = np.repeat([1, 0], 2).astype(np.float32)[:, None] * np.ones(4, dtype=np.float32)
    halves = [np.tile(half, (2, 2)) for half in (upper, upper[::-1], upper.T, upper.T[:, ::-1])]
    found = []
    for number in range(first, first + count):
        draws = np.random.default_rng([9, number])
        colour, half = (int(i) for i in draws.integers(VALUES, size=2))
        noise = draws.normal(scale=0.1, size=(3, 8, 8)).astype(np.float32)
        picture = colours[colour][:, None, None] * halves[half] + noise
        ids, marks = [1, 5, 10 + colour, 6, 20 + half, 2], [0, 0, 1, 0, 1, 0]
        words = [-1, 0, 1, 2, 3, -1]
        found.append({"row": number, "ids": ids, "words": words, "attribute": marks, "features": Held(picture, 4)})
    return found


def test_attributes_are_read_from_the_right_picture_and_guessed_without_it() -> None:
    """Colour and half are drawn by themselves: above 0.95 with the picture, 1/4 with none and with that of another row."""
    objective = Mmlm(patch=4, feature_width=48, target_words="attribute", prob=1.0, mask=1.0, random=0.0)
    roles = roles_of(objective, positions="learned", norm="layernorm")
    descend(objective, roles, lambda step: drawings(32 * step, 32), 150, 5e-3)
    held_out = drawings(1_000_000, 500)
    with torch.no_grad():
        sums = objective.evaluate(objective.collate(objective.evaluation_rows(held_out, list(range(500))), roles), roles)
    assert share(sums, "accuracy/attribute") > 0.95
    for view in ("removed", "shuffled"):
        assert share(sums, f"accuracy/attribute/{view}") == pytest.approx(1 / VALUES, abs=3 * (3 / 16 / 1000) ** 0.5)
    gains = objective.finish_evaluation({name: share(sums, name) for name in sums if sums[name][1]}, {})
    assert min(gains["gain/removed"], gains["gain/shuffled"]) > 1.0


# --- dae --------------------------------------------------------------------------------------------------------------


def counted(first: int, count: int) -> Rows:
    """Texts of twelve tokens that count upwards in a circle of twenty, from anywhere."""
    found = []
    for number in range(first, first + count):
        start = int(np.random.default_rng([10, number]).integers(20))
        row = {"row": number, "ids": [1, *(10 + (start + i) % 20 for i in range(12)), 2], "outlier": None}
        found.append({**row, "words": [-1, *range(12), -1], "sentences": [-1, *[0] * 12, -1]})
    return found


def test_removed_tokens_are_restored_far_above_the_unigram_rate() -> None:
    """Twenty tokens are equally frequent, so that 1 in 20 is right by chance, and what was left tells them all."""
    objective = Dae(permute_sentences=0.0)
    roles = roles_for(pair_model("native"), packing=False)
    descend(objective, roles, lambda step: counted(32 * step, 32), 150, 1e-2)
    with torch.no_grad():
        sums = objective.loss(objective.collate(counted(1_000_000, 200), roles), roles).metrics
    assert sums["accuracy/corrupted"][1] > 500 and share(sums, "accuracy/corrupted") > 0.5
