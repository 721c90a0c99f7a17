"""The native vision encoder: patches by hand, counts, saving, sites, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.load import load_model, load_tokenizer
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.native import NativeConfig, NativeForImageClassification
from llmrecipe.models.native.parts.patch_embedding import PatchEmbedding
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from tests.support import ROOT

SHAPE: dict[str, Any] = {
    "kind": "vision", "image_size": 8, "patch_size": 4, "num_channels": 2, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3,
}  # fmt: skip


def vision(**more: Any) -> NativeForImageClassification:
    torch.manual_seed(0)
    model = NativeForImageClassification(NativeConfig(**{**SHAPE, **more})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif "norm" not in name:
                parameter.normal_(std=0.1)
    return model


def images(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def test_patches_by_hand() -> None:
    """Place 1 + 2 r + c of an 8 x 8 image holds W vec(x[:, 4r:4r+4, 4c:4c+4]) + b; place 0 the class token."""
    part = PatchEmbedding(NativeConfig(**SHAPE))
    torch.nn.init.normal_(part.class_token)
    x, out = images(1), part(images(1))[0]
    assert torch.equal(out[0], part.class_token)
    for r in range(2):
        for c in range(2):
            patch = x[0, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].reshape(-1)
            wanted = part.projection.weight @ patch + part.projection.bias
            assert torch.allclose(out[1 + 2 * r + c], wanted, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [{"positions": p} for p in ("rotary", "learned", "sinusoidal", "relative", "none")]
    + [{"num_experts": 3, "num_shared_experts": 2}, {"pre_norm": False, "embed_norm": True, "norm": "layernorm", "bias": True}],
)
def test_every_place_is_read_and_the_count_is_exact(more: dict[str, Any]) -> None:
    model = vision(**more)
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count()
    x = images(1)
    for r in (0, 4):
        for c in (0, 4):
            changed = x.clone()
            changed[0, :, r : r + 4, c : c + 4] *= 2.0
            assert (model(changed).logits - model(x).logits).abs().max() > 1e-3
    turned = torch.cat((x[..., 4:], x[..., :4]), -1)
    apart = (model(turned).logits - model(x).logits).abs().max()
    assert apart < 1e-5 if more.get("positions") == "none" else apart > 1e-3


def test_first_loss_is_the_logarithm_of_the_number_of_classes() -> None:
    torch.manual_seed(0)
    model = NativeForImageClassification(NativeConfig(**SHAPE)).eval()
    assert model(images(30), labels=torch.arange(30) % 3).loss.item() == pytest.approx(math.log(3), rel=0.05)


def test_save_and_load(tmp_path: Path) -> None:
    model = vision(positions="learned")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, NativeForImageClassification)
    assert torch.equal(model(images()).logits, again(images()).logits)


def test_other_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 2 x 8 x 4; this model reads 2 x 8 x 8 \(channels x height x width\)"):
        vision()(images()[..., :4])
    with pytest.raises(ValueError, match="kind: vision reads exactly one of pixel_values and inputs_embeds"):
        vision().model(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(Exception, match=r"image_size \(8\) is no multiple of patch_size \(3\)"):
        NativeConfig(**{**SHAPE, "patch_size": 3})
    with pytest.raises(ValueError, match="needs kind: vision, not decoder"):
        NativeForImageClassification(NativeConfig())


def preset(name: str) -> ModelSection:
    return ModelSection(**yaml.safe_load((ROOT / "recipes" / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def test_the_preset_loads_as_an_image_classifier_with_the_labels_of_the_data() -> None:
    section = preset("native_vit")
    model = load_model(section, rows_head="image", labels=["cat", "dog"], tokenizer=load_tokenizer(section, TokenizerSection()))
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2) and model.config.id2label == {0: "cat", 1: "dog"}
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count()
    with pytest.raises(ModelError, match="needs a causal language model, but 'llmrecipe_native' offers: image"):
        load_model(section, rows_head="causal")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", {"target": "attn.q|v + mlp.up"}), ("lora", {"target": "embed"}), ("bitfit", {}), ("ia3", {}), ("dora", {}),
        ("adapter", {}), ("parallel_adapter", {}), ("prefix_tuning", {"num_virtual_tokens": 2}),
    ],
)  # fmt: skip
def test_methods_find_their_sites(kind: str, options: dict[str, Any]) -> None:
    """A step along the gradient of what a method trains lowers the loss as much as the gradient says."""
    from llmrecipe.models.attention import install_attention

    model = vision(bias=True, positions="learned")
    install_attention(model, "sdpa")
    assert anatomy(model).at("layers.1.attn.q")[0].path == "model.encoder.layers.1.self_attn.q_proj"
    assert not anatomy(model).causal and "head" in anatomy(model).roles()
    stack = Stack([registry.load_class("stack", kind)(name=kind, **options)])
    stack.attach(model)
    x, labels = images(), torch.tensor([0, 2])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters())
    loss = model(x, labels=labels).loss
    loss.backward()
    size = sum(float(p.grad.square().sum()) for p in trained if p.grad is not None)
    assert size > 0
    step = 1e-3 / size**0.5
    with torch.no_grad():
        for p in trained:
            if p.grad is not None:
                p -= step * p.grad
        moved = model(x, labels=labels).loss
    assert float(loss - moved) == pytest.approx(step * size, rel=0.1)
