"""LoRA against peft: outputs, gradients and five AdamW steps; its start, its merge, its switch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines import initialization, low_rank
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.twins import IDS, side_by_side
from tests.tiny import tiny_model


def fill(model: nn.Module, seed: int = 3) -> None:
    """Random non-zero branches, so that every part of the formula shows."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, _, hook in all_hooks(model):
        for parameter in hook.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def adapted(family: str = "llama", **options: object) -> tuple[nn.Module, Stack]:
    model = tiny_model(family)
    stack = Stack([Lora(name="lora", **options)])
    stack.attach(model)
    return model, stack


def peft_twin(model: nn.Module, family: str, targets: list[str], **config: object) -> nn.Module:
    """The same base under peft with the same A and B."""
    from peft import LoraConfig, get_peft_model

    twin = get_peft_model(tiny_model(family), LoraConfig(target_modules=targets, **config))
    ours = {path: hook for path, _, _, hook in all_hooks(model)}
    for name, module in twin.base_model.model.named_modules():
        if hasattr(module, "lora_A") and name in ours:
            hook = ours[name]
            if "default" in module.lora_embedding_A:
                module.lora_embedding_A["default"].data = hook.A.data.clone()
                module.lora_embedding_B["default"].data = hook.B.data.clone()
            else:
                module.lora_A["default"].weight.data = hook.A.data.clone()
                module.lora_B["default"].weight.data = hook.B.data.clone()
                if hook.bias is not None:
                    module.lora_B["default"].bias.data = hook.bias.data.clone()
    return twin


CASES = [
    ("llama", "attn.q|v", ["q_proj", "v_proj"], {}),
    ("llama", "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], {}),
    ("llama", "attn.q", ["q_proj"], {"use_rslora": True}),
    ("gpt2", "attn.qkv", ["c_attn"], {}),
    ("llama", "embed", ["embed_tokens"], {}),
    (
        "llama",
        "attn.q|v",
        ["q_proj", "v_proj"],
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    ),
    ("gpt2", "attn.qkv", ["c_attn"], {"lora_bias": True}),
    ("llama", "attn.q|v", ["q_proj", "v_proj"], {"lora_bias": True, "use_rslora": True}),
]


@pytest.mark.parity("lora", "PEFT LoraConfig")
@pytest.mark.parametrize(("family", "target", "targets", "extra"), CASES)
def test_outputs_gradients_and_five_steps_equal_peft(family: str, target: str, targets: list[str], extra: dict) -> None:
    model, _ = adapted(family, target=target, r=4, alpha=6.0, **extra)
    fill(model)
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    twin = peft_twin(model, family, targets, r=4, lora_alpha=6, **fan, **extra)
    hooks = {path: hook for path, _, _, hook in all_hooks(model)}
    for losses in side_by_side((model, twin)):
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
        for name, module in twin.base_model.model.named_modules():
            if name in hooks and hasattr(module, "lora_A") and "default" in module.lora_A:
                torch.testing.assert_close(hooks[name].A.grad, module.lora_A["default"].weight.grad, atol=1e-6, rtol=1e-4)
                torch.testing.assert_close(hooks[name].B.grad, module.lora_B["default"].weight.grad, atol=1e-6, rtol=1e-4)
                if "lora_bias" in extra:
                    torch.testing.assert_close(hooks[name].bias.grad, module.lora_B["default"].bias.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parity("lora", "PEFT LoraConfig(target_parameters)")
def test_five_steps_on_fused_experts_equal_peft() -> None:
    """peft stacks A by experts and B by ranks; its steps on them are ours."""
    from peft import LoraConfig, get_peft_model

    model, _ = adapted("mixtral", target="experts", r=2, alpha=6.0)
    fill(model)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    twin = get_peft_model(tiny_model("mixtral"), LoraConfig(target_modules=[], target_parameters=names, r=2, lora_alpha=6))
    ours = {(path, hook.tensor): hook for path, _, _, hook in all_hooks(model)}
    theirs = {
        (n.replace(".base_layer", ""), m.parameter_name): m
        for n, m in twin.base_model.model.named_modules()
        if hasattr(m, "parameter_name")
    }
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for key, hook in ours.items():
        theirs[key].lora_A["default"].weight.data = hook.A.detach().reshape(-1, hook.A.shape[-1]).clone()
        theirs[key].lora_B["default"].weight.data = hook.B.detach().permute(1, 2, 0).reshape(hook.B.shape[1], -1).clone()
    for losses in side_by_side((model, twin)):
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
        for key, hook in ours.items():
            grad = theirs[key].lora_A["default"].weight.grad.view_as(hook.A)
            torch.testing.assert_close(hook.A.grad, grad, atol=1e-5, rtol=1e-3)
    assert losses[0] < 6.0 and all(p.grad is None for n, p in model.named_parameters() if ".lora" not in n), (
        "no buffers of the base"
    )


@pytest.mark.parity("lora", "autograd through both uses, float64")
def test_a_tied_pair_sums_the_gradients_of_both_uses_in_float64() -> None:
    """Against two pairs with equal values on an untied copy: dL/dA is that of the embedding's A plus that of the head's B."""
    tied = tiny_model(tie_word_embeddings=True)
    Stack([Lora(name="lora", target="embed + head", r=4, alpha=6.0)]).attach(tied)
    loose = tiny_model(tie_word_embeddings=True)
    loose.lm_head.weight = nn.Parameter(loose.lm_head.weight.detach().clone())
    loose.config.tie_word_embeddings = False
    Stack([Lora(name="lora", target="embed + head", r=4, alpha=6.0)]).attach(loose)
    fill(tied)
    pair, embed, head = tied.model.embed_tokens.lora, loose.model.embed_tokens.lora, loose.lm_head.lora
    embed.A.data, embed.B.data = pair.A.data.clone(), pair.B.data.clone()
    head.A.data, head.B.data = pair.B.data.t().clone(), pair.A.data.t().clone()
    for m in (tied, loose):
        m.double()
    (a, _), (b, _) = losses_and_gradients(tied), losses_and_gradients(loose)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    torch.testing.assert_close(pair.A.grad, embed.A.grad + head.B.grad.t(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(pair.B.grad, embed.B.grad + head.A.grad.t(), atol=1e-12, rtol=1e-9)


def losses_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=IDS).logits
    loss = nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parity("lora", "PEFT init_lora_weights")
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_start_from_the_weight_equals_peft(init: str) -> None:
    """The same A and B (singular vectors up to sign), the same loss and gradients, though peft rewrites W and we do not."""
    from peft import LoraConfig, get_peft_model

    model, _ = adapted(target="attn.q|v", r=4, alpha=6.0, init=init)
    twin = get_peft_model(
        tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6, init_lora_weights=init)
    )
    theirs = {n: m for n, m in twin.base_model.model.named_modules() if hasattr(m, "lora_A")}
    ours = {path: hook for path, _, _, hook in all_hooks(model)}
    assert set(ours) == set(theirs)
    signs = {}
    for name, hook in ours.items():
        A, B = theirs[name].lora_A["default"].weight, theirs[name].lora_B["default"].weight
        signs[name] = torch.sign((hook.A * A).sum(1))
        assert init == "pissa" or bool((signs[name] == 1).all())
        torch.testing.assert_close(hook.A, signs[name][:, None] * A, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(hook.B, signs[name] * B, atol=2e-5, rtol=1e-4)
    generator = torch.Generator().manual_seed(5)
    for name, hook in ours.items():  # away from the start, so that the subtracted first product shows
        for factor, layer, axis in ((hook.A, theirs[name].lora_A, 0), (hook.B, theirs[name].lora_B, 1)):
            step = torch.randn(factor.shape, generator=generator) * 0.1
            sign = signs[name][:, None] if axis == 0 else signs[name]
            factor.data += step
            layer["default"].weight.data += sign * step
    (loss, _), (wanted, _) = losses_and_gradients(model), losses_and_gradients(twin)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    for name, hook in ours.items():
        torch.testing.assert_close(
            hook.A.grad, signs[name][:, None] * theirs[name].lora_A["default"].weight.grad, atol=2e-5, rtol=1e-3
        )
        torch.testing.assert_close(hook.B.grad, signs[name] * theirs[name].lora_B["default"].weight.grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_olora_takes_the_leading_part_of_q_r_of_the_rows_it_stands_on(family: str) -> None:
    """Also where the weight is stored transposed or holds several projections; the base's weight stays bit for bit."""
    model, _ = adapted(family, target="attn.q|v", r=4, init="olora")
    untouched = dict(tiny_model(family).named_parameters())
    for path, module, _, hook in all_hooks(model):
        assert torch.equal(module.weight, untouched[f"{path}.weight"])
        weight = (module.weight.t() if family == "gpt2" else module.weight)[hook.rows]
        assert hook.rows.numel() == weight.shape[0] == 32
        torch.testing.assert_close(hook.B.t() @ hook.B, torch.eye(4), atol=1e-5, rtol=0)
        # The first r columns of Q span the first r columns of W, and A is W seen from that span.
        torch.testing.assert_close(hook.B @ hook.A[:, :4], weight[:, :4], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(hook.A, hook.B.t() @ weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_more_ranks_than_the_weight_has_are_refused(init: str) -> None:
    with pytest.raises(
        ModelError, match=rf"init: {init} takes its ranks from the weight, which is 16 x 32: r can be 16 at most"
    ):
        adapted(target="attn.v", r=20, init=init)


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_a_quantized_weight_has_no_decomposition_to_start_from(init: str) -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=f"init: {init} starts from a decomposition of the weight; it needs one that is not"):
        initialization.init_hook(low_rank.LowRank(8, 8, 2, 1.0), init, layer)


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica"])
@pytest.mark.parametrize("target", ["attn.q|v", "all-linear", "embed", "embed + head"])
def test_starts_at_the_base_model(init: str, target: str) -> None:
    if "embed" in target and init not in ("default", "gaussian", "mica"):
        with pytest.raises(ModelError, match=rf"embed_tokens: init: {init} is a start for linear layers, and this is an embed"):
            adapted(target=target, init=init)
        return
    base = tiny_model()(input_ids=IDS).logits
    model, _ = adapted(target=target, init=init)
    torch.testing.assert_close(model(input_ids=IDS).logits, base, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "all-linear"),
        ("gpt2", "attn.q|v"),
        ("gpt_neox", "attn.q|v"),
        ("phi3", "attn.q|v"),
        ("llama", "embed"),
        ("mixtral", "experts"),
    ],
)
def test_merging_gives_the_same_logits(family: str, target: str) -> None:
    model, stack = adapted(family, target=target)
    fill(model)
    unmerged = model(input_ids=IDS).logits
    next(iter(stack)).merge(model)
    assert not list(all_hooks(model))
    torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=2e-5, rtol=1e-4)


def test_a_branch_bias_starts_at_the_base_bit_for_bit_and_is_counted() -> None:
    base = tiny_model()(input_ids=IDS).logits
    model, stack = adapted(target="attn.q|v", r=4, lora_bias=True, lr_ratio=4.0)
    assert torch.equal(model(input_ids=IDS).logits, base)
    names = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")}
    assert len(names) == 4
    assert next(iter(stack)).memory(model)["trainable"] == 2 * (4 * ((32 + 32) + (32 + 16)) + 32 + 16)
    (group,) = next(iter(stack)).groups(model)
    assert names < group.names and group.lr_scale == 4.0 and len(group.names) == 8


@pytest.mark.parametrize(("family", "target"), [("gpt2", "attn.q|v + mlp.up"), ("llama", "attn.q|v + mlp.down")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_bias_merges_into_the_bias_of_its_host(family: str, target: str, dtype: torch.dtype) -> None:
    """b + s b_B, from zero where the host has none and the config can say it has one."""
    before = tiny_model(family).to(dtype)
    old = {path: m.bias.detach().clone() for path, m in before.named_modules() if getattr(m, "bias", None) is not None}
    model = tiny_model(family).to(dtype)
    stack = Stack([Lora(name="lora", target=target, r=4, alpha=6.0, lora_bias=True)])
    stack.attach(model)
    fill(model)
    unmerged = model(input_ids=IDS).logits
    wanted: dict[str, torch.Tensor] = {}
    for path, module, _, hook in all_hooks(model):
        width = hook.bias.numel() if hook.rows is None else module.bias.numel()
        rows = torch.arange(width) if hook.rows is None else hook.rows
        start = wanted.get(path, old.get(path, torch.zeros(width)).float())
        wanted[path] = start.index_add(0, rows, 1.5 * hook.bias.detach())
    next(iter(stack)).merge(model)
    assert not list(all_hooks(model))
    for path, bias in wanted.items():
        assert torch.equal(model.get_submodule(path).bias, bias.to(dtype)), path
    if family == "llama":
        assert model.config.attention_bias is True and model.config.mlp_bias is True
        assert not model.model.layers[0].self_attn.o_proj.bias.any()
    if dtype == torch.float32:
        torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=2e-5, rtol=1e-4)


def test_a_branch_bias_is_refused_where_it_has_no_place() -> None:
    for family, target, path in (("llama", "embed", "model.embed_tokens"), ("mixtral", "experts", "experts")):
        with pytest.raises(ModelError, match=rf"{path}: a bias in the branch \(lora_bias\) needs a linear layer"):
            adapted(family, target=target, lora_bias=True)
    model, stack = adapted("mixtral", target="attn.q", lora_bias=True)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(
        ModelError, match=r"stack.lora: mixtral has no config flag for a bias at model.layers.0.self_attn.q_proj"
    ):
        next(iter(stack)).merge(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)


def test_merging_one_side_of_a_tied_pair_is_refused_and_both_sides_merge() -> None:
    model = tiny_model(tie_word_embeddings=True)
    stack = Stack([Lora(name="lora", target="head")])
    stack.attach(model)
    with pytest.raises(ModelError, match="shares its weight"):
        next(iter(stack)).merge(model)
    model = tiny_model(tie_word_embeddings=True)
    stack = Stack([Lora(name="lora", target="embed + head")])
    stack.attach(model)
    fill(model)
    pairs = [p for p in model.parameters() if p.requires_grad]
    assert len(pairs) == 2
    unmerged = model(input_ids=IDS).logits
    next(iter(stack)).merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=2e-5, rtol=1e-4)


def test_switched_off_the_base_is_back_bit_for_bit_and_copies_keep_their_own_branch() -> None:
    base = tiny_model()(input_ids=IDS).logits
    model, _ = adapted()
    fill(model)
    changed = model(input_ids=IDS).logits
    assert not torch.equal(changed, base)
    with activate(Context(role="reference")):
        assert torch.equal(model(input_ids=IDS).logits, base)
    twin = copy.deepcopy(model)
    fill(twin, seed=11)
    assert torch.equal(model(input_ids=IDS).logits, changed)
    assert not torch.equal(twin(input_ids=IDS).logits, changed)


def test_fused_rows_equal_separate_projections() -> None:
    """A branch on q and v of a fused layer changes exactly those rows of its output."""
    model, _ = adapted("gpt2", target="attn.q|v")
    fill(model)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(3, 32)
    with activate(Context(role="reference")):
        plain = layer(x)
    difference = (layer(x) - plain).abs().sum(0)
    assert bool((difference[:32] > 0).all())
    assert bool((difference[32:64] == 0).all())
    assert bool((difference[64:] > 0).all())


def test_expert_branches_equal_a_loop_over_experts() -> None:
    model, _ = adapted("mixtral", target="experts")
    fill(model)
    _, module, _, hook = next(iter(all_hooks(model)))
    weight = getattr(module, hook.tensor)
    changed = hook.weight(weight)
    for e in range(weight.shape[0]):
        torch.testing.assert_close(changed[e], weight[e] + hook.scale * hook.B[e] @ hook.A[e], atol=1e-6, rtol=1e-5)


def test_counts_follow_the_formula() -> None:
    model, stack = adapted(target="attn.q|v", r=4)
    # q: 32 -> 32, v: 32 -> 16 (two of four heads are key/value heads), two layers
    wanted = 2 * 4 * ((32 + 32) + (32 + 16))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted
    assert next(iter(stack)).memory(model)["trainable"] == wanted


def test_patterns_choose_rank_and_scale_and_two_that_tie_are_refused() -> None:
    model, _ = adapted(target="attn.q|v", r=4, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 4.0})
    ranks = {path: (hook.A.shape[0], hook.scale) for path, _, _, hook in all_hooks(model)}
    assert ranks["model.layers.1.self_attn.q_proj"] == (2, 8.0)
    assert ranks["model.layers.0.self_attn.q_proj"] == (4, 4.0)
    assert ranks["model.layers.0.self_attn.v_proj"] == (4, 1.0)
    with pytest.raises(RecipeError, match="both"):
        adapted(target="attn.q", rank_pattern={"q_proj": 2, "q_pro.": 3})


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model, _ = adapted(target="all-linear")
        fill(model)
        model.train()
        if checkpointing:
            from llmrecipe.core.forward_context import checkpoint_contexts

            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])
