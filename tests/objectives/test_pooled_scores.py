"""Scores of pooled states: by hand in float64, the pooling a folder names, what a finished run keeps, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmrecipe.cli.app import run_command as command
from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import task_heads
from llmrecipe.models.folder_pooling import folder_pooling
from llmrecipe.objectives.finetuning._engines.pooled_scores import HEAD
from llmrecipe.objectives.finetuning.classification import Classification
from llmrecipe.objectives.finetuning.regression import Regression
from llmrecipe.recipe.schema import ModelSection
from tests.tiny import Tokenizer, tiny_masked_model, tiny_model
from tests.trainings import events, train_recipe

ROWS: list[dict[str, Any]] = [
    {"row": i, "ids": ids, "label": label, "score": float(label)}
    for i, (ids, label) in enumerate((([1, 9, 4, 2, 8, 8], 2), ([1, 30, 2], 0), ([1, 9, 50, 7, 2], 1)))
]


def by_hand(h: torch.Tensor, pooling: str) -> torch.Tensor:
    """The library's formula: the states of real tokens, summed and divided by their number; the first; the last."""
    mask = torch.ones(len(h), 1, dtype=h.dtype)
    mean = (h * mask).sum(0) / mask.sum().clamp(min=1e-9)
    return {"mean": mean, "cls": h[0], "last": h[-1]}[pooling]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("make", "pooling"),
    [(lambda: tiny_masked_model("bert"), p) for p in ("mean", "cls", "last")] + [(tiny_model, "mean"), (tiny_model, "last")],
)
def test_scores_are_a_linear_layer_of_the_pooled_states(make: Any, pooling: Any, packing: bool) -> None:
    """float64: each text alone through the model, without padding; with others it has the same scores."""
    objective, numbers = Classification(pooling=pooling), Regression(pooling=pooling)
    objective.classes[:] = ["a", "b", "c"]
    model = make()
    objective.prepare_model(model, 3)
    roles = Roles(Engine(model.double()).eval(), Stack([]), Tokenizer(), torch.device("cpu"), packing)
    head = roles.engine.head_of(HEAD)
    with torch.no_grad():
        torch.nn.init.normal_(head.out.bias)
        wanted = []
        for row in ROWS:
            alone = objective.collate([row], roles)
            h = roles.policy(alone, want="states")["states"][0, : len(row["ids"])]
            wanted.append(head.out.weight @ by_hand(h, pooling) + head.out.bias)
        batch = objective.collate(ROWS, roles)
        torch.testing.assert_close(objective.scores(batch, roles), torch.stack(wanted), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            numbers.scores(numbers.collate(ROWS, roles), roles), torch.stack(wanted), rtol=1e-9, atol=1e-9
        )
        loss = objective.loss(batch, roles)
        nll = sum(float(-F.log_softmax(z, 0)[row["label"]]) for z, row in zip(wanted, ROWS, strict=True))
        assert float(loss.total) == pytest.approx(nll, abs=1e-9)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_texts_of_two_parts_keep_their_kinds() -> None:
    """A pair is padded, whatever the layout of the run: the kinds of its tokens reach the model."""
    objective = Classification(pooling="mean")
    objective.classes[:] = ["a", "b", "c"]
    model = tiny_masked_model("bert")
    objective.prepare_model(model, 3)
    roles = Roles(Engine(model).eval(), Stack([]), Tokenizer(), torch.device("cpu"), True)
    rows = [{**row, "type_ids": [0, 0, *[1] * (len(row["ids"]) - 2)]} for row in ROWS]
    batch = objective.collate(rows, roles)
    assert batch.extra["token_type_ids"].sum() == sum(len(row["ids"]) - 2 for row in ROWS)


# --- the folder's own pooling ------------------------------------------------------------------------------------------


def pooling_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A sentence-transformers folder, as far as its pooling goes."""
    (folder / "1_Pooling").mkdir(parents=True)
    kinds = ("Transformer", "Pooling", "Normalize")
    steps = [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
             for i, kind in enumerate(kinds)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, **config}))
    return folder


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (MEAN, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({**MEAN, "pooling_mode_max_tokens": True}, "mean+max"),
    ],
)
def test_the_pooling_of_a_folder(config: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder = pooling_folder(tmp_path, config)
    assert folder_pooling(folder) == found
    section = ModelSection(path=str(folder))
    objective, chosen = Classification(), Classification(pooling="last")
    chosen.read_folder(section)
    assert chosen.pooled == "last"
    if "+" in found:
        with pytest.raises(RecipeError, match=r"objective\.pooling: .* pools by 'mean\+max', .* by mean, cls, last"):
            objective.read_folder(section)
    else:
        objective.read_folder(section)
        assert objective.pooled == found and objective.model_head() == "states"


def test_a_plain_folder_keeps_the_head_of_its_family(tmp_path: Path) -> None:
    objective = Classification()
    objective.read_folder(ModelSection(path=str(tmp_path)))
    assert objective.pooled is None and objective.model_head() == "classification"


def test_the_first_state_of_a_decoder_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"objective\.pooling: cls: the first token of a decoder has seen no other"):
        Classification(pooling="cls").prepare_model(tiny_model(), 0)


def test_an_unknown_pooling_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["check", "recipe=classify", "objective.pooling=men"]) == 2
    error = capsys.readouterr().err
    assert "objective.pooling" in error and "mean" in error and "Traceback" not in error


# --- whole runs -------------------------------------------------------------------------------------------------------

SMALL = [
    "steps=2", "batch.size=4", "data.limit=32", "data.max_length=32", "eval.every=null", "eval.load_best=false",
    "schedule.warmup=0", "optim.lr=1e-2", "objective.pooling=mean",
    "model.config={model_type: llmrecipe_native, kind: encoder, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "model.init=random",
]  # fmt: skip


@pytest.mark.parametrize("stack", ["stack=[]", "stack=[lora]", "objective.head_only=true"])
def test_a_finished_run_pools_as_it_was_trained(tmp_path: Path, stack: str) -> None:
    run = train_recipe(tmp_path / "run", "classify", *SMALL, stack)
    kept = events(tmp_path / "run", "evaluation")[-1]
    again = evaluate_path(str(tmp_path / "run"), ["data.cache=false", "objective.pooling=null"])
    assert again["loss"] == pytest.approx(kept["eval/loss"], abs=1e-6)
    assert again["accuracy"] == kept["eval/accuracy"]
    trained = {name.split(".")[0] for name, p in run.model.named_parameters() if p.requires_grad}
    assert "task_head" in trained and (stack != "objective.head_only=true" or trained == {"task_head"})
    for export in (export_merged, export_peft) if "lora" in stack else (export_merged,):
        with pytest.raises(ModelError, match=r"pooled states .* --to sentence_transformers writes pooling and scores"):
            export(tmp_path / "run")


def test_a_run_with_other_labels_is_refused() -> None:
    model = tiny_model()
    task_heads.add_label_head(model, HEAD, 3)
    objective = Classification(pooling="mean")
    objective.classes[:] = ["yes", "no"]
    with pytest.raises(ModelError, match="the head 'label' of the run has 3 outputs, and 2 are needed"):
        objective.prepare_model(model, 0)
