"""Pictures and texts in one space: the loss of Transformers' CLIP, rows that are no negatives, chunks, processes, metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.pooling import Pool
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import stored_heads
from llmrecipe.models.heads.projection_head import ProjectionHead
from llmrecipe.objectives.pretraining.clip import HEAD, Clip, same_rows
from llmrecipe.recipe.schema import BatchSection
from tests.objectives.harness import pictured
from tests.objectives.rollouts import Numbers
from tests.tiny import tiny_masked_model, tiny_model
from tests.trainings import events, train_recipe

ROWS = [pictured(row, length) for row, length in enumerate((4, 9, 3, 7, 5))]


def built(objective: Clip, family: str = "bert", packing: bool = False, micro: int | None = None) -> Roles:
    model = tiny_masked_model(family) if family == "bert" else tiny_model()
    objective.prepare_model(model, 3)
    return Roles(Engine(model.double().train()), Stack([]), Numbers(), torch.device("cpu"), packing, micro)  # type: ignore[arg-type]


def clip(**options: Any) -> Clip:
    return Clip(patch=4, feature_width=48, **options)


def gradients(loss: Tensor, roles: Roles) -> dict[str, Tensor]:
    roles.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in roles.model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("family", "pool"), [("bert", "avg"), ("llama", "last")])
@pytest.mark.parity(method="clip", reference="transformers")
def test_the_loss_is_clips(family: str, pool: str) -> None:
    """Transformers' loss of its logits, exp(s) times the cosines of both projections: value and all gradients, also of s."""
    objective = clip(width=7)
    roles = built(objective, family)
    batch = objective.collate(ROWS, roles)
    loss = objective.loss(batch, roles)
    assert objective.weight(batch) == 5.0
    found = gradients(loss.total, roles)
    states = roles.engine(batch, want="pooled", pool=Pool(pool))["pooled"]
    head: Any = roles.engine.head_of(HEAD)
    assert head.projection.shape == (7, 32)
    image, text = (part @ head.projection.T for part in states.split(5))
    image, text = (part / part.norm(dim=-1, keepdim=True) for part in (image, text))
    logits = head.log_scale.exp() * text @ image.T
    wanted = image_text_contrastive_loss(logits)
    assert float(loss.total.detach()) / 5 == pytest.approx(float(wanted.detach()), rel=1e-9)
    same(found, gradients(5 * wanted, roles))
    assert found[f"task_head.{HEAD}.log_scale"].abs() > 1e-3
    assert [float(v) / n for v, n in (loss.metrics["temperature"],)] == pytest.approx([0.07])
    right = [(table.argmax(1) == torch.arange(5)).double().mean() for table in (logits, logits.T)]
    assert float(loss.metrics["accuracy"][0]) / 5 == pytest.approx(float(sum(right)) / 2)


def test_rows_that_share_a_picture_or_a_text_are_no_negatives() -> None:
    """Row 1 has the text of row 0, row 2 its picture: by hand, a softmax over what is left, in both directions."""
    objective = clip()
    roles = built(objective)
    rows = [ROWS[0], {**ROWS[1], "ids": ROWS[0]["ids"]}, {**ROWS[2], "features": ROWS[0]["features"]}, ROWS[3]]
    batch = objective.collate(rows, roles)
    u, v = (z.detach() for z in objective._embed(batch, roles))
    kept = [[0, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]
    wanted = sum(
        float(table[i, columns].logsumexp(0) - table[i, i]) for table in (u @ v.T, v @ u.T) for i, columns in enumerate(kept)
    )
    assert float(objective.loss(batch, roles).total.detach()) == pytest.approx(wanted / 2, rel=1e-9)


@pytest.mark.parametrize("packing", [True, False])
def test_chunks_have_the_gradient_of_one_batch(packing: bool) -> None:
    """Chunks of pictures, of texts and of both, computed again in the backward pass."""
    objective = clip()
    roles = built(objective)
    total = objective.loss(objective.collate(ROWS, roles), roles).total
    wanted = gradients(total, roles)
    for chunk, micro in ((2, None), (3, None), (None, 2)):
        other = replace(objective, chunk=chunk)
        roles = built(other, packing=packing, micro=micro)
        (batch,) = next(other.batches(iter([ROWS]), roles))
        assert len(batch.extra["cuts"]) >= 2
        found = other.loss(batch, roles).total
        assert float(found.detach()) == pytest.approx(float(total.detach()), rel=1e-9)
        same(gradients(found, roles), wanted)


def test_processes_share_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two processes among those of both: the sum of the losses, and its gradients, are those of one process."""
    objective = clip()
    roles = built(objective)
    batch = objective.collate(ROWS, roles)
    total = objective.loss(batch, roles)
    wanted = gradients(total.total, roles)
    whole, keys = objective._embed(batch, roles), batch.extra["keys"]
    parts = []
    for own in (slice(0, 2), slice(2, 5)):
        everything = {id(z := part[own]): (z, part) for part in (*whole, keys)}
        halves = [z for z, _ in everything.values()]
        monkeypatch.setattr(Clip, "_embed", lambda *_, h=halves: (h[0], h[1]))
        monkeypatch.setattr(roles, "gather_rows", lambda z, e=everything, at=own.start: (e[id(z)][1], at))
        parts.append(objective.loss(replace(batch, extra={**batch.extra, "keys": halves[2]}), roles))
    same(gradients(parts[0].total + parts[1].total, roles), wanted)
    assert sum(float(part.total.detach()) for part in parts) == pytest.approx(float(total.total.detach()), rel=1e-9)
    alone = clip(gather=False).loss(replace(batch, extra={**batch.extra, "keys": halves[2]}), roles)
    assert float(alone.total.detach()) < float(parts[1].total.detach()), "fewer candidates"


def test_the_temperature_stays_between_its_bounds() -> None:
    objective = clip(max_scale=50.0)
    roles = built(objective)
    head = roles.engine.head_of(HEAD)
    assert isinstance(head, ProjectionHead)
    for value, kept in ((9.0, math.log(50.0)), (-1.0, 0.0), (2.5, 2.5)):
        torch.nn.init.constant_(head.log_scale, value)
        objective.after_step(1, {}, roles)
        assert float(head.log_scale.detach()) == pytest.approx(kept)


def test_both_directions_are_ranked_by_hand() -> None:
    """Three rows, the last with the text of the first; cosines are the products, the temperature is 1."""
    texts = torch.eye(3, dtype=torch.float64)
    pictures = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.8, 0.6], [0.8, 0.0, 0.6]], dtype=torch.float64)
    keys = torch.tensor([[1, 7], [2, 8], [3, 7]])
    found = clip().finish_evaluation({}, {"pictures": pictures, "texts": texts, "keys": keys})
    # Pictures: 0.8 before 0.6; 0.8 is the own one; 0.6, and 0.8 is the text of the own row. Texts: 0.6 (0.8 is barred); 0.8,
    # but picture 0 is as near; 0.6, but picture 1 is as near.
    assert found["recall@1/text"] == pytest.approx(2 / 3) and found["recall@1/picture"] == pytest.approx(1 / 3)
    assert found["recall@1"] == found["accuracy"] == pytest.approx(0.5) and found["recall@5"] == 1.0
    assert found["mrr/text"] == pytest.approx((0.5 + 1 + 1) / 3) and found["mrr/picture"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    rows = [([0.6, 0.8], 0), ([0.0, 0.8, 0.6], 1), ([0.0, 0.6], 1), ([0.6, 0.0], 0), ([0.8, 0.8, 0.0], 1), ([0.6, 0.6], 1)]
    nats = [math.log(sum(map(math.exp, row))) - row[own] for row, own in rows]
    assert found["loss"] == pytest.approx(sum(nats) / 6) and found["temperature"] == pytest.approx(1.0)


def test_equal_rows_by_hand() -> None:
    keys = torch.tensor([[1, 5], [2, 5], [1, 6], [3, 7]])
    assert same_rows(keys[2:], keys, torch.tensor([2, 3])).long().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


def test_what_cannot_be_compared_is_refused() -> None:
    data: Any = type("Data", (), {"shapes": lambda self: {(3, 8, 8)}})()
    for options, words in (({"temperature": 2.0}, "0.01 to 1"), ({"max_scale": 5.0}, "0.07 is outside of 1/max_scale = 0.2")):
        with pytest.raises(RecipeError, match=words):
            Clip(patch=4, **options).check(None, data)  # type: ignore[arg-type]
    recipe: Any = type("Recipe", (), {"batch": BatchSection(size=1)})()
    with pytest.raises(RecipeError, match=r"batch\.size: 1"):
        Clip(patch=4).check(recipe, data)
    model = tiny_masked_model("bert")
    clip(width=7).prepare_model(model, 0)
    clip().prepare_model(model, 0)
    with pytest.raises(ModelError, match=r"have 7 numbers, and objective\.width is 8"):
        clip(width=8).prepare_model(model, 0)
    other = tiny_masked_model("bert")
    stored_heads.mount_heads(other, {k: v for k, v in model.state_dict().items() if k.startswith("task_head.")})
    assert torch.equal(other.task_head[HEAD].projection, model.task_head[HEAD].projection)  # type: ignore[union-attr, index]


@pytest.mark.slow
def test_pictures_are_found_by_their_texts_after_sixty_steps(tmp_path: Any) -> None:
    """The right one of 120 embedded pictures or texts is among the first ten: 0.08 by chance."""
    train_recipe(tmp_path / "run", "clip", "steps=60", "batch.size=32", "eval.test=false", "objective.temperature=0.2")
    first, last = (e["eval/recall@10"] for e in events(tmp_path / "run", "evaluation"))
    assert first < 0.15 and last > 0.45
