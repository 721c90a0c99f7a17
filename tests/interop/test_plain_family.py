"""Native decoders with the parts of a family of Transformers: exported under its names, they load without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, MixtralForCausalLM, Qwen3ForCausalLM

from llmrecipe import load
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.plain_family import as_plain_family, plain_family
from llmrecipe.models.native import NativeConfig, NativeForSequenceClassification
from tests.models.test_native import SHAPE, VARIANTS, ids, native
from tests.trainings import train_recipe

SMALL = ["model.config.num_hidden_layers=2", "model.config.hidden_size=32", "data.limit=16", "data.max_length=32"]
SMALL += ["eval.at_start=false"]
ALONE = """import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(type(model).__name__, *model(torch.tensor([[5, 9, 3, 60, 7, 700, 2]])).logits[0, -1, :4].tolist())
assert "llmrecipe" not in sys.modules
"""
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
CASES: list[tuple[Any, dict[str, Any]]] = [
    (LlamaForCausalLM, {"num_key_value_heads": 2, "rope_theta": 5000.0, "norm_eps": 1e-4, "hidden_act": "gelu"}),
    (LlamaForCausalLM, {"bias": True, "head_dim": 6, "tie_word_embeddings": False}),
    (Qwen3ForCausalLM, {"qk_norm": True, "head_dim": 16, "rope_theta": 5000.0}),
    (MixtralForCausalLM, {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 16}),
]


@pytest.mark.parametrize(("cls", "parts"), CASES)
def test_the_same_logits_before_and_after_saving(cls: Any, parts: dict[str, Any], tmp_path: Path) -> None:
    model = native("llama", **{"num_key_value_heads": None, **parts})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.2)
    plain = as_plain_family(model)
    assert type(plain) is cls
    plain.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path).eval()
    wanted = model(ids(), attention_mask=MASK).logits[MASK.bool()]
    for other in (plain, again):
        assert torch.allclose(other(ids(), attention_mask=MASK).logits[MASK.bool()], wanted, atol=1e-5)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_a_classifier_keeps_its_labels() -> None:
    config = NativeConfig(**SHAPE, id2label={0: "no", 1: "yes", 2: "perhaps"})
    model = NativeForSequenceClassification(config).eval()
    plain = as_plain_family(model)
    assert type(plain) is LlamaForSequenceClassification and plain.config.id2label[2] == "perhaps"
    assert torch.allclose(plain(ids()).logits, model(ids()).logits, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [VARIANTS[name] for name in ("gpt2", "original", "relative", "none", "mixture", "switch")]
    + [{"kind": "encoder"}, {"scale_embedding": True}, {"qk_norm": True, "bias": True}, {"qk_norm": True, "num_experts": 2}],
)
def test_other_parts_have_no_plain_family(parts: dict[str, Any]) -> None:
    assert plain_family(NativeConfig(**{**SHAPE, **parts})) is None


def test_a_run_exports_as_a_llama_folder_that_needs_nothing_of_ours(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "clm", "model=native", *SMALL, "steps=2", "optim.lr=1e-2")
    done = export_merged(tmp_path / "run")
    assert any("written as LlamaForCausalLM" in note for note in done.notes)
    assert json.loads((done.path / "config.json").read_text())["model_type"] == "llama"
    model, _ = load(tmp_path / "run")
    wanted = model(input_ids=torch.tensor([[5, 9, 3, 60, 7, 700, 2]])).logits[0, -1, :4].tolist()
    command = [sys.executable, "-c", ALONE, str(done.path)]
    name, *found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert name == "LlamaForCausalLM" and [float(v) for v in found] == pytest.approx(wanted, abs=1e-5)


def test_a_run_of_other_parts_says_what_its_folder_needs(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "clm", "model=native", "model.config.positions=learned", *SMALL, "steps=1")
    done = export_merged(tmp_path / "run")
    assert any("import llmrecipe.models.native" in note for note in done.notes)
