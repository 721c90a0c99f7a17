"""A text encoder as a sentence-transformers folder: the documented layout, and the vectors of the run from it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from llmrecipe.cli.app import run_command as command
from llmrecipe.core.errors import ModelError, RunError
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.sentence_transformers_folder import export_sentence_transformers, pooling_of
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import tokenizer_of
from tests.tiny import tiny_masked_model
from tests.trainings import train_recipe

SMALL = ["steps=2", "schedule.warmup=0", "optim.lr=1e-2", "batch.size=4", "data.limit=8", "data.max_length=48"]
SMALL += ["eval.batches=1", "eval.load_best=false"]


def base(folder: Path) -> Path:
    """A small BERT, with a tokenizer of its size."""
    tokenizer = tokenizer_of(ModelSection(path="tiny"), TokenizerSection())
    tiny_masked_model("bert", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pipeline(folder: Path, text: str) -> torch.Tensor:
    """What the files of a folder say, step by step, with Transformers alone."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    z = torch.zeros(0)
    for step in json.loads((folder / "modules.json").read_text()):
        place, name = folder / step["path"], step["type"].rpartition(".")[2]
        config = json.loads((place / "config.json").read_text()) if name in ("Pooling", "Dense") else {}
        if name == "Transformer":
            z = AutoModel.from_pretrained(place).eval()(ids, torch.ones_like(ids)).last_hidden_state[0]
        elif name == "Pooling":
            (mode,) = [k for k, v in config.items() if k.startswith("pooling_mode") and v]
            z = {"pooling_mode_cls_token": z[0], "pooling_mode_lasttoken": z[-1], "pooling_mode_mean_tokens": z.mean(0)}[mode]
        elif name == "Dense":
            linear = load_file(place / "model.safetensors")
            z = linear["linear.weight"] @ z + linear["linear.bias"]
            assert config["out_features"] == len(z)
            kind = config["activation_function"].rpartition(".")[2]
            z = {"Tanh": torch.tanh, "Identity": torch.nn.Identity()}[kind](z)
        else:
            z = z / z.norm()
    return z


@pytest.mark.parametrize(
    ("options", "stack", "steps"),
    [
        ({"loss_type": "infonce", "pool": "avg"}, "[lora]", ["Transformer", "Pooling", "Normalize"]),
        ({"loss_type": "triplet", "pool": "cls", "mlp_only_train": "false"}, "[]", ["Transformer", "Pooling", "Dense"]),
    ],
)
def test_the_folder_alone_gives_the_vectors_of_the_run(
    options: dict[str, str], stack: str, steps: list[str], tmp_path: Path
) -> None:
    folder, run = base(tmp_path / "base"), tmp_path / "run"
    words = [f"objective.{k}={v}" for k, v in options.items()]
    model_words = ["model.config={}", "model.init=pretrained", f"model.path={folder}", "tokenizer.path=null"]
    train_recipe(run, "contrastive", *model_words, f"stack={stack}", *SMALL, *words)
    done = export_sentence_transformers(run)
    assert [s["type"].rpartition(".")[2] for s in json.loads((done.path / "modules.json").read_text())] == steps
    assert json.loads((done.path / "sentence_bert_config.json").read_text())["max_seq_length"] == 48
    text = "The blue spoon was put in the shop by Ida."
    loaded = open_run(str(run))
    model: Any = loaded.model.eval()
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    h = model.base_model(ids, torch.ones_like(ids)).last_hidden_state[0]
    z = h.mean(0) if options["pool"] == "avg" else h[0]
    if "Dense" in steps:
        z = model.task_head["pool"](z)
    z = z / z.norm() if "Normalize" in steps else z
    torch.testing.assert_close(pipeline(done.path, text), z, rtol=1e-4, atol=1e-5)
    plain = AutoModel.from_pretrained(folder).eval()(ids, torch.ones_like(ids)).last_hidden_state[0]
    assert (plain - h).abs().max().item() > 1e-3, "the run has learned something"


def test_the_folder_of_a_classifier_gives_its_scores(tmp_path: Path) -> None:
    """The dense step has one output a label and no activation."""
    folder, run = base(tmp_path / "base"), tmp_path / "run"
    words = ["model.config={}", "model.init=pretrained", f"model.path={folder}", "tokenizer.path=null", "stack=[lora]"]
    train_recipe(run, "classify", *words, *SMALL, "data.limit=32", "objective.pooling=mean")
    done = export_sentence_transformers(run)
    text = "The blue spoon was put in the shop by Ida."
    loaded = open_run(str(run))
    model: Any = loaded.model.eval()
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    h = model.base_model(ids, torch.ones_like(ids)).last_hidden_state[0]
    scores = model.task_head["label"](h.mean(0, keepdim=True))[0]
    assert len(scores) == 4
    torch.testing.assert_close(pipeline(done.path, text), scores, rtol=1e-4, atol=1e-5)


def test_what_has_no_pooling_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = tmp_path / "run" / "final"
    (final / "model").mkdir(parents=True)
    (final / "model" / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"does not pool its states; runs of objective=contrastive, and of .*, do"):
        pooling_of(tmp_path / "run")
    (final / "pooling.json").write_text(json.dumps({"pool": "avg_top2", "mlp": False, "normalize": True, "max_length": 8}))
    with pytest.raises(ModelError, match=r"objective\.pool=avg_top2 has no counterpart"):
        pooling_of(tmp_path / "run")
    assert command(["export", str(tmp_path / "run"), "--to", "sentence_transformer"]) == 2
    assert "sentence_transformers" in capsys.readouterr().err
