"""Visual prompt tuning against its formula, block by block in float64; what trains, what is refused, whole runs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DeiTForImageClassification,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTForImageClassification,
)

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merged import export_merged
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.vpt import Vpt
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.module_map import anatomy
from llmrecipe.recipe.compatibility import pairs
from tests.contract import KINDS, OPTIONS, TRAINED
from tests.tiny import tiny_model, tiny_vision_model
from tests.trainings import curve, learned, resumes_to_the_bit

P, D, L, PATCH = 3, 16, 3, 4
VIT: dict[str, Any] = {
    "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": PATCH, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PIXELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1])
CLASSES: dict[str, Any] = {
    "vit": ViTForImageClassification,
    "deit": DeiTForImageClassification,
    "dinov2": Dinov2ForImageClassification,
}
PAIRS = [p for p in pairs() if "vpt" in (p.first, p.second) and p.first != p.second and p.reason is None]
DEPTHS = ("shallow", "deep")


def vision(kind: str) -> Any:
    """A random model in float64 whose weights are large enough for differences to show."""
    torch.manual_seed(0)
    if kind == "native":
        return tiny_vision_model(positions="learned", norm="layernorm", gated=False, bias=True).double()
    model = CLASSES[kind](CLASSES[kind].config_class(**VIT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.double().eval()


def prompted(kind: str, **options: Any) -> Any:
    """The model of that name under prompts that are larger than their start."""
    model = vision(kind)
    Stack([Vpt(name="vpt", num_virtual_tokens=P, **options)]).attach(model)
    for _, tensor in prompts(model):
        with torch.no_grad():
            tensor.normal_()
    return model.double().eval()


def prompts(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The prompts by name, in the order of the blocks."""
    return [(name, p) for name, p in model.named_parameters() if name.endswith("vpt.prompts")]


def by_hand(kind: str, model: Any, rows: list[Tensor], depth: str) -> Tensor:
    """Logits of an untouched model into which tokens were put by hand, (B, C)."""
    if kind == "native":
        stack = model.model.encoder
        x = stack.patches(PIXELS)
        x = x + stack.positions(torch.arange(x.shape[1])[None])
        layers, norm, head = stack.layers, stack.norm, model.classifier
    else:
        x = model.vit.embeddings(PIXELS)
        layers, norm, head = model.vit.layers, model.vit.layernorm, model.classifier
    first, patches = x[:, :1], x[:, 1:]
    given = rows[0].expand(len(x), -1, -1)
    for i, layer in enumerate(layers):
        if depth == "deep":
            given = rows[i].expand(len(x), -1, -1)
        out = layer(torch.cat([first, given, patches], 1))
        first, given, patches = out[:, :1], out[:, 1 : 1 + P], out[:, 1 + P :]
    return head(norm(first)[:, 0])


@pytest.mark.parity("vpt", "the paper's formula, float64")
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", ["vit", "native"])
def test_logits_and_gradients_are_those_of_tokens_put_in_by_hand(kind: str, depth: str) -> None:
    model = prompted(kind, depth=depth)
    given = [p.detach().clone().requires_grad_() for _, p in prompts(model)]
    plain = vision(kind)
    wanted = by_hand(kind, plain, given, depth)
    F.cross_entropy(wanted, LABELS).backward()
    logits = model(pixel_values=PIXELS).logits
    F.cross_entropy(logits, LABELS).backward()
    torch.testing.assert_close(logits, wanted, atol=1e-12, rtol=0)
    assert (logits - vision(kind)(pixel_values=PIXELS).logits).abs().max() > 1e-3
    for (_, ours), theirs in zip(prompts(model), given, strict=True):
        assert theirs.grad is not None and float(theirs.grad.abs().max()) > 1e-6
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)
    torch.testing.assert_close(model.classifier.weight.grad, plain.classifier.weight.grad, atol=1e-12, rtol=0)
    assert model.get_submodule(anatomy(model).at("attn.q")[0].path).weight.grad is None


@pytest.mark.parametrize(("depth", "sets"), [("shallow", 1), ("deep", L)])
def test_what_trains_and_where_it_starts(depth: str, sets: int) -> None:
    """P d or L P d and the head; uniform in the bound of Xavier for a patch's projection."""
    model = vision("vit")
    wrapper = Vpt(name="vpt", num_virtual_tokens=50, depth=depth)
    Stack([wrapper]).attach(model)
    head = D * 3 + 3
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sets * 50 * D + head == wrapper.memory(model)["trainable"]
    assert {n for n in trained if "vpt" not in n} == {"classifier.weight", "classifier.bias"} <= set(wrapper.delta(model))
    bound = math.sqrt(6 / (3 * PATCH * PATCH + D))
    values = torch.cat([p.detach().flatten() for _, p in prompts(model)])
    assert 0.98 * bound < float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("depth", DEPTHS)
def test_states_keep_their_places(depth: str) -> None:
    """Nobody outside sees the prompts: a model that pools patches reads patches alone."""
    model = prompted("vit", depth=depth)
    assert model.vit(pixel_values=PIXELS).last_hidden_state.shape == (4, 1 + 4, D)
    for kind, extra in (("deit", 2), ("dinov2", 1)):
        model = prompted(kind, depth=depth)
        assert model.base_model(pixel_values=PIXELS).last_hidden_state.shape == (4, extra + 4, D)
        assert (model(pixel_values=PIXELS).logits - vision(kind)(pixel_values=PIXELS).logits).abs().max() > 1e-3


def test_dropout_takes_entries_of_prompts_while_training_alone() -> None:
    model = prompted("vit", dropout=0.5)
    quiet = model(pixel_values=PIXELS).logits
    assert torch.equal(quiet, prompted("vit")(pixel_values=PIXELS).logits)
    model.train()
    torch.manual_seed(0)
    noisy = model(pixel_values=PIXELS).logits
    assert (noisy - quiet).abs().max() > 1e-3


def test_it_shares_a_stack_with_lora() -> None:
    """With LoRA at its start the logits are those of the prompts alone, and both have gradients."""
    alone = vision("vit")
    torch.manual_seed(1)
    Stack([Vpt(name="vpt", num_virtual_tokens=P)]).attach(alone)
    model = vision("vit")
    torch.manual_seed(1)
    Stack([Vpt(name="vpt", num_virtual_tokens=P), Lora(name="lora", r=2, target="attn.q|v")]).attach(model)
    model.double(), alone.double()
    logits = model(pixel_values=PIXELS).logits
    torch.testing.assert_close(logits, alone(pixel_values=PIXELS).logits, atol=1e-12, rtol=0)
    logits.square().sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert any("lora" in n for n in touched) and {n for n, _ in prompts(model)} <= touched


def test_models_without_a_place_for_prompts_are_refused() -> None:
    swin = SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    for model, words in (
        (tiny_model(), "vpt is for models that read images, and this one reads text; use prompt_tuning .* or prefix_tuning"),
        (SwinForImageClassification(swin), "merges patches from stage to stage"),
        (tiny_vision_model(positions="rotary"), "a prompt has none; use lora"),
        (tiny_vision_model(positions="relative"), "a prompt has none; use lora"),
    ):
        with pytest.raises(ModelError, match=rf"stack\.mine: .*{words}"):
            Stack([Vpt(name="mine")]).attach(model)
    table = {frozenset((p.first, p.second)): p.reason for p in pairs()}
    assert "read text" in str(table[frozenset(("vpt", "prompt_tuning"))]) and table[frozenset(("vpt", "lora"))] is None


@pytest.mark.parametrize("kind", [k for k in KINDS if registry.spec("stack", k).facts.get("modality") == "text"])
def test_methods_that_read_tokens_are_refused_on_pictures(kind: str) -> None:
    with pytest.raises(ModelError, match=rf"stack\.mine: {kind} is for models that read text, .* reads images; use vpt"):
        Stack([registry.load_class("stack", kind)(name="mine")]).attach(vision("native"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({p.first if p.second == "vpt" else p.second for p in PAIRS} & {*TRAINED} - {"esft"}))
def test_both_parts_of_a_legal_pair_have_gradients(kind: str) -> None:
    model = vision("native").float()
    other = registry.load_class("stack", kind)(name="other", **OPTIONS.get(kind, {}))
    stack = Stack([other, Vpt(name="vpt", num_virtual_tokens=P)])
    stack.attach(model)
    F.cross_entropy(model(pixel_values=PIXELS.float()).logits, LABELS).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {n for n, _ in prompts(model)} <= touched
    # A choice from data has not been made here, so what it would train is not open.
    assert other.calibrates() or touched - {n for n, _ in prompts(model)} - {"classifier.weight", "classifier.bias"}


SMALL = [
    "steps=4", "batch.size=8", "batch.micro=5", "data.limit=64", "eval.batches=1", "eval.every=null", "stack.vpt.dropout=0.2",
    "model.config.hidden_size=16", "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2",
]  # fmt: skip


def test_a_run_goes_on_to_the_bit_and_is_saved_as_what_it_learned(tmp_path: Path) -> None:
    """Prompts and head alone; loaded again they give the run's logits; no folder of merged weights."""
    run = resumes_to_the_bit(tmp_path, "vpt", SMALL, 2)
    assert len(curve(tmp_path / "whole")) == 4
    one = learned(tmp_path / "whole")
    assert {name.split(".")[-2] for name in one} == {"vpt", "classifier"} and len(one) == 4
    opened = open_run(str(tmp_path / "whole"))
    pixels = torch.stack([torch.from_numpy(run.validation[i]["features"].load()) for i in range(3)])
    with torch.no_grad():
        wanted = copy.deepcopy(run.model).eval()(pixel_values=pixels).logits
        torch.testing.assert_close(opened.model.eval()(pixel_values=pixels).logits, wanted, atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match=r"vpt.*rows of their own in every block"):
        export_merged(tmp_path / "whole", tmp_path / "merged", loaded=opened)
    assert not (tmp_path / "merged").exists()
