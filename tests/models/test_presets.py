"""Every preset in recipes/model is a valid model section, and those that need no network load."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmrecipe.models.checkpoint_path import HUB_NAME
from llmrecipe.models.family import part_names_of
from llmrecipe.models.load import load_model, load_tokenizer
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from tests.support import ROOT

PRESETS = sorted((ROOT / "recipes" / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_are_valid_and_safe(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "a preset opens with what it is"
    section = ModelSection(**yaml.safe_load(text))
    assert not section.trust_remote_code and not section.allow_pickle
    assert section.path == "tiny" or section.path.startswith("./") or HUB_NAME.fullmatch(section.path)


@pytest.mark.parametrize("name", ["native", "native_moe"])
def test_native_presets_load_with_the_embedded_tokenizer(name: str) -> None:
    section = ModelSection(**yaml.safe_load((ROOT / "recipes" / "model" / f"{name}.yaml").read_text(encoding="utf-8")))
    tokenizer = load_tokenizer(section, TokenizerSection())
    model = load_model(section, tokenizer=tokenizer)
    assert part_names_of(model.config.model_type) is not None
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count()
    assert model(**tokenizer("hello", return_tensors="pt")).logits.shape[-1] == model.config.vocab_size >= len(tokenizer)


def test_tiny_loads() -> None:
    section = ModelSection()
    tokenizer = load_tokenizer(section, TokenizerSection())
    model = load_model(section, tokenizer=tokenizer)
    assert model.new_heads == () and model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
