"""Loading with quantized base weights: at no time does more than one matrix live in full precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmrecipe.core import registry
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.load import load_model
from llmrecipe.recipe.schema import ModelSection
from tests.support import PeakBytes

pytest.importorskip("bitsandbytes")

WIDTH, LAYERS, VOCABULARY = 128, 6, 32


def model_of(family: str) -> PreTrainedModel:
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=16))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_at_most_one_matrix_lives_in_full_precision(kind: str, family: str, dtype: str, tmp_path: Path) -> None:
    """Above what stays, the peak is one float32 matrix as it was read and its conversions: a copy in 16 bits and its codes.

    The model holds six layers of such matrices: a full copy would be 20 times as much.
    """
    model_of(family).save_pretrained(tmp_path)
    method = registry.load_class("stack", kind)(name=kind)
    with PeakBytes() as bytes_of:
        model = load_model(ModelSection(path=str(tmp_path), dtype=dtype), load_kwargs=method.load_kwargs())
        Stack([method]).attach(model)
    largest = 4 * WIDTH * 4 * WIDTH
    dense = 12 * WIDTH * WIDTH * LAYERS * 4
    assert dense >= 18 * largest
    # Read in four bytes; transposed or in two bytes; codes of one byte, and the absolute values a block is scaled by.
    assert bytes_of.peak - bytes_of.now <= 2.5 * largest
    stays = sum(p.numel() * p.element_size() for p in model.parameters())
    assert stays < dense / 2 and bytes_of.now >= stays
    blocks = {p.dtype for n, p in model.named_parameters() if (".layers." in n or ".h." in n) and "proj" in n and p.dim() == 2}
    assert blocks == {torch.int8 if kind == "int8" else torch.uint8}
