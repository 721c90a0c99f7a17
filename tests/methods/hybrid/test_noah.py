"""NOAH's supernet: a slice is the plain stack it stands for and costs what that leaves; what is not drawn does not move."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.hybrid.noah import Noah
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.runs.delta import build_wrapper
from tests.methods.additive.harness import logits, model_of
from tests.tiny import tiny_vision_model
from tests.trainings import resumes_to_the_bit, train_recipe

SIZES: dict[str, Any] = {"lora": [1, 2, 4], "adapter": [1, 3, 5], "prompt": [1, 2, 6]}
DESIGNS: dict[str, dict[str, dict[str, int]]] = {
    "uneven": {"lora": {"0": 2, "1": 4}, "adapter": {"0": 3}, "prompt": {"0": 2, "1": 1}},
    "absent": {"lora": {"0": 1}, "adapter": {"0": 1, "1": 0}, "prompt": {"0": 1, "1": 0}},
    "largest": {"lora": {"0": 4, "1": 4}, "adapter": {"0": 5, "1": 5}, "prompt": {"0": 6, "1": 6}},
}
PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CALTECH101 = {  # the subnet that NOAH's authors publish for Caltech101
    "prompt": (5, 10, 1, 5, 10, 1, 10, 1, 10, 1, 10, 1),
    "lora": (1, 10, 10, 10, 5, 10, 10, 10, 5, 1, 10, 1),
    "adapter": (10, 1, 5, 10, 10, 1, 5, 5, 10, 1, 5, 10),
}


def base(family: str) -> nn.Module:
    if family == "vision":
        torch.manual_seed(0)
        return tiny_vision_model(positions="learned", norm="layernorm", gated=False, bias=True).double()
    return model_of(family).double()


def out(model: Any, family: str) -> torch.Tensor:
    return model(pixel_values=PIXELS).logits if family == "vision" else logits(model)


def supernet(family: str, **options: Any) -> tuple[nn.Module, Noah]:
    """A model under a supernet whose tensors are large enough for differences to show."""
    model, noah = base(family), Noah(name="noah", **{**SIZES, **options})
    Stack([noah]).attach(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for _, _, _, hook in all_hooks(model, "noah"):
            for parameter in hook.parameters():
                parameter.normal_(std=0.3)
    return model.double().eval(), noah


def copied(plain: nn.Module, model: nn.Module, design: dict[str, dict[str, int]]) -> None:
    """Copy leading slices of a supernet into the plain stack of a design, place by place."""
    theirs = {path: hook for path, _, _, hook in all_hooks(model, "noah")}
    for path, _, _, hook in all_hooks(plain):
        other = theirs[path]
        for key, parameter in hook.named_parameters():
            source = dict(other.named_parameters())[key]
            if key.endswith("flat"):
                sizes = [design["prompt"].get(str(layer), 0) for layer in range(2)]
                halves = source.split(source.shape[1] // 2, 1)
                rows = [half[:k, part] for half, k in zip(halves, sizes, strict=True) if k for part in _halves(half)]
                parameter.data = torch.cat([r.flatten() for r in rows])
                continue
            parameter.data = source.data[tuple(slice(0, n) for n in parameter.shape)].clone()


def _halves(half: torch.Tensor) -> tuple[slice, slice]:
    middle = half.shape[1] // 2
    return slice(0, middle), slice(middle, None)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("family", ["vision", "llama", "bert"])
def test_a_slice_is_the_plain_stack_with_its_leading_entries(family: str, design: str) -> None:
    """Logits and gradients of the sub-network, entry by entry, and its price."""
    model, noah = supernet(family)
    chosen = DESIGNS[design]
    noah.use(model, chosen)
    stack = [build_wrapper(kind, {"kind": kind, **options}) for kind, options in noah.written(model, chosen).items()]
    plain, attached = base(family), Stack(stack)
    attached.attach(plain)
    plain = plain.double().eval()
    copied(plain, model, chosen)
    ours, theirs = out(model, family), out(plain, family)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    own = [p for _, _, _, hook in all_hooks(plain) for p in hook.parameters()]
    assert noah.cost(model, chosen) == sum(p.numel() for p in own)
    for result in (ours, theirs):
        result.square().mean().backward()
    pieces = {path: hook for path, _, _, hook in all_hooks(model, "noah")}
    compared = 0
    for path, _, _, hook in all_hooks(plain):
        for key, parameter in hook.named_parameters():
            gradient = dict(pieces[path].named_parameters())[key].grad
            assert gradient is not None and parameter.grad is not None
            if not key.endswith("flat"):
                part = gradient[tuple(slice(0, n) for n in parameter.shape)]
                torch.testing.assert_close(part, parameter.grad, rtol=1e-10, atol=1e-14)
                compared += 1
            assert float(gradient.abs().sum()) == pytest.approx(float(parameter.grad.abs().sum()), rel=1e-10)
    assert compared


def test_what_is_not_drawn_does_not_move_nor_do_its_moments() -> None:
    model, noah = supernet("llama")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)

    def step(design: dict[str, dict[str, int]]) -> None:
        noah.use(model, design)
        optimizer.zero_grad()
        logits(model).square().mean().backward()
        with noah.stepping(model, optimizer):
            optimizer.step()

    step(DESIGNS["largest"])
    before = [p.detach().clone() for p in trained]
    moments = [copy.deepcopy(optimizer.state[p]["exp_avg"]) for p in trained]
    step(DESIGNS["absent"])
    still = {id(p): mask for part in noah.parts(model) for p, mask in part.still()}
    rested = moved = 0
    for p, old, moment in zip(trained, before, moments, strict=True):
        mask = still[id(p)].expand_as(p)
        assert torch.equal(p[mask], old[mask]) and torch.equal(optimizer.state[p]["exp_avg"][mask], moment[mask])
        rested, moved = rested + int(mask.sum()), moved + int((p[~mask] != old[~mask]).sum())
    assert moved == noah.cost(model, DESIGNS["absent"]) and rested + moved == sum(p.numel() for p in trained)


def test_draws_are_a_function_of_seed_and_step_and_reach_every_size() -> None:
    model, noah = supernet("llama")
    draws = [noah.draw(model, step) for step in range(200)]
    assert draws == [noah.draw(model, step) for step in range(200)]
    assert draws != [Noah(name="n", **{**SIZES, "seed": 1}).draw(model, step) for step in range(200)]
    for kind, sizes in SIZES.items():
        rows = [draw[kind] for draw in draws]
        assert {len(row) for row in rows} == {1, 2} and {size for row in rows for size in row.values()} == set(sizes)
    turns = Noah(name="n", **{**SIZES, "sampling": "sandwich"})
    assert turns.draw(model, 4) == DESIGNS["largest"]
    assert turns.draw(model, 5) == {"lora": {"0": 1}, "adapter": {"0": 1}, "prompt": {"0": 1}}


def test_the_published_subnet_is_written_as_sizes_by_layer() -> None:
    with torch.device("meta"):
        from transformers import ViTConfig, ViTForImageClassification

        model = ViTForImageClassification(ViTConfig(num_hidden_layers=12))
        noah = Noah(name="noah")
        Stack([noah]).attach(model)
        design = {kind: {str(i): k for i, k in enumerate(row)} for kind, row in CALTECH101.items()}
        stack = noah.written(model, design)
        assert [tuple(stack[kind]["sizes"].values()) for kind in ("vpt", "lora", "adapter")] == list(CALTECH101.values())
        assert stack["lora"]["alpha_pattern"][r"vit\.layers\.10\..*"] == 10.0
        plain = ViTForImageClassification(ViTConfig(num_hidden_layers=12))
        Stack([build_wrapper(kind, {"kind": kind, **options}) for kind, options in stack.items()]).attach(plain)
        left = sum(p.numel() for _, _, _, hook in all_hooks(plain) for p in hook.parameters())
        # 3 r (768 + 768) for q, k and v; (2 * 768 + 1) k + 768; 768 for a prompt
        counts = {kind: sum(row) for kind, row in CALTECH101.items()}
        worked = 4608 * counts["lora"] + 1537 * counts["adapter"] + 12 * 768 + 768 * counts["prompt"]
        assert noah.cost(model, design) == left == worked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": [], "adapter": [], "prompt": []}, "nothing would train"),
        ({"depths": [3]}, "depths: 3 is more than the 2 layers"),
        ({"sizes": {"lora": {"2": 1}}}, r"sizes\.lora\.2: this model has layers 0 to 1"),
        ({"sizes": {"adapter": {"0": 9}}}, r"sizes\.adapter\.0: 9 is more than 5"),
    ],
)
def test_what_no_model_has_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Stack([Noah(name="noah", **{**SIZES, **options})]).attach(base("llama"))


def test_a_run_computes_with_the_sizes_it_is_given(tmp_path: Path) -> None:
    from llmrecipe.evaluation.evaluate_model import open_subject

    words = ["epochs=null", "steps=4", "data.limit=64", "eval.at_start=false", "eval.bootstrap=0"]
    train_recipe(tmp_path / "run", "noah", *words)
    results = []
    for sizes in ("{}", "{lora: {0: 8, 1: 8}, adapter: {0: 8, 1: 8}, prompt: {0: 20, 1: 20}}", "{lora: {0: 1}}"):
        subject = open_subject(str(tmp_path / "run"), [f"stack.noah.sizes={sizes}"])
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            results.append(subject.loaded.model(pixel_values=pixels).logits)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    resumes_to_the_bit(tmp_path, "noah", ["epochs=null", "steps=4", "data.limit=64", "eval.at_start=false"], 2)
