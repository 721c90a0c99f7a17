"""Visual question answering: the formula, views of a row, answers that a finished run knows, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmrecipe.core.errors import ModelError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import task_heads
from llmrecipe.objectives.finetuning.vqa import HEAD, Vqa
from tests.pictures import held_vectors, save_picture, save_rows
from tests.tiny import Tokenizer, tiny_masked_model, tiny_model
from tests.trainings import curve, events, train_recipe

WIDTH = 6
ROWS = [
    {"row": i, "ids": ids, "label": label, "features": held_vectors(i, 2 + i, WIDTH)}
    for i, (ids, label) in enumerate((([1, 9, 4, 2], 2), ([1, 30, 2], 0), ([1, 9, 50, 7, 2], 1)))
]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("make", [lambda: tiny_masked_model("bert"), tiny_model])
def test_the_loss_is_that_of_the_last_state_of_each_question(make: Any, packing: bool) -> None:
    """float64: -log softmax(W tanh(P h))[a], h computed one row at a time; the same over the views of an evaluation."""
    objective = Vqa(features="frame", feature_width=WIDTH)
    objective.answers[:] = ["blue", "red", "two"]
    model = make()
    objective.prepare_model(model, 3)
    roles = Roles(Engine(model.double()).eval(), Stack([]), Tokenizer(), torch.device("cpu"), packing)
    head = roles.engine.head_of(HEAD)

    def by_hand(rows: list[dict[str, Any]]) -> list[float]:
        found = []
        for one in rows:
            batch = objective.collate([one], roles)
            h = roles.policy(batch, want="states")["states"][0, -1]
            scores = head.out.weight @ torch.tanh(head.dense.weight @ h + head.dense.bias) + head.out.bias
            found.append(float(-F.log_softmax(scores, 0)[one["label"]]))
        return found

    with torch.no_grad():
        torch.nn.init.normal_(head.out.weight)
        loss = objective.loss(objective.collate(ROWS, roles), roles)
        assert float(loss.total) == pytest.approx(sum(by_hand(ROWS)), abs=1e-9)
        found = objective.evaluate(objective.collate(objective.evaluation_rows(ROWS, [0, 1, 2]), roles), roles)
        bare = [{k: v for k, v in one.items() if k != "features"} for one in ROWS]
        others = [{**one, "features": ROWS[(i + 1) % 3]["features"]} for i, one in enumerate(ROWS)]
        for name, rows in (("", ROWS), ("/removed", bare), ("/shuffled", others)):
            assert float(found[f"nll{name}"][0]) == pytest.approx(sum(by_hand(rows)), abs=1e-9) and found[f"nll{name}"][1] == 3
    assert model.config.id2label == {0: "blue", 1: "red", 2: "two"}


def questions(folder: Path) -> Path:
    """Six training questions with three answers, and held-out ones that name two of them in another order."""
    answers = {"train": ["red", "blue", "two", "red", "blue", "two"], "valid": ["two", "blue"]}
    for split, own in answers.items():
        rows = []
        for i, answer in enumerate(own):
            save_picture(folder / f"{split}{i}.png", i + 10 * (split == "valid"), side=32)
            rows.append({"image": f"{split}{i}.png", "question": "Which is it?", "answer": answer})
        save_rows(folder, split, rows)
    return folder


SMALL = [
    "steps=2", "batch.size=6", "eval.every=null", "eval.load_best=false",
    "model.config={model_type: llmrecipe_native, kind: encoder, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
]  # fmt: skip


@pytest.mark.parametrize("stack", ["stack=[]", "stack=[lora]"])
def test_a_finished_run_knows_its_answers(tmp_path: Path, stack: str) -> None:
    """A later evaluation numbers answers as the run did, though its rows have fewer of them."""
    run = train_recipe(tmp_path / "run", "vqa", *SMALL, f"data.path={questions(tmp_path / 'rows')}", stack)
    assert run.data.labels == ["blue", "red", "two"] and len(curve(tmp_path / "run")) == 2
    kept = events(tmp_path / "run", "evaluation")[-1]
    again = evaluate_path(str(tmp_path / "run"), ["data.cache=false"])
    names = ("loss", "nll/removed", "accuracy", "gain/shuffled")
    assert [again[name] for name in names] == pytest.approx([kept[f"eval/{name}"] for name in names], abs=1e-6)


def test_a_run_with_other_answers_is_refused() -> None:
    model = tiny_model()
    task_heads.add_pooled_head(model, HEAD, 3)
    objective = Vqa(features="frame", feature_width=WIDTH)
    objective.answers[:] = ["yes", "no"]
    with pytest.raises(ModelError, match="the head 'answer' of the run has 3 outputs, and 2 are needed"):
        objective.prepare_model(model, 0)
