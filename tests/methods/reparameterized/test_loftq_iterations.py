"""loftq with several iterations: peft's alternation on the same weight; a base left alone; saved, mounted, folded, refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.loftq_codes import Requantized, stored_weight
from llmrecipe.methods._engines.quantized import dequantize_model, quantized
from llmrecipe.methods.memory.int8 import Int8
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.runs import delta
from llmrecipe.runs.open_model import LoadedModel, merge_order
from llmrecipe.training.memory_estimate import delta_bytes, weight_bytes
from tests.interop.saved_runs import base_folder, saved_run
from tests.methods.reparameterized.test_lora import fill
from tests.methods.reparameterized.test_lora_init import started, weight_of
from tests.methods.twins import IDS
from tests.tiny import tiny_model


def begun(family: str = "llama", iterations: int = 3, *more: Any, **options: Any) -> tuple[nn.Module, Stack]:
    return started(family, "loftq", *(more or (Nf4(name="nf4"),)), loftq_iter=iterations, **options)


def codes_of(model: nn.Module) -> dict[str, tuple[nn.Module, Requantized]]:
    return {path: (m, hook) for path, m, _, hook in all_hooks(model) if isinstance(hook, Requantized)}


def on_cpu() -> Any:
    """peft's own loop, which names a GPU."""
    from peft.utils import loftq_utils

    source = inspect.getsource(loftq_utils.loftq_init)
    elsewhere = source.replace('"xpu" if is_xpu_available() else "cuda"', '"cpu"')
    assert elsewhere != source
    names = dict(vars(loftq_utils))
    exec(elsewhere, names)
    return names["loftq_init"]


@pytest.mark.parity("lora", "PEFT loftq_init, several iterations")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("iterations", [2, 5])
def test_codes_and_branch_are_those_of_pefts_alternation(family: str, iterations: int) -> None:
    loftq_init = on_cpu()
    model, _ = begun(family, iterations, Nf4(name="nf4", double=False))
    original = tiny_model(family)
    found = codes_of(model)
    assert found
    for path, (module, codes) in found.items():
        dense, A, B = loftq_init(weight_of(original, path).float(), 4, 4, iterations)
        torch.testing.assert_close(codes.dense(), dense, atol=1e-5, rtol=1e-4, msg=path)
        wanted = B @ A
        torch.testing.assert_close(module.lora.product(), wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0, msg=path)


@pytest.mark.parametrize("below", [Nf4(name="nf4"), Nf4(name="nf4", type="fp4"), Nf4(name="nf4", double=False, type="fp4")])
def test_in_every_format_the_codes_are_the_librarys_own_for_what_the_branch_leaves(below: Nf4) -> None:
    """The same alternation, written with the library's layer."""
    import bitsandbytes as bnb

    model, _ = begun("llama", 3, below)
    original = tiny_model()
    for path, (module, codes) in codes_of(model).items():
        W = weight_of(original, path).float()
        left = W
        for _ in range(3):
            stored = bnb.nn.Params4bit(
                left.contiguous(), requires_grad=False, compress_statistics=below.double, quant_type=below.type
            ).to("cpu")
            dense = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
            U, S, V = torch.linalg.svd(W - dense, full_matrices=False)
            branch = (U[:, :4] * S[:4]) @ V[:4]
            left = W - branch
        torch.testing.assert_close(codes.dense(), dense, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(module.lora.product(), branch, atol=1e-3 * float(branch.abs().max()), rtol=0)
        x = torch.randn(3, W.shape[1])
        torch.testing.assert_close(module(x), x @ (codes.dense() + module.lora.product()).t(), atol=1e-4, rtol=1e-4)


def lost(model: nn.Module) -> Tensor:
    """|| W - W_hat - s B A || of every adapted layer."""
    original = tiny_model()
    hooks = [(path, m) for path, m, name, _ in all_hooks(model) if name == "lora"]
    return torch.stack(
        [(weight_of(original, p) - stored_weight(m).double() - m.lora.product().double()).norm() for p, m in hooks]
    )


def test_further_iterations_lose_less_of_the_weight() -> None:
    once, _ = started("llama", "loftq", Nf4(name="nf4"))
    again, _ = begun("llama", 5)
    assert bool((lost(again) < lost(once)).all()), (lost(once), lost(again))


def test_one_iteration_has_no_codes_of_its_own_and_the_base_is_back_when_the_method_steps_aside() -> None:
    once, _ = started("llama", "loftq", Nf4(name="nf4"))
    assert not codes_of(once)
    plain = tiny_model()
    Stack([Nf4(name="nf4")]).attach(plain)
    model, _ = begun()
    stored = {path: module.weight.detach().clone() for path, module in quantized(plain)}
    assert all(torch.equal(module.weight, stored[path]) for path, module in quantized(model)) and stored
    wanted = plain(input_ids=IDS).logits
    assert not torch.equal(model(input_ids=IDS).logits, wanted)
    with activate(Context(off=frozenset({"lora"}))):
        assert torch.equal(model(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_bfloat16_base_starts_where_a_float32_one_of_the_same_numbers_does(iterations: int) -> None:
    def numbers(dtype: torch.dtype) -> nn.Module:
        return tiny_model().to(torch.bfloat16).to(dtype)

    products = []
    for dtype in (torch.float32, torch.bfloat16):
        model = numbers(dtype)
        stack = Stack(
            [Nf4(name="nf4"), Lora(name="lora", target="attn.q|v + mlp.down", r=4, init="loftq", loftq_iter=iterations)]
        )
        stack.attach(model)
        stack.calibrate(model, Probe(None, None, original=lambda dtype=dtype: numbers(dtype)))
        products.append({path: m.lora.product() for path, m, name, _ in all_hooks(model) if name == "lora"})
    assert products[0]
    for path, wanted in products[0].items():
        torch.testing.assert_close(products[1][path], wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0, msg=path)


def test_branches_of_a_fused_layer_share_its_codes() -> None:
    model, _ = begun("gpt2", 2, Nf4(name="nf4", double=False), target="attn.q|v")
    original = tiny_model("gpt2")
    found = codes_of(model)
    assert len(found) == 2
    for path, (module, codes) in found.items():
        W = weight_of(original, path)
        left = W - codes.dense().double()
        for hook in (module.lora__q, module.lora__v):
            U, S, V = torch.linalg.svd(left[hook.rows], full_matrices=False)
            best = (U[:, :4] * S[:4]) @ V[:4]
            torch.testing.assert_close(hook.product().double(), best, atol=1e-4 * float(best.abs().max()), rtol=0)
        # k's rows have no branch, so their codes are the base's.
        same = codes.codes.view(96, 16) == module.weight.data.view(96, 16)
        assert bool(same[32:64].all()) and not same[:32].all() and not same[64:].all()


def mounted_on_a_fresh_base(model: nn.Module, stack: Stack) -> tuple[nn.Module, list[Any]]:
    lora = next(w for w in stack if w.name == "lora")
    own = {n: v for n, v in stack.delta(model).items() if ".lora" in n}
    again = tiny_model()
    Stack([Nf4(name="nf4")]).attach(again)
    layer = delta.Layer({"lora": delta.wrapper_mapping(lora)}, {}, tensors={n: v.clone() for n, v in own.items()})
    return again, list(delta.mount_layer(again, layer, 0))


def test_saved_and_mounted_on_the_base_it_is_the_same_model_and_below_dora_its_weight() -> None:
    model, stack = begun()
    fill(model)
    again, mounted = mounted_on_a_fresh_base(model, stack)
    wanted = model(input_ids=IDS).logits
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    dora = Stack([Dora(name="dora", target="attn.q|v", r=2)])
    dora.attach(again)
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    layer = again.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.dora.magnitude, layer.mounted0_lora__codes.dense().norm(dim=1), atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for _, _, _, hook in all_hooks(again, "dora"):
            hook.B.normal_(std=0.05)
            hook.magnitude *= 1.1
    unmerged = again(input_ids=IDS).logits
    with activate(Context(role="reference")):
        assert torch.equal(again(input_ids=IDS).logits, wanted)
    dequantize_model(again)
    torch.testing.assert_close(again(input_ids=IDS).logits, unmerged, atol=2e-4, rtol=1e-3)
    loaded = LoadedModel(again, None, None, mounted=[*mounted, *dora.wrappers])  # type: ignore[arg-type]
    for wrapper in merge_order(loaded):
        wrapper.merge(again)
    assert not list(all_hooks(again))
    torch.testing.assert_close(again(input_ids=IDS).logits, unmerged, atol=2e-4, rtol=1e-3)


def test_gradients_on_the_codes_are_those_on_their_weight_and_merging_by_the_wrapper_alone_gives_it() -> None:
    model, stack = begun()
    grads = []
    for _ in range(2):
        model.zero_grad()
        nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:]).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        dequantize_model(model)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=2e-5, rtol=1e-3)
    wanted = model(input_ids=IDS).logits
    stack.wrappers[-1].merge(model)
    assert not list(all_hooks(model))
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_what_they_weigh_is_known_before_weights_are_read() -> None:
    wrappers = [Nf4(name="nf4"), Lora(name="lora", init="loftq", loftq_iter=2)]
    model, stack = begun("llama", 2, target="attn.q|v", r=8, alpha=16.0)
    with torch.device("meta"):
        bare = tiny_model(scale=1.0)
    planned = Stack(wrappers)
    planned.attach(bare)
    assert weight_bytes(bare, planned) == weight_bytes(model, stack)
    assert delta_bytes(bare, planned) == delta_bytes(model, stack)
    # q is 32 x 32 and v 16 x 32: half a byte a weight; a byte a block of 64, two float32 for all of them.
    sizes = [sum(b.nbytes for b in hook.buffers()) for _, hook in codes_of(model).values()]
    assert sorted(sizes) == [256 + 8 + 8] * 2 + [512 + 16 + 8] * 2


def test_a_change_of_dtype_leaves_the_scales_alone() -> None:
    model, _ = begun()
    before = {path: hook.dense() for path, (_, hook) in codes_of(model).items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(hook.dense(torch.float32), before[path]) for path, (_, hook) in codes_of(model).items())


def test_what_cannot_have_other_codes_is_refused_with_the_way_out(tmp_path: Path) -> None:
    from llmrecipe.interop.peft.exporter import export_peft

    with pytest.raises(
        ModelError, match=r"stack.lora.loftq_iter: .*q_proj is not in 4 bits; only codes of nf4 can be chosen again"
    ):
        begun("llama", 2, Int8(name="int8"))
    with pytest.raises(RecipeError, match=r"stack.lora.loftq_iter: it is an option of init: loftq, and init is eva"):
        Stack([Lora(name="lora", init="eva", loftq_iter=2)]).attach(tiny_model())
    for order in ([Dora(name="dora", target="attn.q")], [Dora(name="dora", target="mlp.down")]):
        with pytest.raises(
            ModelError, match=r"stack.lora.loftq_iter: it chooses other codes for .*, and stack.dora takes its start"
        ):
            begun("llama", 2, Nf4(name="nf4"), *order)
    wrappers = [Nf4(name="nf4"), Lora(name="lora", init="loftq", loftq_iter=2)]
    saved_run(tmp_path / "run", base_folder(tmp_path), *wrappers)
    with pytest.raises(ModelError, match=r"'lora' stands on 4-bit codes chosen together with it \(loftq_iter\).*--to merged"):
        export_peft(tmp_path / "run")
    assert not (tmp_path / "run" / "peft").exists()
