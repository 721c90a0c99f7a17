"""LoRA-FA: parity with PEFT, its optimizer's correction, what the backward pass keeps, dropout, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import UserError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.memory._engines.frozen_down import FrozenDown, drawn_mask
from llmrecipe.methods.memory.lora_fa import LoraFa
from llmrecipe.methods.memory.mezo import Mezo
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.training.memory_estimate import activation_elements, retained_bytes, saved_bytes
from tests.interop.saved_runs import base_folder, saved_run
from tests.methods.additive.harness import attached, fill
from tests.methods.twins import next_token_loss, side_by_side
from tests.tiny import tiny_model
from tests.trainings import learned, resumes_to_the_bit

N, IN, OUT, R = 128, 512, 512, 8


def branch(dropout: float = 0.0, side: str = "rank", rows: Tensor | None = None, out: int = OUT) -> FrozenDown:
    torch.manual_seed(0)
    hook = FrozenDown(IN, out, R, 2.0, dropout, rows, side=side)
    nn.init.normal_(hook.A, std=0.05)
    nn.init.normal_(hook.B, std=0.05)
    hook.A.requires_grad_(False)
    return hook


@pytest.mark.parity("lora_fa", "formula, float64")
@pytest.mark.parametrize("rows", [None, [4, 0, 2]])
@pytest.mark.parametrize(("dropout", "side"), [(0.0, "rank"), (0.3, "rank"), (0.3, "input")])
def test_output_and_gradients_are_those_of_autograd_on_the_formula(
    dropout: float, side: str, rows: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same mask, drawn from the seed that torch's generator gave."""
    index = None if rows is None else torch.tensor(rows)
    hook = branch(dropout, side, index, 3 if rows else OUT).double()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, OUT, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    got = hook.after(x, y)
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    dropped = x * drawn_mask(x, dropout, seed) if dropout and side == "input" else x
    u = (dropped @ hook.A.t()).flatten(0, 1)
    if dropout and side == "rank":
        u = u * drawn_mask(u, dropout, seed)
    change = 2.0 * (u @ hook.B.t()).view(2, 5, -1)
    wanted = y + change if index is None else y.index_add(-1, index, change)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    weights = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad((o * weights).sum(), (x, y, hook.B)) for o in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_a_mask_keeps_one_minus_the_rate_and_the_mean() -> None:
    mask = drawn_mask(torch.zeros(200, 500), 0.3, seed=11)
    assert float((mask == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(mask, drawn_mask(torch.zeros(200, 500), 0.3, seed=11))
    assert not torch.equal(mask, drawn_mask(torch.zeros(200, 500), 0.3, seed=12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dropout", "side"), [(0.0, "rank"), (0.1, "rank"), (0.1, "input")])
def test_a_layer_keeps_n_r_numbers_for_the_backward_pass(dropout: float, side: str, dtype: torch.dtype) -> None:
    """4,096 bytes in float32; LoRA keeps 266,240 of the same layer."""
    host = nn.Linear(IN, OUT, bias=False).to(dtype).requires_grad_(False)
    hook, x = branch(dropout, side), torch.randn(N, IN, dtype=dtype)
    loss, saved = saved_bytes(lambda: hook.after(x, host(x)), [host.weight, hook.A, hook.B])
    assert saved == retained_bytes(loss, [host.weight, hook.A, hook.B]) == N * R * dtype.itemsize
    other = Lora(name="lora")
    assert other.r == R
    from llmrecipe.methods._engines.low_rank import LowRank

    full = LowRank(IN, OUT, R, 2.0)
    torch.nn.init.normal_(full.A)
    torch.nn.init.normal_(full.B)
    if dtype is torch.float32:
        _, saved = saved_bytes(lambda: full.after(x, host(x)), [host.weight, full.A, full.B])
        assert saved == 4 * N * (IN + R) == 266_240


def kept(model: nn.Module) -> int:
    there = [*model.parameters(), *model.buffers()]
    ids = torch.arange(3, 43).view(2, 20)
    loss, saved = saved_bytes(lambda: model(input_ids=ids, use_cache=False).logits.square().mean(), there)
    return max(saved, retained_bytes(loss, there))


@pytest.mark.parametrize(("attention", "extra"), [("sdpa", 0), ("eager", 32)])
@pytest.mark.parametrize("target", ["attn.q", "attn.q|k|v", "mlp.gate|up", "mlp.down", "attn.q|o", "all-linear"])
def test_a_llama_frees_the_closed_form_less_than_lora(target: str, attention: str, extra: int) -> None:
    """Numbers a token and block: d once for q, k and v, d once for gate and up, I for down, d for o under eager attention."""
    from llmrecipe.models.attention import install_attention

    d, wide, layers, tokens = 32, 48, 2, 40
    freed = {
        "attn.q": d,
        "attn.q|k|v": d,
        "mlp.gate|up": d,
        "mlp.down": wide,
        "attn.q|o": d + extra,
        "all-linear": 2 * d + wide + extra,
    }
    sizes = []
    for kind in (Lora, LoraFa):
        model = tiny_model()
        install_attention(model, attention)
        Stack([kind(name="w", target=target, r=4)]).attach(model)
        sizes.append(kept(model))
    assert sizes[0] - sizes[1] == layers * tokens * 4 * freed[target]


def test_the_estimate_knows_that_inputs_are_not_kept() -> None:
    d, wide, r = 32, 48, 4
    counts = []
    for kind in (Lora, LoraFa):
        model, _ = attached("llama", kind(name="w", target="all-linear", r=r))
        counts.append(activation_elements(model, 1))
    assert counts[0] - counts[1] == 2 * (3 * d + wide)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_on_nf4_it_frees_as_much(dropout: float) -> None:
    ids = torch.arange(3, 43).view(2, 20)
    sizes = []
    for kind, side in ((Lora, None), (LoraFa, "rank")):
        options = {"dropout": dropout, "dropout_on": side} if side else {}
        model, _ = attached("llama", Nf4(name="nf4"), kind(name="w", target="all-linear", r=4, **options))
        model.train()
        there = [*model.parameters(), *model.buffers()]
        _, saved = saved_bytes(lambda m=model: m(input_ids=ids, use_cache=False).logits.square().mean(), there)
        sizes.append(saved)
    # 4-bit kernels keep the input's dtype twin of nothing: what goes is what goes on a plain base.
    assert sizes[0] - sizes[1] == 2 * 40 * 4 * (2 * 32 + 48)


def with_peft(**options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM", **options)
    return get_peft_model(tiny_model(), config)


def twins(**options: Any) -> tuple[nn.Module, nn.Module, list[tuple[FrozenDown, Any]]]:
    model, _ = attached("llama", LoraFa(name="w", target="attn.q|v + mlp.down", r=4, alpha=6.0, **options))
    theirs = with_peft(use_rslora=options.get("use_rslora", False))
    fill(model)
    own = {path: hook for path, _, _, hook in all_hooks(model) if isinstance(hook, FrozenDown)}
    pairs = []
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            hook = own[name.removeprefix("base_model.model.")]
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            A.data.copy_(hook.A.data)
            B.data.copy_(hook.B.data)
            A.requires_grad_(False)
            pairs.append((hook, module))
    return model, theirs, pairs


@pytest.mark.parity("lora_fa", "PEFT LoraConfig with A frozen")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_losses_and_gradients_of_five_steps_equal_peft(use_rslora: bool) -> None:
    model, theirs, pairs = twins(use_rslora=use_rslora)
    before = [hook.A.detach().clone() for hook, _ in pairs]
    for ours, other in side_by_side((model, theirs)):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-6)
        for hook, module in pairs:
            torch.testing.assert_close(hook.B.grad, module.lora_B["default"].weight.grad, atol=2e-6, rtol=1e-4)
    assert len(pairs) == 6 and all(torch.equal(A, hook.A) for A, (hook, _) in zip(before, pairs, strict=True))


@pytest.mark.parity("lora_fa", "PEFT LoraFAOptimizer")
def test_corrected_steps_follow_pefts_optimizer() -> None:
    """Its product runs in bfloat16, hence 1 %; the same formula in float32 is met to rounding."""
    from peft.optimizers import create_lorafa_optimizer

    model, theirs, pairs = twins(grad_correction="projection")
    stack = Stack([LoraFa(name="w", grad_correction="projection")])
    rate, eps, (beta1, beta2) = 1e-3, 1e-6, (0.9, 0.999)
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=rate)
    m = [torch.zeros_like(hook.B) for hook, _ in pairs]
    v = [torch.zeros_like(hook.B) for hook, _ in pairs]
    for step in range(1, 4):
        for each in (model, theirs):
            next_token_loss(each).backward()
        raw = [hook.B.grad.clone() for hook, _ in pairs]
        stack.after_backward(model, step)
        optimizer.step()
        for i, (hook, module) in enumerate(pairs):
            s, A = 6.0 / 4, hook.A.detach()
            corrected = raw[i] @ torch.linalg.inv(A @ A.t() + 1e-8 * torch.eye(4)) / s**2
            torch.testing.assert_close(hook.B.grad, corrected, atol=1e-6 * float(corrected.abs().max()), rtol=1e-4)
            m[i] = beta1 * m[i] + (1 - beta1) * hook.B.grad
            v[i] = beta2 * v[i] + (1 - beta2) * hook.B.grad**2
            size = rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)
            start = hook.B.detach().clone()
            moved = start - size * m[i] / (v[i].sqrt() + eps)
            other = module.lora_B["default"].weight
            drift = (other - moved).norm() / (moved - start).norm()
            assert float(drift.detach()) < (0.02 if step == 1 else 0.05)
            other.data.copy_(moved)
            hook.B.data.copy_(moved)
        for each in (model, theirs):
            each.zero_grad()


def test_a_corrected_step_moves_the_weight_along_its_projected_gradient() -> None:
    """One step of plain descent: Delta (s B A) = - rate * G_W A^T (A A^T)^-1 A."""
    model, stack = attached("llama", LoraFa(name="w", target="attn.q", r=4, grad_correction="projection"))
    host = model.model.layers[0].self_attn.q_proj
    host.weight.requires_grad_(True)
    next_token_loss(model).backward()
    G, hook = host.weight.grad, host.w
    stack.after_backward(model, 0)
    A = hook.A.detach()
    wanted = -0.1 * G @ A.t() @ torch.linalg.inv(A @ A.t()) @ A
    got = hook.scale * (-0.1 * hook.B.grad) @ A
    torch.testing.assert_close(got, wanted, atol=1e-6 * float(wanted.abs().max()) + 1e-7, rtol=1e-4)


def test_orthonormal_rows_have_the_size_of_the_default_and_a_scalar_correction() -> None:
    model, _ = attached("llama", LoraFa(name="w", target="attn.q", r=4, init="orthonormal"))
    hook = model.model.layers[0].self_attn.q_proj.w
    torch.testing.assert_close(hook.A @ hook.A.t(), torch.eye(4) / 3, atol=1e-6, rtol=0)
    assert float(hook.A.square().mean().sqrt()) == pytest.approx(1 / math.sqrt(3 * 32), rel=1e-5)
    torch.testing.assert_close(hook.correction(), torch.eye(4) * 3 / hook.scale**2, atol=1e-5, rtol=0)
    gaussian, _ = attached("llama", LoraFa(name="w", target="all-linear", r=8, init="gaussian"))
    values = torch.cat([h.A.flatten() for _, _, _, h in all_hooks(gaussian) if isinstance(h, FrozenDown)])
    assert float(values.std()) == pytest.approx(1 / 8, rel=0.05)


def test_a_replayed_block_draws_the_same_mask() -> None:
    """With gradient checkpointing the recomputed forward pass sees the dropout of the first one."""
    from llmrecipe.core.forward_context import checkpoint_contexts

    grads = []
    for checkpointing in (False, True):
        model, _ = attached("llama", LoraFa(name="w", r=4, dropout=0.4))
        fill(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        torch.manual_seed(3)
        next_token_loss(model).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) and bool(a.any()) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"target": "embed"}, "no linear layer; use lora here"),
        ("mixtral", {"target": "experts"}, "no linear layer; use lora here"),
        ("llama", {"target": "attn.q", "r": 33, "init": "orthonormal"}, "33 orthonormal rows"),
    ],
)
def test_what_cannot_be_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attached(family, LoraFa(name="w", **options))


def test_the_correction_and_a_rule_without_gradients_exclude_each_other() -> None:
    Stack([LoraFa(name="w"), Mezo(name="mezo")])
    with pytest.raises(UserError, match=r"stack\.w\.grad_correction"):
        Stack([LoraFa(name="w", grad_correction="projection"), Mezo(name="mezo")])


def test_peft_loads_the_folder_with_a_in_it(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmrecipe.interop.peft.exporter import export_peft

    base = base_folder(tmp_path)
    model = saved_run(tmp_path / "run", base, LoraFa(name="w", r=4))
    ids = torch.tensor([[5, 9, 3, 60, 7, 7, 2]])
    done = export_peft(tmp_path / "run")
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), done.path).eval()
    torch.testing.assert_close(
        twin(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5 * done.difference.scale, rtol=1e-5
    )


@pytest.mark.slow
def test_a_resumed_run_with_dropout_is_the_whole_run(tmp_path: Path) -> None:
    words = ["steps=6", "epochs=null", "batch.size=4", "stack.lora_fa.dropout=0.2", "eval.at_start=false", "save.every=3"]
    resumes_to_the_bit(tmp_path, "lora_fa", words, 4)
    assert {n.rpartition(".")[2] for n in learned(tmp_path / "whole")} == {"A", "B"}
