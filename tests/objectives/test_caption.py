"""Captioning: what a token of an encoder sees, whole captions, views of a row, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from llmrecipe.core.errors import RecipeError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.masks import causal_mask
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.finetuning.caption import Caption
from tests.pictures import held_vectors
from tests.tiny import Tokenizer, tiny_masked_model, tiny_model

WIDTH = 6


def row(number: int, ids: list[int], count: int = 3) -> dict[str, Any]:
    return {"row": number, "ids": ids, "trained": [0] + [1] * (len(ids) - 1), "features": held_vectors(number, count, WIDTH)}


ROWS = [row(0, [1, 9, 14, 30, 2]), row(1, [1, 22, 2], 4), row(2, [1, 7, 7, 41, 12, 2], 1)]


def roles_of(objective: Caption, model: Any, packing: bool = False) -> Roles:
    objective.prepare_model(model, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return Roles(Engine(model.double()).eval(), Stack([]), Tokenizer(), torch.device("cpu"), packing)


def caption() -> Caption:
    return Caption(features="frame", feature_width=WIDTH)


def test_the_mask_of_a_prefix() -> None:
    """Two rows of a prompt of 2 and of none, the second with two places of padding."""
    found = causal_mask(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([2, 0]))[:, 0].int().tolist()
    assert found == [
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]],
    ]


@pytest.mark.parametrize("family", ["bert", "llmrecipe_native"])
def test_an_encoder_sees_the_picture_whole_and_of_the_text_what_is_before(family: str) -> None:
    """Another last token changes its own likelihood alone; another last feature changes that of every token."""
    objective = caption()
    roles = roles_of(objective, tiny_masked_model(family))

    def logprobs(one: dict[str, Any]) -> torch.Tensor:
        return roles.policy(objective.collate([one], roles), want="continued")["logprobs"].detach()

    own = ROWS[0]
    before = logprobs(own)
    other = logprobs({**own, "ids": [*own["ids"][:-1], 17]})
    assert torch.equal(other[:-1], before[:-1]) and float((other[-1] - before[-1]).abs()) > 1e-3
    seen = own["features"].load()
    seen[-1] += 1.0
    moved = logprobs({**own, "features": type(own["features"])(seen, own["features"].slots)})
    assert bool(((moved - before).abs() > 1e-6).all())
    joined = roles.policy(objective.collate(ROWS, roles), want="continued")["logprobs"].detach()
    torch.testing.assert_close(joined, torch.cat([logprobs(one) for one in ROWS]), atol=1e-10, rtol=0)


def written(objective: Caption, roles: Roles, one: dict[str, Any], length: int) -> list[int]:
    """Ids of a caption that is written token by token, each the likeliest."""
    ids = [1]
    for _ in range(length):
        rows = [{**one, "ids": [*ids, v], "trained": [0] * len(ids) + [1]} for v in range(64)]
        ids.append(int(roles.policy(objective.collate(rows, roles), want="continued")["logprobs"].argmax()))
    return ids


@pytest.mark.parametrize("make", [lambda: tiny_masked_model("bert"), tiny_model])
def test_a_caption_matches_where_greedy_writing_gives_it_to_the_letter(make: Any) -> None:
    """Of four captions that were written greedily one is changed at its end: three match."""
    objective = caption()
    roles = roles_of(objective, make())
    rows = [row(i, [1]) for i in range(4)]
    with torch.no_grad():
        rows = [row(i, written(objective, roles, one, 3)) for i, one in enumerate(rows)]
    rows[1]["ids"] = [*rows[1]["ids"][:-1], (rows[1]["ids"][-1] + 1) % 64]
    found = objective.evaluate(objective.collate(rows, roles), roles)
    assert (float(found["exact_match"][0]), found["exact_match"][1]) == (3.0, 4.0)
    assert float(found["accuracy"][0]) == 11.0 and found["loss"] == found["nll"]


def test_an_evaluation_reads_each_row_with_its_own_picture_with_none_and_with_anothers() -> None:
    objective = caption()
    roles = roles_of(objective, tiny_masked_model("bert"))
    with torch.no_grad():
        found = objective.evaluate(objective.collate(objective.evaluation_rows(ROWS, [0, 1, 2]), roles), roles)
        by_hand = {
            "": ROWS,
            "/removed": [{k: v for k, v in one.items() if k != "features"} for one in ROWS],
            "/shuffled": [{**one, "features": ROWS[(i + 1) % 3]["features"]} for i, one in enumerate(ROWS)],
        }
        for name, rows in by_hand.items():
            loss = objective.loss(objective.collate(rows, roles), roles)
            assert float(found[f"nll{name}"][0]) == pytest.approx(float(loss.total), abs=1e-9)
            assert found[f"nll{name}"][1] == sum(len(one["ids"]) - 1 for one in ROWS)


def test_an_encoder_decoder_is_refused() -> None:
    model: Any = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(RecipeError, match="'t5' is an encoder-decoder, and objective=caption trains a decoder or an encoder"):
        caption().prepare_model(model, 0)
