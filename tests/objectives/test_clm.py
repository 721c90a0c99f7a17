"""Causal language modelling: the loss of Transformers, a batch learned by heart, held-out bits per byte however rows lie."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.models.attention import install_attention
from llmrecipe.models.native import NativeConfig, NativeForCausalLM
from llmrecipe.objectives.pretraining.clm import Clm
from tests.data.toys import byte_tokenizer
from tests.models.test_native import SHAPE
from tests.objectives.parity import mean_loss
from tests.tiny import roles_for, tiny_model

TEXTS = ["the cat sat on the mat and saw the other cat sit", "a b", "é was here"]
BYTES, WORDS = 48 + 3 + 11, 12 + 2 + 3


def saved(folder: Path, uniform: bool = False) -> Path:
    """A Llama of one layer over bytes, with a text set next to it."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(adds_bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if uniform:
        torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def measured(folder: Path, *words: str) -> dict[str, float]:
    return evaluate_path(str(folder / "model"), ["objective=clm", f"data.path={folder}", *words])


@pytest.mark.parametrize("words", [["data.max_length=100"], ["data.max_length=8", "data.stride=3"], ["data.packing=off"]])
def test_a_uniform_model_by_hand(words: list[str], tmp_path: Path) -> None:
    folder = saved(tmp_path, uniform=True)
    found = measured(folder, *words)
    tokens, vocabulary = BYTES + len(TEXTS), 3 + 256 + 2  # every byte and the end of each document
    assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(vocabulary) / BYTES, rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(vocabulary ** (tokens / BYTES), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(vocabulary ** (tokens / WORDS), rel=1e-4)
    assert found["perplexity"] == pytest.approx(vocabulary, rel=1e-5)
    assert "nll_per_word" not in found


@pytest.mark.parametrize(("length", "stride"), [(100, None), (10, None), (10, 4), (10, 1)])
def test_windows_equal_a_plain_loop_packed_and_padded(length: int, stride: int | None, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), byte_tokenizer(adds_bos=True)
    nll = 0.0
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        step, known = stride or length - 1, 1
        while known < len(ids):
            end = min(length if known == 1 else known + step, len(ids))
            start = max(end - length, 0)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids[start:end]])).logits[0].double().log_softmax(-1)
            nll -= sum(float(logprobs[place - start - 1, ids[place]]) for place in range(known, end))
            known = end
    wanted = nll / math.log(2) / BYTES
    for layout in (["batch.size=1"], ["batch.size=3", "data.packing=on"], ["batch.size=2", "data.packing=off"]):
        words = [f"data.max_length={length}", *([f"data.stride={stride}"] if stride else []), *layout]
        assert measured(folder, *words)["bits_per_byte"] == pytest.approx(wanted, rel=1e-5), layout


def test_rows_of_token_ids_stand_for_no_known_text(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "valid.jsonl").write_text(json.dumps({"input_ids": [5, 6, 7]}) + "\n", encoding="utf-8")
    found = measured(folder)
    assert "bits_per_byte" not in found and found["perplexity"] > 1


DOCUMENTS = ((7, 6), (3, 5), (12, 9), (5, 4))
"""(length, first token) of documents, each with a first token of its own."""


def documents() -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(0)
    rest = [torch.randint(3, 64, (length - 1,), generator=draws).tolist() for length, _ in DOCUMENTS]
    lines = [[first, *ids] for (_, first), ids in zip(DOCUMENTS, rest, strict=True)]
    return [{"row": i, "ids": ids, "trained": [0, *[1] * (len(ids) - 1)]} for i, ids in enumerate(lines)]


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_are_those_of_labels_in_transformers(packing: bool) -> None:
    """Documents of unequal lengths, packed or padded = the model's own loss over all their tokens but the first of each."""
    model, rows = tiny_model().double(), documents()
    width = max(len(row["ids"]) for row in rows)
    rest = [width - len(row["ids"]) for row in rows]
    ids = torch.tensor([row["ids"] + [0] * n for row, n in zip(rows, rest, strict=True)])
    labels = torch.tensor([row["ids"] + [-100] * n for row, n in zip(rows, rest, strict=True)])
    wanted = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
    loss = mean_loss(Clm(), roles_for(model, packing=packing), rows)
    # Transformers computes its loss in float32 whatever the model is in.
    torch.testing.assert_close(loss, wanted.double(), rtol=1e-6, atol=1e-6)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss, wanted))
    for name, own, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_one_batch_is_learned_by_heart() -> None:
    """From ln V to below 0.01 nats a token: documents that differ in their first token leave nothing to chance."""
    torch.manual_seed(0)
    model = NativeForCausalLM(NativeConfig(**SHAPE))
    install_attention(model, "sdpa")
    roles, rows = roles_for(model), documents()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = mean_loss(Clm(), roles, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(64), rel=0.05) and losses[-1] < 0.01
