"""LLM-Adapters: four placements, against the survey's layer written out and its published counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.hybrid.llm_adapters import LlmAdapters
from tests.methods.additive.harness import base_logits, fill, logits, model_of, trained
from tests.methods.hybrid.written import on, stands_for
from tests.trainings import train_recipe

FORMS = {
    "series": "llm_adapters_adapter: {kind: adapter, r: 5, sublayers: [ffn], activation: tanh, bias: false}",
    "parallel": "llm_adapters_parallel_adapter: "
    "{kind: parallel_adapter, target: mlp.up|down, r: 5, scale: 1.0, activation: tanh, bias: false}",
    "lora": "llm_adapters_lora: {kind: lora, target: attn.q|k|v + mlp.up|down, r: 5, alpha: 64.0, dropout: 0.05}",
    "prefix": "llm_adapters_prefix_tuning: {kind: prefix_tuning, num_virtual_tokens: 10}",
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", FORMS)
def test_it_is_the_wrapper_it_prints(family: str, method: str) -> None:
    r = None if method == "prefix" else 5
    stands_for(family, LlmAdapters(name="llm_adapters", method=method, r=r), FORMS[method])


class Bottleneck(nn.Module):
    """The survey's layer around a linear map: series f(x) + c U tanh(D f(x)), parallel f(x) + c U tanh(D x)."""

    def __init__(self, f: nn.Module, down: torch.Tensor, up: torch.Tensor, scale: float, series: bool):
        super().__init__()
        self.f, self.down, self.up, self.scale, self.series = f, down, up, scale, series

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        y = self.f(x)
        return y + self.scale * torch.tanh((y if self.series else x) @ self.down.T) @ self.up.T


@pytest.mark.parity("llm_adapters", "the survey's layer around each linear, float64")
@pytest.mark.parametrize("method", ["series", "parallel"])
def test_bottlenecks_are_the_surveys_layer(method: str) -> None:
    model, _ = on("llama", [LlmAdapters(name="m", method=method, r=5, scale=0.5)])
    fill(model)
    model.double()
    got = logits(model)
    name = "m_adapter" if method == "series" else "m_parallel_adapter"
    plain = model_of("llama").double()
    for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        for place in ("down_proj",) if method == "series" else ("up_proj", "down_proj"):
            hook = getattr(getattr(ours.mlp, place), name, None) or getattr(ours.mlp, name)
            linear = getattr(theirs.mlp, place)
            setattr(theirs.mlp, place, Bottleneck(linear, hook.down, hook.up, 0.5, method == "series"))
    torch.testing.assert_close(got, logits(plain), atol=1e-12, rtol=1e-12)


def test_starts_at_the_base_but_for_the_prefix_and_the_codes_own_start() -> None:
    for method in FORMS:
        same = torch.equal(logits(on("llama", [LlmAdapters(name="m", method=method)])[0]), base_logits("llama"))
        assert same == (method != "prefix")
    own = on("llama", [LlmAdapters(name="m", init="bert")])[0]
    up = own.model.layers[0].mlp.down_proj.m_adapter.up if hasattr(own.model.layers[0].mlp.down_proj, "m_adapter") else None
    up = own.model.layers[0].mlp.m_adapter.up if up is None else up
    assert float(up.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_published_counts_for_llama_7b() -> None:
    """67.1 M in series, 247.5 M with one a linear (the tables' 0.99 and 3.54 %); 2 d b a layer around the feed-forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for options, wanted in (
        ({}, 67_108_864),
        ({"method": "parallel"}, 247_463_936),
        ({"method": "parallel", "granularity": "sublayer"}, 67_108_864),
        ({"method": "lora"}, 32 * 32 * (3 * 2 * 4096 + 2 * (4096 + 11008))),
    ):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())
        Stack([LlmAdapters(name="m", **options)]).attach(model)
        assert trained(model) == wanted


def test_lora_merges_and_goes_to_peft_and_bottlenecks_do_not(tmp_path: Path) -> None:
    from llmrecipe.interop.merged import export_merged
    from llmrecipe.interop.peft.exporter import export_peft

    words = ["steps=1", "eval.at_start=false", "eval.batches=1", "stack.llm_adapters.r=4"]
    train_recipe(tmp_path / "lora", "llm_adapters", *words, "stack.llm_adapters.method=lora")
    assert (export_peft(tmp_path / "lora").path / "adapter_config.json").is_file()
    assert export_merged(tmp_path / "lora").path.is_dir()
    train_recipe(tmp_path / "series", "llm_adapters", *words, "stack.llm_adapters.method=series")
    for export in (export_peft, export_merged):
        with pytest.raises(ModelError, match="llm_adapters_adapter"):
            export(tmp_path / "series")


def test_switched_off_it_is_the_base() -> None:
    model, stack = on("llama", [LlmAdapters(name="m", method="parallel", r=4)])
    fill(model)
    assert stack.reference_is_off()
    with activate(Context(role="reference")):
        assert torch.equal(logits(model), base_logits("llama"))
