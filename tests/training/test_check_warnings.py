"""What `check` warns of, and what it calls unknown: each from a case made for it, and silence where all is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrecipe.cli.findings import show_findings
from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack, base_parameters
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.training import check_warnings
from llmrecipe.training.check_warnings import device_memory, memory_warnings, rank_warnings, weight_warnings
from llmrecipe.training.dry_run import check
from tests.interop.saved_runs import base_folder
from tests.tiny import tiny_model


def with_lora(target: str, r: int) -> torch.nn.Module:
    model = tiny_model()
    Stack([Lora(name="lora", target=target, r=r)]).attach(model)
    return model


def test_a_rank_above_the_smaller_side_of_its_matrix() -> None:
    """Keys of this model are (16, 32): rank 17 is one too many there, and none at the queries (32, 32)."""
    assert list(rank_warnings(with_lora("attn.q|k", 16))) == []
    found = list(rank_warnings(with_lora("attn.q|k", 17)))
    assert len(found) == 1 and found[0].startswith("stack.lora: rank 17 at 2 sites is more than the smaller side")
    assert "16 at model.layers.0.self_attn.k_proj" in found[0]


def test_an_estimate_above_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    there = device_memory("cpu")
    assert there is not None and 2**28 < there < 2**50
    monkeypatch.setattr(check_warnings, "device_memory", lambda device: 8 * 2**30)
    assert list(memory_warnings(8 * 2**30, "cpu")) == []
    assert "12.0 GB is more than the 8.0 GB of this machine" in next(memory_warnings(12 * 2**30, "cpu"))
    monkeypatch.setattr(check_warnings, "device_memory", lambda device: None)
    assert list(memory_warnings(2**60, "mps")) == []


def changed(folder: Path, change: Any) -> ModelSection:
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path), {"format": "pt"})
    return ModelSection(path=str(folder))


def meta(section: ModelSection) -> Any:
    from llmrecipe.models.load import skeleton

    return skeleton(section)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_headers_of_a_checkpoint_that_fits_say_nothing(tmp_path: Path, family: str) -> None:
    section = ModelSection(path=str(base_folder(tmp_path, family)))
    model = meta(section)
    Stack([Lora(name="lora", target="attn.q")]).attach(model)
    assert list(weight_warnings(section, model, "causal")) == []


def test_missing_tensors_and_other_shapes_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:7].clone()
        del tensors["model.norm.weight"]

    section = changed(base_folder(tmp_path), cut)
    shape, missing = weight_warnings(section, meta(section), "causal")
    assert f"1 tensors of {section.path} have another shape than this model: {name}" in shape and "is (7, 32)" in shape
    assert "lacks 1 tensors of this model: model.norm.weight" in missing
    allowed = section.model_copy(update={"allow_mismatch": ["model.norm.*", "*.up_proj.*"]})
    assert list(weight_warnings(allowed, meta(section), "causal")) == []
    assert list(weight_warnings(section.model_copy(update={"init": "random"}), meta(section), "causal")) == []


@pytest.mark.parametrize("stack", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_that_is_packed_is_compared_by_the_shapes_it_is_read_with(tmp_path: Path, family: str, stack: str) -> None:
    """GPT-2 keeps its matrices transposed, and packing turns them."""
    pytest.importorskip("bitsandbytes")
    folder = base_folder(tmp_path, family)
    words = [f"model.path={folder}", f"stack=[{stack},lora]", "stack.lora.target=attn.q", "data.limit=4", "objective.mask=all"]
    assert not [w for w in check("sft_lora", words).warnings if "loading will stop" in w]
    name = next(n for n, t in load_file(str(folder / "model.safetensors")).items() if t.dim() == 2 and ".mlp." in n)
    changed(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    (told,) = [w for w in check("sft_lora", words).warnings if "loading will stop" in w]
    assert f"1 tensors of {folder} have another shape than this model: {name}" in told


def test_a_checkpoint_under_other_names_is_not_accused(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["experts.0.w1"] = tensors.pop("model.norm.weight")

    section = changed(base_folder(tmp_path), rename)
    assert list(weight_warnings(section, meta(section), "causal")) == []


def test_base_and_added_parameters_are_counted_apart() -> None:
    model = with_lora("attn.q", 3)
    assert base_parameters(model) == base_parameters(tiny_model()) == sum(p.numel() for p in tiny_model().parameters())
    assert sum(p.numel() for p in model.parameters()) - base_parameters(model) == 2 * 3 * (32 + 32)


@pytest.mark.parametrize(
    ("recipe", "words"), [("grpo", []), ("sft_lora", ["data.streaming=true", "steps=4"])], ids=["answers", "stream"]
)
def test_what_cannot_be_known_is_unknown(recipe: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = check(recipe, words)
    assert found.tokens_per_step is None and found.seconds is None and found.memory_mb["total"] > 0
    show_findings(found)
    text = capsys.readouterr().out
    assert "unknown tokens a step" in text and "time: unknown" in text
    assert "activations unknown, logits unknown, total at least" in text and "memory of the pass is unknown, " in text


def test_eight_rows_are_not_sixteen(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = check("sft_lora", ["data.limit=8", "batch.size=16"]), check("sft_lora", ["data.limit=8", "batch.size=8"])
    assert few.tokens_per_step == many.tokens_per_step == few.data["tokens"]
    assert few.warnings == []
    show_findings(check("sft_lora", ["data.limit=8", "stack.lora.r=4000"]))
    text = capsys.readouterr().out
    assert "warning: stack.lora: rank 4000" in text and f"parameters: {few.parameters:,}, added: " in text


def rows_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_the_run_says_of_its_rows_is_said_before(tmp_path: Path) -> None:
    """One class, rows of the validation file among the training rows, and columns that nothing reads."""
    liked = [{"prompt": f"Say {i}.", "completion": "Yes.", "label": True} for i in range(4)]
    found = check("kto", [f"data.path={rows_of(tmp_path / 'liked.jsonl', liked)}"])
    assert found.warnings == ["all rows have the label 'true': there is nothing to tell apart"]
    rows = [{"prompt": f"Say {i}.", "completion": "Yes.", "page": i} for i in range(6)]
    words = [f"data.path={rows_of(tmp_path / 'rows.jsonl', rows)}"]
    seen = rows_of(tmp_path / "seen.jsonl", [*rows[:2], {**rows[0], "prompt": "New."}])
    found = check("sft", [*words, f"data.validation={seen}"])
    assert found.warnings == ["2 of 3 validation rows are also training rows, so they measure what was memorised"]
    assert found.notes == ["columns not used: page"]


def test_sizes_that_do_not_fit_together_are_said_with_their_numbers() -> None:
    with pytest.raises(ModelError, match=r"model\.config: .*hidden size \(100\) is not a multiple of .*heads \(3\)"):
        check("sft", ["data.limit=4", "model.config.hidden_size=100", "model.config.num_attention_heads=3"])
