"""IA3, prefix and prompt tuning: folders that peft loads, and folders peft wrote, with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe import load
from llmrecipe.core.errors import ModelError
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods.additive.ia3 import Ia3
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.additive.prompt_tuning import PromptTuning
from tests.interop.saved_runs import base_folder, fill, saved_run

IDS = torch.tensor([[5, 9, 3, 60, 7, 700, 2]])
CASES: dict[str, tuple[str, Any]] = {
    "ia3": ("llama", Ia3(name="ia3")),
    "ia3 fused": ("gpt2", Ia3(name="ia3")),
    "prefix shifted": ("llama", PrefixTuning(name="prefix", num_virtual_tokens=3, hidden=8, positions="shift")),
    "prefix free": ("llama", PrefixTuning(name="prefix", num_virtual_tokens=3, hidden=8)),
    "prompt": ("llama", PromptTuning(name="prompt", num_virtual_tokens=3)),
}


def base_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_folder_with_equal_logits(tmp_path: Path, case: str) -> None:
    from peft import PeftModel

    family, wrapper = CASES[case]
    base = base_folder(tmp_path, family)
    model = saved_run(tmp_path / "run", base, wrapper)
    wanted = model(input_ids=IDS).logits
    twin = PeftModel.from_pretrained(base_model(base), export_peft(tmp_path / "run").path).eval()
    got = twin(input_ids=IDS).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(got, wanted[:, -IDS.shape[1] :], atol=1e-4, rtol=1e-4)
    assert (wanted[:, -IDS.shape[1] :] - base_model(base)(input_ids=IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["ia3", "prefix", "prompt"])
def test_a_folder_written_by_peft_is_read_with_equal_logits(tmp_path: Path, kind: str) -> None:
    from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    config = {
        "ia3": lambda: IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]()
    base = base_folder(tmp_path)
    twin = get_peft_model(base_model(base), config).eval()
    fill(twin)
    wanted = twin(input_ids=IDS).logits[:, -IDS.shape[1] :]
    twin.save_pretrained(tmp_path / "adapter")
    model, _ = load(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(model(input_ids=IDS).logits[:, -IDS.shape[1] :], wanted, atol=1e-4, rtol=1e-4)


def test_what_peft_would_compute_differently_is_refused(tmp_path: Path) -> None:
    tables = [
        ("gpt2", PrefixTuning(name="prefix", num_virtual_tokens=3, hidden=8)),
        ("llama", PrefixTuning(name="prefix", num_virtual_tokens=3, hidden=8, target="layers.0.attn")),
        ("llama", PromptTuning(name="prompt", num_virtual_tokens=3, position="after_bos")),
    ]
    for i, (family, wrapper) in enumerate(tables):
        saved_run(tmp_path / f"run-{i}", base_folder(tmp_path / f"base-{i}", family), wrapper)
        with pytest.raises(ModelError, match="PEFT has no such method"):
            export_peft(tmp_path / f"run-{i}")
