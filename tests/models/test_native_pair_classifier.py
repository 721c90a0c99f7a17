"""The classifier of a native encoder-decoder: what it reads, that padding changes nothing, and that a run learns with it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.models.native import NativeConfig, NativeForSequenceClassification
from llmrecipe.training.dry_run import check
from tests.trainings import QUIET, events, resumes_to_the_bit

START, PAD = 2, 0
SHAPE: dict[str, Any] = {
    "kind": "encoder_decoder", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": PAD, "num_labels": 3, "initializer_range": 0.2,
}  # fmt: skip


def model(**more: Any) -> NativeForSequenceClassification:
    torch.manual_seed(0)
    return NativeForSequenceClassification(NativeConfig(**{**SHAPE, "decoder_start_token_id": START, **more})).double().eval()


def by_hand(made: NativeForSequenceClassification, ids: Tensor) -> Tensor:
    """One text without padding: the decoder reads the start token and all tokens but the last."""
    shifted = torch.cat((torch.tensor([[START]]), ids[:, :-1]), 1)
    states = made.model.encoder(ids).last_hidden_state
    out = made.model.decoder(shifted, encoder_hidden_states=states, use_cache=False).last_hidden_state
    return out[:, -1] @ made.classifier.weight.T


@pytest.mark.parametrize("positions", ["rotary", "relative", "learned"])
def test_logits_are_those_of_the_last_token_and_padding_changes_nothing(positions: str) -> None:
    made = model(positions=positions)
    texts = [torch.tensor([[5, 9, 3, 44, 8]]), torch.tensor([[6, 21, 7]])]
    wanted = torch.cat([by_hand(made, text) for text in texts])
    right = torch.tensor([[5, 9, 3, 44, 8], [6, 21, 7, PAD, PAD]])
    left = torch.tensor([[5, 9, 3, 44, 8], [PAD, PAD, 6, 21, 7]])
    for ids in (right, left):
        mask = (ids != PAD).long()
        torch.testing.assert_close(made(ids, attention_mask=mask).logits, wanted)
        torch.testing.assert_close(made(ids).logits, wanted)
        embedded = made.get_input_embeddings()(ids)
        torch.testing.assert_close(made(inputs_embeds=embedded, attention_mask=mask).logits, wanted)
    labels = torch.tensor([2, 0])
    loss = made(right, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(wanted, labels))


def test_every_token_counts_and_both_sides_learn() -> None:
    made = model()
    ids = torch.tensor([[5, 9, 3, 44, 8]])
    made(ids, labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.parameters())
    for place in range(ids.shape[1]):
        other = ids.clone()
        other[0, place] = 50
        assert not torch.allclose(made(other).logits, made(ids).logits)


def rows(path: Path, count: int, seed: int) -> Path:
    """Texts of letters, labelled by which of a and b is more frequent."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = draw.choice("ab")
        letters = draw.choices("ab", weights=(4, 1) if label == "a" else (1, 4), k=11)
        lines.append(json.dumps({"text": " ".join(letters), "label": "a" if letters.count("a") > 5 else "b"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def words(folder: Path, *more: str) -> list[str]:
    train, valid = rows(folder / "train.jsonl", 192, 0), rows(folder / "valid.jsonl", 64, 1)
    return [
        f"data.path={train}", f"data.validation={valid}", "data.format=auto", "data.columns={}", "model=native",
        "model.config.kind=encoder_decoder", "model.config.hidden_size=32", "model.config.num_hidden_layers=1",
        "model.config.decoder_start_token_id=2", "stack=[]", "optim.lr=5e-3", "batch.size=16", *more,
    ]  # fmt: skip


def test_a_run_learns_resumes_and_is_refused_where_it_cannot(tmp_path: Path) -> None:
    resumes_to_the_bit(tmp_path, "classify", words(tmp_path, "steps=60", "eval.batches=4"), at=30)
    seen = events(tmp_path / "whole", "evaluation")
    assert seen[-1]["eval/accuracy"] > 0.9 > 0.7 > seen[0]["eval/accuracy"]
    with pytest.raises(RecipeError, match="states no token that its decoder starts with"):
        check("classify", [*QUIET, *words(tmp_path), "model.config.decoder_start_token_id=null"])
    with pytest.raises(ModelError, match="needs a sequence classifier, but 'llmrecipe_native' offers: seq2seq"):
        check("classify", [*QUIET, *words(tmp_path), "model.config.num_experts=2"])
