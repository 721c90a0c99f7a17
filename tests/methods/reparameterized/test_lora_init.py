"""LoRA's starts against peft and worked in float64: mica, loftq, eva, corda, lora_ga; they begin at the base they say."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines import data_init, initialization
from llmrecipe.methods._engines.low_rank import LowRank
from llmrecipe.methods._engines.quantized import dense_weight, quantized
from llmrecipe.methods.memory.int8 import Int8
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.runs import delta
from tests.methods.additive.harness import model_of
from tests.methods.probe import language_probe
from tests.methods.reparameterized.test_lora import fill
from tests.methods.twins import IDS, side_by_side
from tests.tiny import tiny_model

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
SITES = {"llama": "attn.q|v + mlp.down", "gpt2": "attn.qkv + mlp.up"}


def started(family: str, init: str, *below: Any, packing: bool = False, **options: Any) -> tuple[nn.Module, Stack]:
    """A model with a LoRA that has looked at its batch of rows."""
    model = tiny_model(family)
    stack = Stack([*below, Lora(**{"name": "lora", "target": SITES[family], "r": 4, "alpha": 6.0, "init": init, **options})])
    stack.attach(model)
    probe = language_probe(model, packing, stack)
    probe.original = lambda: tiny_model(family)
    stack.calibrate(model, probe)
    return model, stack


def hooks_of(model: nn.Module) -> dict[str, LowRank]:
    return {path: hook for path, _, _, hook in all_hooks(model) if isinstance(hook, LowRank)}


def weight_of(model: nn.Module, path: str) -> Tensor:
    """(out, in) in float64."""
    return dense_weight(model.get_submodule(path)).detach().double()


def inputs_of(model: nn.Module, path: str, batches: int, packing: bool = False, rows: int | None = None) -> list[Tensor]:
    """(n, in) inputs of a layer on each of the probe's batches, in float64, padding left out by hand."""
    seen: list[Tensor] = []
    module, probe = model.get_submodule(path), language_probe(model, packing)
    for batch in probe.batches(batches, rows):
        real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        keep = real.bool()
        handle = module.register_forward_pre_hook(lambda _, args, keep=keep: seen.append(args[0].detach()[keep].double()))
        with torch.no_grad():
            probe.loss(batch)
        handle.remove()
    return seen


def peft_batch(model: nn.Module, count: int = 1, rows: int | None = None) -> list[dict[str, Tensor]]:
    found = []
    for batch in language_probe(model, packing=False).batches(count, rows):
        labels = torch.full_like(batch.input_ids, -100).flatten()
        labels[batch.source + 1] = batch.target
        found.append(
            {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "labels": labels.view_as(batch.input_ids),
            }
        )
    return found


def same_product(hook: LowRank, theirs: Any, atol: float = 2e-5) -> None:
    ours = hook.B.double() @ hook.A.double()
    wanted = theirs.lora_B["default"].weight.double() @ theirs.lora_A["default"].weight.double()
    assert float(wanted.abs().max()) > 1e-3
    torch.testing.assert_close(ours, wanted, atol=atol * float(wanted.abs().max()), rtol=0)


def peft_layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}


# --- mica ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "target", "names"), [
    ("llama", "attn.q|v", ["q_proj", "v_proj"]), ("gpt2", "attn.qkv", ["c_attn"]), ("llama", "embed", ["embed_tokens"]),
])  # fmt: skip
@pytest.mark.parity("lora", "PEFT init mica")
def test_mica_trains_a_against_the_minor_vectors_as_peft_does(family: str, target: str, names: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model, stack = started(family, "mica", target=target)
    fan = family == "gpt2"
    twin = get_peft_model(
        tiny_model(family), LoraConfig(target_modules=names, r=4, lora_alpha=6, init_lora_weights="mica", fan_in_fan_out=fan)
    )
    ours = {path: hook for path, _, _, hook in all_hooks(model)}
    theirs = peft_layers(twin)
    embeds = target == "embed"
    signs = {}
    for path, hook in ours.items():
        B = theirs[path].lora_embedding_B["default"] if embeds else theirs[path].lora_B["default"].weight
        signs[path] = torch.sign((hook.B * B).sum(0))
        torch.testing.assert_close(hook.B, signs[path] * B, atol=2e-5, rtol=1e-4)
        assert not hook.A.any() and hook.A.requires_grad and not hook.B.requires_grad
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert stack.wrappers[0].memory(model)["trainable"] == trained == sum(hook.A.numel() for hook in ours.values())
    for losses in side_by_side((model, twin), steps=3):
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


# --- loftq --------------------------------------------------------------------------------------------------------------


@pytest.mark.parity("lora", "PEFT LoftQ decomposition")
@pytest.mark.parametrize("below", [Nf4(name="nf4"), Nf4(name="nf4", double=False, type="fp4"), Int8(name="int8")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_is_the_best_correction_of_the_codes_and_leaves_them_alone(below: Any, family: str) -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    model, stack = started(family, "loftq", below)
    plain = tiny_model(family)
    Stack([below]).attach(plain)
    codes = {path: module.weight.detach().clone() for path, module in quantized(plain)}
    assert all(torch.equal(module.weight, codes[path]) for path, module in quantized(model)) and codes
    original = tiny_model(family)
    for path, hook in hooks_of(model).items():
        lost = weight_of(original, path) - dense_weight(model.get_submodule(path), torch.float32).double()
        s = torch.linalg.svdvals(lost)
        left = lost - hook.product().double()
        # Eckart-Young: nothing of rank 4 comes nearer than the discarded singular values.
        torch.testing.assert_close(left.norm(), s[4:].square().sum().sqrt(), atol=0, rtol=1e-4)
        theirs = _low_rank_decomposition(lost, 4)
        wanted = theirs["L"] @ theirs["R"]
        torch.testing.assert_close(hook.product().double(), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    assert not stack.reference_is_off() and stack.wrappers[-1].starts_at_base() is False


def test_loftq_at_the_full_rank_gives_the_model_before_it_was_quantized() -> None:
    wanted = tiny_model()(input_ids=IDS).logits
    plain = tiny_model()
    Stack([Nf4(name="nf4")]).attach(plain)
    model, _ = started(
        "llama",
        "loftq",
        Nf4(name="nf4"),
        target="all-linear",
        r=16,
        rank_pattern={"(gate|up|down|q|o)_proj": 32},
    )
    got = model(input_ids=IDS).logits
    assert float((plain(input_ids=IDS).logits - wanted).abs().max()) > 0.3
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)


def test_loftq_without_a_quantized_layer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"stack.lora: model.layers.0.self_attn.q_proj: init: loftq makes up for the rounding"):
        started("llama", "loftq")
    with pytest.raises(ModelError, match=r"lm_head: init: loftq makes up .* leave this layer out of the target"):
        started("llama", "loftq", Nf4(name="nf4"), target="head")


# --- eva ----------------------------------------------------------------------------------------------------------------


def pca(x: Tensor) -> tuple[Tensor, Tensor]:
    """(directions, shares of variance) of rows, by the singular values of the centred rows."""
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return v, s.square() / s.square().sum()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_eva_starts_from_the_principal_directions_of_all_inputs(family: str, packing: bool) -> None:
    base = tiny_model(family)
    model, _ = started(family, "eva", packing=packing, eva_rho=1.0, init_batches=3)
    for path, hook in hooks_of(model).items():
        wanted, _ = pca(torch.cat(inputs_of(base, path, 3, packing)))
        cosines = (hook.A.double() * wanted[:4]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0)
        assert not hook.B.any() and hook.scale == 1.5
    torch.testing.assert_close(model(input_ids=IDS).logits, base(input_ids=IDS).logits, atol=0, rtol=0)


@pytest.mark.parity("lora", "PEFT init eva")
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_gives_the_directions_ranks_and_scales_that_peft_gives(rho: float) -> None:
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    targets = ["q_proj", "o_proj", "down_proj"]
    model, _ = started("llama", "eva", target="attn.q|o + mlp.down", eva_rho=rho, init_batches=1)
    plain = tiny_model()
    eva = EvaConfig(rho=rho, use_label_mask=False)
    twin = get_peft_model(plain, LoraConfig(target_modules=targets, r=4, lora_alpha=6, init_lora_weights="eva", eva_config=eva))
    initialize_lora_eva_weights(twin, peft_batch(tiny_model()), show_progress_bar=False)
    theirs = peft_layers(twin)
    ours = hooks_of(model)
    assert {n: p.A.shape[0] for n, p in ours.items()} == {n: m.r["default"] for n, m in theirs.items()}
    assert rho == 1.0 or len({p.A.shape[0] for p in ours.values()}) > 1
    for path, hook in ours.items():
        assert hook.scale == pytest.approx(theirs[path].scaling["default"])
        # peft's decomposition is a randomised one: compare the spaces.
        A = torch.linalg.qr(theirs[path].lora_A["default"].weight.double().t())[0]
        inside = (hook.A.double() @ A).norm(dim=1)
        torch.testing.assert_close(inside, torch.ones_like(inside), atol=0.02, rtol=0.0, msg=path)


def test_eva_moves_ranks_by_the_shares_of_variance_and_keeps_their_sum() -> None:
    model, _ = started("llama", "eva", target="attn.q|o + mlp.down", eva_rho=3.0, init_batches=4)
    base = tiny_model()
    paths = [s.path for s in sites(base, "attn.q|o + mlp.down")]
    shares = {path: pca(torch.cat(inputs_of(base, path, 4)))[1][:12] for path in paths}
    bar = torch.cat(list(shares.values())).sort(descending=True).values[4 * len(paths) - 1]
    wanted = {path: int((s >= bar).sum()) for path, s in shares.items()}
    assert {path: p.A.shape[0] for path, p in hooks_of(model).items()} == {p: n for p, n in wanted.items() if n}
    assert sum(wanted.values()) == 4 * len(paths) and len(set(wanted.values())) > 1


def sites(model: nn.Module, target: str) -> list[Any]:
    from llmrecipe.models.module_map import anatomy

    return anatomy(model).at(target)


def test_equal_shares_go_to_the_earlier_layer_and_none_is_a_rank_of_zero() -> None:
    assert initialization.distribute([torch.tensor([0.5, 0.2]), torch.tensor([0.5, 0.3]), torch.tensor([0.1])], 3) == [1, 2, 0]
    assert initialization.distribute([torch.tensor([0.4, 0.2]), torch.tensor([0.4, 0.2])], 3) == [2, 1]


def test_the_ranks_eva_chose_are_saved_and_a_layer_without_any_has_no_branch() -> None:
    model, stack = started("llama", "eva", target="attn.q|o + mlp.down + mlp.up", eva_rho=8.0, r=1, init_batches=2)
    fill(model)
    structure = stack.structures(model)["lora"]
    assert sum(structure["ranks"].values()) == 8 and len(structure["ranks"]) < 8
    layer = delta.Layer({"lora": delta.wrapper_mapping(stack.wrappers[0])}, {"lora": structure}, tensors=stack.delta(model))
    again = tiny_model()
    delta.mount_layer(again, layer, 0)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert len(hooks_of(again)) == len(structure["ranks"])


# --- corda --------------------------------------------------------------------------------------------------------------


@pytest.mark.parity("lora", "PEFT init corda")
@pytest.mark.parametrize("init", ["corda", "corda_kpm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_corda_starts_where_peft_does(family: str, init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # peft takes `dataclass` from a package it does not declare; the standard one serves.
    monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, _ = started(family, init, init_batches=6)
    base = tiny_model(family)
    method: Any = "kpm" if init.endswith("kpm") else "ipm"
    config = LoraConfig(
        target_modules=TARGETS[family], r=4, lora_alpha=6, init_lora_weights="corda", fan_in_fan_out=family == "gpt2",
        corda_config=CordaConfig(corda_method=method),
    )  # fmt: skip
    rows = peft_batch(base, 6, rows=1)

    def run() -> None:
        for row in rows:
            base(input_ids=row["input_ids"])

    preprocess_corda(base, config, run_model=run)
    twin = get_peft_model(base, config)
    theirs = peft_layers(twin)
    for path, hook in hooks_of(model).items():
        same_product(hook, theirs[path], atol=2e-3)
        assert hook.A0 is not None and torch.equal(hook.A, hook.A0)
    torch.testing.assert_close(model(input_ids=IDS).logits, tiny_model(family)(input_ids=IDS).logits, atol=5e-5, rtol=1e-4)
    generator = torch.Generator().manual_seed(5)
    for path, hook in hooks_of(model).items():  # away from the start: the same change moves both alike
        step = torch.randn(hook.B.shape, generator=generator) * 0.1
        hook.B.data += step
        sign = torch.sign((hook.A * theirs[path].lora_A["default"].weight).sum(1))
        theirs[path].lora_B["default"].weight.data += step * sign
    torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits, atol=5e-3, rtol=5e-3)


def test_corda_is_the_decomposition_of_the_weight_seen_through_its_inputs() -> None:
    """In float64: W C = U S V^T, s B A = U S V^T C^-1 at rank r; at the full rank that is W itself."""
    model, _ = started("llama", "corda", target="attn.v", init_batches=5)
    base = tiny_model()
    for path, hook in hooks_of(model).items():
        x = [i / i.max().abs() for i in inputs_of(base, path, 5, rows=1)]
        C = sum(i.t() @ i for i in x) / 5
        damped, step = C, 0.01
        while True:
            damped = C + torch.eye(32) * C.diagonal().mean() * step
            if torch.dist(damped @ damped.inverse(), torch.eye(32).double()) < 0.05:
                break
            step *= 2
        U, S, V = torch.linalg.svd(weight_of(base, path) @ damped, full_matrices=False)
        wanted = (U[:, :4] * S[:4]) @ V[:4] @ damped.inverse()
        torch.testing.assert_close(hook.scale * (hook.B.double() @ hook.A.double()), wanted, atol=1e-4, rtol=1e-3)
        assert initialization.from_covariance(weight_of(base, path), C, LowRank(32, 16, 16, 1.5), last=False)[0].shape == (
            16,
            32,
        )
        A, B = initialization.from_covariance(weight_of(base, path), C, LowRank(32, 16, 16, 1.5), last=False)
        torch.testing.assert_close(1.5 * B @ A, weight_of(base, path), atol=1e-8, rtol=0)


# --- lora_ga ------------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, paths: list[str], batches: int) -> dict[str, Tensor]:
    """Float64 gradients (out, in) of the mean of the batches' losses."""
    model.double().requires_grad_(True)
    total: dict[str, Tensor] = {}
    probe = language_probe(model, packing=False)
    for batch in probe.batches(batches):
        model.zero_grad()
        probe.loss(batch).backward()
        for path in paths:
            grad = model.get_submodule(path).weight.grad / batches
            total[path] = total.get(path, 0) + (grad.t() if type(model.get_submodule(path)).__name__ == "Conv1D" else grad)
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_ga_takes_the_singular_vectors_of_the_gradient(family: str) -> None:
    model, _ = started(family, "lora_ga", init_batches=3)
    ours = hooks_of(model)
    for path, grad in gradients(tiny_model(family), list(ours), 3).items():
        U, _, V = torch.linalg.svd(grad, full_matrices=False)
        gain = grad.shape[0] ** 0.25 / 4.0
        hook = ours[path]
        ones = torch.full((4,), gain, dtype=torch.float64)
        torch.testing.assert_close((hook.A.double() * V[:4]).sum(1).abs(), ones, atol=2e-3, rtol=0)
        torch.testing.assert_close((hook.B.double() * U[:, 4:8].t().t()).sum(0).abs(), ones, atol=2e-3, rtol=0)
    torch.testing.assert_close(model(input_ids=IDS).logits, tiny_model(family)(input_ids=IDS).logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parity("lora", "PEFT init lora_ga")
def test_lora_ga_spans_what_peft_spans() -> None:
    """peft multiplies B by the singular values and leaves A as it is; the authors' code, followed here, scales both alike."""
    from peft import LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora import preprocess_loraga

    model, _ = started("llama", "lora_ga", init_batches=1)
    base = tiny_model()
    config = LoraConfig(
        target_modules=TARGETS["llama"], r=4, lora_alpha=6, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    (batch,) = peft_batch(base)
    preprocess_loraga(base, config, lambda: base(**batch).loss.backward())
    twin = get_peft_model(base, config)
    for path, module in peft_layers(twin).items():
        hook = hooks_of(model)[path]
        for own, other in ((hook.A.t(), module.lora_A["default"].weight.t()), (hook.B, module.lora_B["default"].weight)):
            left, right = (torch.linalg.qr(m.double())[0] for m in (own, other))
            torch.testing.assert_close(torch.linalg.svdvals(left.t() @ right), torch.ones(4).double(), atol=1e-3, rtol=0)


def test_the_first_step_of_lora_ga_follows_full_fine_tuning() -> None:
    """What it is for: one gradient step changes W more along -dL/dW than the same step from the ordinary start."""
    cosines = {}
    for init in ("default", "lora_ga"):
        model, _ = started("llama", init, target="attn.q|v + mlp.down", init_batches=2, r=8)
        probe = language_probe(model, packing=False)
        before = {path: hook.product().detach() for path, hook in hooks_of(model).items()}
        sum(probe.loss(b) for b in probe.batches(2)).backward()  # type: ignore[union-attr]
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 1e-3 * p.grad
        full = gradients(tiny_model(), list(before), 2)
        moved = {path: hook.product().detach() - before[path] for path, hook in hooks_of(model).items()}
        flat = [torch.cat([side[path].double().flatten() for path in before]) for side in (moved, full)]
        cosines[init] = -float(nn.functional.cosine_similarity(*flat, dim=0))
    assert cosines["lora_ga"] > 0.8 > 0.6 > cosines["default"], cosines


def test_gradients_of_quantized_weights_are_those_of_the_dequantized_ones() -> None:
    model, _ = started("llama", "lora_ga", Nf4(name="nf4"), init_batches=2)
    plain = tiny_model()
    Stack([Nf4(name="nf4")]).attach(plain)
    from llmrecipe.methods._engines.quantized import dequantize_model

    start = plain(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, start, atol=5e-5, rtol=1e-4)
    dequantize_model(plain)
    for path, grad in gradients(plain, list(hooks_of(model)), 2).items():
        V = torch.linalg.svd(grad, full_matrices=False)[2]
        gain = grad.shape[0] ** 0.25 / 4.0
        inside = (hooks_of(model)[path].A.double() @ V[:4].t()).norm(dim=1) / gain
        torch.testing.assert_close(inside, torch.ones(4, dtype=torch.float64), atol=2e-3, rtol=0)


# --- all ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_rows_of_a_fused_layer_start_from_their_own_part(init: str) -> None:
    """q and v of a fused projection: decomposed on their rows, and step 0 is the base."""
    base = tiny_model("gpt2")
    model, _ = started("gpt2", init, target="attn.q|v", init_batches=2, eva_rho=1.0)
    found = [(path, name, hook) for path, _, name, hook in all_hooks(model)]
    assert len(found) == 4
    full = gradients(tiny_model("gpt2"), ["transformer.h.0.attn.c_attn"], 2)["transformer.h.0.attn.c_attn"]
    hook = model.transformer.h[0].attn.c_attn.lora__v
    if init == "lora_ga":
        V = torch.linalg.svd(full[64:], full_matrices=False)[2][:4]
        torch.testing.assert_close(
            (hook.A.double() @ V.t()).norm(dim=1), torch.full((4,), 32**0.25 / 4).double(), atol=2e-3, rtol=0
        )
    torch.testing.assert_close(model(input_ids=IDS).logits, base(input_ids=IDS).logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
@pytest.mark.parametrize("family", ["bert", "t5", "native-encoder_decoder"])
def test_encoders_and_pairs_start_at_their_base(init: str, family: str) -> None:
    from tests.methods.kinds import batch_of, put

    cell = put(model_of(family), Lora(name="lora", target="attn.q|v", r=2, init=init, init_batches=3))
    plain = put(model_of(family), Lora(name="lora", target="attn.q", r=1))
    batch = batch_of(cell.model)
    with torch.no_grad():
        torch.testing.assert_close(cell.loss(batch), plain.loss(batch), atol=5e-5, rtol=1e-4)


def test_padding_of_an_encoder_is_no_input_and_cross_attention_counts_what_the_encoder_read() -> None:
    from llmrecipe.engine.forward import Engine
    from llmrecipe.methods._base.stack import Stack as Stacked
    from llmrecipe.models.module_map import anatomy
    from tests.methods.kinds import ROWS, SOURCES, probe_of

    model = model_of("t5")
    Stacked([Lora(name="lora", target="attn.q + cross.q|k")]).attach(model)
    places = data_init.places_of(model, "lora")
    moments = data_init.inputs(model, places, probe_of(model, Engine(model).eval()), 1, None)
    roles = {s.path: (s.side, s.role) for s in anatomy(model).at("attn.q + cross.q|k")}
    read, written = sum(map(len, SOURCES)), sum(map(len, ROWS))
    counts = {roles[place.path]: moments[id(place.module)].count for place in places}
    assert counts == {
        ("encoder", "attn.q"): read,
        ("decoder", "attn.q"): written,
        ("decoder", "cross.q"): written,
        ("decoder", "cross.k"): read,
    }


@pytest.mark.parametrize(("init", "r", "most"), [("lora_ga", 9, 8), ("corda", 17, 16), ("eva", 33, 32), ("mica", 17, 16)])
def test_more_ranks_than_there_are_vectors_are_refused_before_weights_are_read(init: str, r: int, most: int) -> None:
    with torch.device("meta"):
        model = tiny_model("llama", scale=1.0)
    with pytest.raises(ModelError, match=rf"init: {init} takes its ranks from the weight, .* r can be {most} at most, got {r}"):
        Stack([Lora(name="lora", target="attn.v", r=r, init=init)]).attach(model)


REFUSED: list[tuple[str, str, Callable[[], nn.Module]]] = [
    ("experts", "a fused expert tensor", lambda: tiny_model("mixtral")),
    ("embed", "an embedding", tiny_model),
]


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_niter_2", "olora", "eva", "corda", "lora_ga", "loftq"])
@pytest.mark.parametrize(("target", "what", "make"), REFUSED)
def test_a_start_for_linear_layers_is_not_quietly_another_one_elsewhere(init: str, target: str, what: str, make: Any) -> None:
    with pytest.raises(ModelError, match=rf"init: {init} is a start for linear layers, and this is {what}; take {target}"):
        Stack([Lora(name="lora", target=target, init=init)]).attach(make())


def test_power_iterations_come_near_the_exact_pissa() -> None:
    exact, _ = started("llama", "pissa")
    near, _ = started("llama", "pissa_niter_16")
    for path, hook in hooks_of(near).items():
        weight, best = weight_of(near, path), hooks_of(exact)[path]
        left = [(weight - p.scale * (p.B @ p.A).double()).norm() for p in (hook, best)]
        assert left[1] <= left[0] < 1.001 * left[1], path
    torch.testing.assert_close(near(input_ids=IDS).logits, tiny_model()(input_ids=IDS).logits, atol=5e-5, rtol=1e-4)
