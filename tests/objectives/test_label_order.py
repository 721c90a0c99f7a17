"""A classifier that has the labels of the rows keeps its own numbers for them, whatever their order in the alphabet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.models.tiny import FOLDER
from tests.trainings import events, train_recipe

TEXTS = {"positive": "a good day", "negative": "a bad day"}
WORDS = ["steps=25", "batch.size=8", "optim.lr=3e-2", "schedule.warmup=0", "eval.every=null", "eval.load_best=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with two labels, and a small classifier whose first output is the one that comes later in the alphabet."""
    folder = tmp_path_factory.mktemp("labels")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    names = {0: "positive", 1: "negative"}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), id2label=names, label2id={v: k for k, v in names.items()}, **shape)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [json.dumps({"text": text, "label": label}) + "\n" for label, text in TEXTS.items()] * 8
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("words", [[], ["objective.pooling=mean"], ["objective.pooling=mean", "stack=[lora]"]], ids=str)
def test_a_run_trains_and_is_evaluated_under_the_numbers_of_its_checkpoint(
    words: list[str], place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    made = train_recipe(run, "classify", f"model.path={place / 'base'}", f"data.path={place}", *WORDS, *words)
    assert made.data.labels == ["positive", "negative"] and made.model.config.id2label == {0: "positive", 1: "negative"}
    assert events(run, "evaluation")[-1]["eval/accuracy"] == 1.0
    assert evaluate_path(str(run), ["data.cache=false"])["accuracy"] == 1.0
    if not words:
        tokenizer = AutoTokenizer.from_pretrained(run / "final" / "model")
        plain: Any = BertForSequenceClassification.from_pretrained(run / "final" / "model").eval()
        for label, text in TEXTS.items():
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            assert plain.config.id2label[int(plain(ids, torch.ones_like(ids)).logits.argmax())] == label
