"""Folders of adapter-hub's library: what is written has its names, values and configuration, and is read with equal logits.

The values of `BnConfig` below are those the library itself saves (release 1.3.0); that the names of an export are its own, and
that equal weights give equal logits there, is shown in tests/methods/additive/test_adapter_hub.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrecipe import load
from llmrecipe.cli.app import run_command as command
from llmrecipe.core.errors import ModelError
from llmrecipe.interop.peft.exporter import export_adapter_hub
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.parallel_adapter import ParallelAdapter
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from tests.interop.saved_runs import base_folder, saved_run

IDS = torch.tensor([[5, 9, 3, 60, 7, 700, 2]])
DOWN, UP = "adapter_down.0.weight", "adapter_up.weight"
PARTS = (DOWN, "adapter_down.0.bias", UP, "adapter_up.bias")
BERT = ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output")
LLAMA = ("model.layers.{}.attention_adapters", "model.layers.{}.output_adapters")
GPT2 = ("transformer.h.{}.attention_adapters", "transformer.h.{}.output_adapters")
CASES: dict[str, tuple[str, Any, tuple[str, ...], dict[str, Any]]] = {
    "double_seq_bn": (
        "llama",
        Adapter(name="own", r=8, activation="silu"),
        LLAMA,
        {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "reduction_factor": 4.0, "scaling": 1.0},
    ),
    "seq_bn": (
        "llama",
        Adapter(name="own", r=8, placement="pfeiffer"),
        LLAMA[1:],
        {"mh_adapter": False, "original_ln_before": True, "is_parallel": False, "non_linearity": "relu"},
    ),
    "par_bn": (
        "gpt2",
        ParallelAdapter(name="own", r=16, input="residual"),
        GPT2[1:],
        {"is_parallel": True, "original_ln_before": False, "scaling": 4.0, "reduction_factor": 2.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_names_configuration_and_values_are_the_librarys(tmp_path: Path, case: str) -> None:
    family, wrapper, stems, wanted = CASES[case]
    model = saved_run(tmp_path / "run", base_folder(tmp_path, family), wrapper)
    folder = export_adapter_hub(tmp_path / "run").path
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {k: config["config"][k] for k in wanted} == wanted
    assert config["config"]["leave_out"] == []
    assert (config["name"], config["model_type"], config["hidden_size"]) == ("own", family, 32)
    tensors = load_file(folder / "adapter.safetensors")
    assert set(tensors) == {f"{s.format(i)}.adapters.own.{part}" for s in stems for i in (0, 1) for part in PARTS}
    hooks = [hook for _, _, _, hook in all_hooks(model, "own") if hasattr(hook, "down")]
    saved = {key: value for key, value in tensors.items() if key.endswith(DOWN)}
    assert len(hooks) == len(saved)
    for hook in hooks:
        assert sum(torch.equal(hook.down, value) for value in saved.values()) == 1
    again, _ = load(folder, device="cpu")
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def test_widths_layers_scales_and_missing_biases_are_spelled_out(tmp_path: Path) -> None:
    """r = 8 and 5 of width 32 are factors 4 and 6.4 or less, a layer without an adapter is left out, a learned s is folded."""
    options: dict[str, Any] = {"scale": "channel", "bias": False, "sizes": {"0": 8, "1": 5, "2": 0}}
    base = base_folder(tmp_path, num_hidden_layers=4)
    model = saved_run(tmp_path / "run", base, Adapter(name="own", r=8, **options))
    folder = export_adapter_hub(tmp_path / "run").path
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    factors = config["reduction_factor"]
    assert [int(32 // factors[k]) for k in ("default", "1")] == [8, 5] and set(factors) == {"default", "1"}
    assert config["leave_out"] == [2] and config["scaling"] == 1.0
    tensors = load_file(folder / "adapter.safetensors")
    hook = next(p for path, _, _, p in all_hooks(model, "own") if path.endswith("layers.1.self_attn.o_proj"))
    stem = "model.layers.1.attention_adapters.adapters.own"
    torch.testing.assert_close(tensors[f"{stem}.{UP}"], hook.scale[:, None] * hook.up, atol=0, rtol=0)
    assert not tensors[f"{stem}.adapter_up.bias"].any()
    again, _ = load(folder, device="cpu")
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_folder_of_the_library_is_read_with_its_learned_scale(tmp_path: Path) -> None:
    """Names and options as the library saves them, mounted by hand and from the folder."""
    base = base_folder(tmp_path, "bert")
    wrapper = Adapter(name="own", r=4, placement="pfeiffer", scale="learned")
    model = saved_run(tmp_path / "run", base, wrapper, head="masked")
    tensors: dict[str, torch.Tensor] = {}
    for path, _, _, hook in all_hooks(model, "own"):
        stem = path.removesuffix(".LayerNorm") + ".adapters.a"
        values = (hook.down, hook.down_bias, hook.up, hook.up_bias, hook.scale)
        tensors |= {f"{stem}.{leaf}": v.detach().clone() for leaf, v in zip((*PARTS, "scaling"), values, strict=True)}
    options = {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "non_linearity": "relu"}
    config = {"config": {**options, "scaling": "learned", "reduction_factor": 8}, "name": "a", "model_name": str(base)}
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(tensors, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "model_class": "BertForMaskedLM"}))
    assert set(tensors) > {f"{BERT[1].format(0)}.adapters.a.{DOWN}"}
    again, _ = load(folder, device="cpu")
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)


def test_a_task_head_travels_beside_the_adapter(tmp_path: Path) -> None:
    labels = ["no", "yes", "maybe"]
    model = saved_run(
        tmp_path / "run", base_folder(tmp_path, "bert"), Adapter(name="own", r=4), head="classification", labels=labels
    )
    folder = export_adapter_hub(tmp_path / "run").path
    head = load_file(folder / "model_head.safetensors")
    torch.testing.assert_close(head["classifier.weight"], model.classifier.weight.detach(), atol=0, rtol=0)
    config = json.loads((folder / "head_config.json").read_text())
    assert config["model_class"] == "BertForSequenceClassification" and config["num_labels"] == 3
    assert config["label2id"] == {"no": 0, "yes": 1, "maybe": 2}


REFUSED: list[tuple[str, Any, str]] = [
    ("llama", Lora(name="own"), "it is no bottleneck adapter"),
    ("llama", Adapter(name="own", train_norms=True), "trained norms of the base"),
    ("llama", Adapter(name="own", ln_before=True), "norms of their own"),
    ("llama", ParallelAdapter(name="own"), "input: residual"),
    ("llama", ParallelAdapter(name="own", target="attn.q"), "one branch in parallel with a sublayer"),
    ("mixtral", Adapter(name="own"), "names for mixtral are not known"),
]


@pytest.mark.parametrize(("family", "wrapper", "why"), REFUSED)
def test_what_the_library_cannot_hold_is_refused_with_the_reason(tmp_path: Path, family: str, wrapper: Any, why: str) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path, family), wrapper)
    with pytest.raises(ModelError, match=why):
        export_adapter_hub(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter_hub").exists()


def test_the_verb_says_how_the_folder_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path), Adapter(name="own"))
    assert command(["export", str(tmp_path / "run"), "--to", "adapter_hub", "--out", str(tmp_path / "hub")]) == 0
    told = capsys.readouterr().out
    assert f"model.load_adapter('{tmp_path / 'hub'}', use_safetensors=True, set_active=True)" in told
