"""BitFit: folders of PEFT's BEFT and LN tuning that peft loads, and folders peft wrote, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmrecipe import load
from llmrecipe.core.errors import ModelError
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.models.hooks.hook import all_hooks
from tests.interop.saved_runs import base_folder, fill, saved_run

IDS = torch.tensor([[5, 9, 3, 60, 7, 700, 2]])
BIASED = {"attention_bias": True, "mlp_bias": True}


def base_model(folder: Path, head: str = "CausalLM", **more: Any) -> nn.Module:
    import transformers

    return getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder, **more)


BOTH = Bitfit(name="b", terms=["value", "output"], missing="add_zero")
CASES: dict[str, tuple[str, dict[str, Any], Bitfit, str, int]] = {
    "value": ("llama", BIASED, Bitfit(name="b", terms=["value"]), "BEFT", 2),
    "value, none there": ("llama", {}, Bitfit(name="b", terms=["value"], missing="add_zero"), "BEFT", 2),
    "some there": (
        "llama",
        {"attention_bias": True},
        Bitfit(name="b", terms=["value", "output"], missing="add_zero"),
        "BEFT",
        4,
    ),
    "all of a model without norm biases": ("llama", BIASED, Bitfit(name="b"), "BEFT", 14),
    "norms": ("gpt2", {}, Bitfit(name="b", terms=["norm"]), "LN_TUNING", 10),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_folder_with_equal_logits(tmp_path: Path, case: str) -> None:
    from peft import PeftModel

    family, more, wrapper, kind, count = CASES[case]
    base = base_folder(tmp_path, family, **more)
    model = saved_run(tmp_path / "run", base, wrapper)
    wanted = model(input_ids=IDS).logits
    folder = export_peft(tmp_path / "run").path
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == kind
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == count
    twin = PeftModel.from_pretrained(base_model(base), folder).eval()
    torch.testing.assert_close(twin(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    assert float((wanted - base_model(base)(input_ids=IDS).logits).abs().max()) > 0.05
    again, _ = load(folder, device="cpu")
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_vector_is_the_trained_bias_less_the_base_and_a_norm_keeps_its_scale(tmp_path: Path) -> None:
    base = base_folder(tmp_path, "bert")
    model = saved_run(tmp_path / "value", base, Bitfit(name="b", terms=["value"]), head="masked")
    tensors = load_file(export_peft(tmp_path / "value").path / "adapter_model.safetensors")
    path, module, _, hook = next(iter(all_hooks(model, "b")))
    assert path == "bert.encoder.layer.0.attention.self.value"
    vector = tensors[f"base_model.model.{path}.beft_bias"]
    torch.testing.assert_close(vector, (hook.bias - module.bias)[None], atol=0, rtol=0)
    model = saved_run(tmp_path / "norm", base, Bitfit(name="b", terms=["norm"]), head="masked")
    tensors = load_file(export_peft(tmp_path / "norm").path / "adapter_model.safetensors")
    path, module, _, hook = next(iter(all_hooks(model, "b")))
    stem = f"base_model.model.{path}.ln_tuning_layers"
    torch.testing.assert_close(tensors[f"{stem}.bias"], hook.bias.detach(), atol=0, rtol=0)
    torch.testing.assert_close(tensors[f"{stem}.weight"], module.weight.detach(), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["beft", "norms"])
def test_a_folder_written_by_peft_is_read_with_equal_logits(tmp_path: Path, kind: str) -> None:
    from peft import BeftConfig, LNTuningConfig, get_peft_model

    family = "llama" if kind == "beft" else "gpt2"
    own = BeftConfig(target_modules=["v_proj"]) if kind == "beft" else LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"])
    own.task_type = "CAUSAL_LM"
    base = base_folder(tmp_path, family)
    twin = get_peft_model(base_model(base), own).eval()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "bias" in name)
    fill(twin)
    wanted = twin(input_ids=IDS).logits
    twin.save_pretrained(tmp_path / "adapter")
    model, _ = load(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_norm_whose_scale_was_trained_is_refused(tmp_path: Path) -> None:
    from peft import LNTuningConfig, get_peft_model

    base = base_folder(tmp_path, "gpt2")
    twin = get_peft_model(base_model(base), LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_1", "ln_2", "ln_f"]))
    fill(twin)
    twin.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"trained the scale of transformer\.h\.0\.ln_1 as well"):
        load(tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize(
    ("family", "wrapper"),
    [("gpt2", Bitfit(name="b", terms=["value"])), ("gpt2", Bitfit(name="b")), ("bert", Bitfit(name="b"))],
    ids=["part of a fused layer", "norms and layers", "a pooler, norms and layers"],
)
def test_what_peft_has_no_one_folder_for_is_refused(tmp_path: Path, family: str, wrapper: Bitfit) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path, family), wrapper, head="masked" if family == "bert" else "causal")
    with pytest.raises(ModelError, match=r"PEFT has no such method \('b'\); use --to merged"):
        export_peft(tmp_path / "run")


def test_a_task_head_travels_with_the_biases(tmp_path: Path) -> None:
    from peft import PeftModel

    base = base_folder(tmp_path)
    wrapper = Bitfit(name="b", terms=["value"], missing="add_zero")
    model = saved_run(tmp_path / "run", base, wrapper, head="classification", labels=["a", "b", "c"])
    folder = export_peft(tmp_path / "run").path
    twin = PeftModel.from_pretrained(base_model(base, "SequenceClassification", num_labels=3), folder).eval()
    torch.testing.assert_close(twin(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
