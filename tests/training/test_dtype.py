"""What `model.dtype` means: float32 on a CPU and the checkpoint's own elsewhere, for frozen weights and for the computation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.checkpoint_path import TINY
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.validate import instantiate
from llmrecipe.training.build_model import open_for
from llmrecipe.training.build_run import autocast_of, compute_dtype

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, stored in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    return folder


@pytest.mark.parametrize(
    ("recipe", "named", "device", "weights", "computes"),
    [
        ("sft_lora", "auto", "cpu", "float32", None),
        ("sft_lora", "auto", "cuda", "bfloat16", None),
        ("sft_lora", "float16", "cuda", "float16", None),
        ("sft_lora", "float32", "cuda", "float32", None),
        ("sft", "auto", "cpu", "float32", None),
        ("sft", "auto", "cuda", "float32", "bfloat16"),
        ("sft", "float16", "cuda", "float32", "float16"),
        ("mezo", "auto", "cuda", "bfloat16", None),
    ],
)
def test_weights_and_computation(recipe: str, named: str, device: str, weights: str, computes: str | None, half: Path) -> None:
    """Frozen weights have the dtype; weights that all train are float32 masters under autocast; MeZO needs no masters."""
    composed = compose(recipe, [f"model.path={half}", f"model.dtype={named}"]).recipe
    parts = instantiate(composed)
    stack = Stack(parts.wrappers)
    loaded = open_for(composed, parts.objective, stack, None, device)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, weights)}
    found = autocast_of(compute_dtype(named, loaded.model.stored_dtype, device), stack)
    assert found == (None if computes is None else LOW[computes])
    assert loaded.section.dtype == (named if recipe != "sft" or named == "auto" else "float32")
