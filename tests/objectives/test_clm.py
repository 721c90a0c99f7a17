"""Held-out bits per byte: counted by hand, and equal to a plain loop over windows, however rows are laid out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmrecipe.evaluation.evaluate_model import evaluate_path
from tests.data.toys import byte_tokenizer

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
