"""MAM: a prefix in attention and a scaled adapter parallel to the feed-forward, against the formulas written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods.additive.parallel_adapter import ParallelAdapter
from llmrecipe.methods.hybrid.mam import Mam
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.additive.harness import base_logits, fill, logits
from tests.methods.hybrid.written import on, stands_for, trains_alike

SMALL = {"num_virtual_tokens": 3, "hidden": 6, "r": 5}
IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2], [8, 1, 44, 12, 30, 6, 21]])


def parts_text(attention: str, more: str = "") -> str:
    """The stack of SMALL, by hand."""
    return f"""
mam_prefix_tuning: {{kind: prefix_tuning, {attention}num_virtual_tokens: 3, hidden: 6}}
mam_parallel_adapter: {{kind: parallel_adapter, r: 5{more}}}
"""


@pytest.mark.parametrize(("family", "attention"), [("llama", ""), ("bert", ""), ("t5", "target: attn + cross, ")])
def test_it_is_the_stack_it_prints(family: str, attention: str) -> None:
    stands_for(family, Mam(name="mam", **SMALL), parts_text(attention))
    stands_for(
        family, Mam(name="mam", scale=2.0, input="residual", **SMALL), parts_text(attention, ", scale: 2.0, input: residual")
    )


def test_a_run_of_it_is_a_run_of_that_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
mam_prefix_tuning: {kind: prefix_tuning, num_virtual_tokens: 16, hidden: 256}
mam_parallel_adapter: {kind: parallel_adapter, r: 16, scale: 2.0}
"""
    trains_alike(tmp_path, "mam", text, capsys=capsys)


def columns(model: nn.Module, layer: int, heads: int) -> tuple[Tensor, Tensor]:
    """P_K and P_V (g, P, e) of a layer: tanh MLP of the small table, cut layer by layer."""
    table = next(p for _, _, _, p in all_hooks(model, "mam_prefix_tuning") if hasattr(p, "tables")).tables["attn"]
    made = table.outer.weight @ torch.tanh(table.inner.weight @ table.small.T + table.inner.bias[:, None])
    made = (made + table.outer.bias[:, None]).T
    width = made.shape[1] // 2
    return tuple(half.view(3, heads, -1).transpose(0, 1) for half in made[:, layer * width : (layer + 1) * width].chunk(2, 1))


def attended(q: Tensor, k: Tensor, v: Tensor, p: tuple[Tensor, Tensor], causal: bool) -> Tensor:
    """softmax(q [P_K; k]^T / sqrt(e) + mask) [P_V; v], head by head, (H, T, e)."""
    group = q.shape[0] // k.shape[0]
    rows = []
    for head in range(q.shape[0]):
        keys = torch.cat((p[0][head // group], k[head // group]))
        scores = q[head] @ keys.T / q.shape[-1] ** 0.5
        if causal:
            seen = torch.arange(keys.shape[0]) - 3 <= torch.arange(q.shape[1])[:, None]
            scores = scores.masked_fill(~seen, -torch.inf)
        rows.append(scores.softmax(-1) @ torch.cat((p[1][head // group], v[head // group])))
    return torch.stack(rows)


def heads(x: Tensor, size: int) -> Tensor:
    """(T, H e) -> (H, T, e)."""
    return x.view(x.shape[0], -1, size).transpose(0, 1)


def adapter(hook: nn.Module, u: Tensor, scale: float) -> Tensor:
    """s (W_u relu(W_d u + b_d) + b_u)."""
    return scale * ((u @ hook.down.T + hook.down_bias).clamp_min(0) @ hook.up.T + hook.up_bias)


@pytest.mark.parity("mam", "formulas of the paper, float64")
@pytest.mark.parametrize("source", ["normed", "residual"])
def test_a_decoder_is_the_formula_layer_by_layer(source: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, _ = on("llama", [Mam(name="mam", scale=2.0, input=source, **SMALL)])
    fill(model)
    model.double()
    got = logits(model, IDS)
    with activate(Context(role="reference")):  # the modules as they are without hooks
        x = model.model.embed_tokens(IDS[:1])
        cos, sin = model.model.rotary_emb(x, torch.arange(7)[None])
        for index, block in enumerate(model.model.layers):
            attention, n = block.self_attn, block.input_layernorm(x)
            q, k, v = (heads(f(n)[0], 8)[None] for f in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            out = attended(q[0], k[0], v[0], columns(model, index, 2), True).transpose(0, 1).reshape(1, 7, 32)
            x = x + attention.o_proj(out)
            n = block.post_attention_layernorm(x)
            feed = block.mlp.down_proj(torch.nn.functional.silu(block.mlp.gate_proj(n)) * block.mlp.up_proj(n))
            x = x + feed + adapter(block.mlp.mam_parallel_adapter, n if source == "normed" else x, 2.0)
        wanted = model.lm_head(model.model.norm(x))
    # Transformers takes the mean of an RMS norm in float32.
    torch.testing.assert_close(got[0], wanted[0], atol=2e-6, rtol=1e-6)


@pytest.mark.parity("mam", "formulas of the paper, float64")
def test_an_encoder_is_the_formula_layer_by_layer() -> None:
    model, _ = on("bert", [Mam(name="mam", **SMALL)])
    fill(model)
    model.double()
    got = logits(model, IDS)
    with activate(Context(role="reference")):
        x = model.bert.embeddings(IDS[:1])
        for index, block in enumerate(model.bert.encoder.layer):
            own = block.attention.self
            q, k, v = (heads(f(x)[0], 8) for f in (own.query, own.key, own.value))
            out = attended(q, k, v, columns(model, index, 4), False).transpose(0, 1).reshape(1, 7, 32)
            x = block.attention.output.LayerNorm(x + block.attention.output.dense(out))
            feed = block.output.dense(torch.nn.functional.gelu(block.intermediate.dense(x)))
            x = block.output.LayerNorm(x + feed + adapter(block.output.dense.mam_parallel_adapter, x, 4.0))
        wanted = model.cls(x)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-10, rtol=1e-10)


def test_only_the_prefix_moves_the_start() -> None:
    """With its table closed to nothing, W_u = 0 leaves the base to the bit."""
    model, stack = on("llama", [Mam(name="mam", **SMALL)])
    assert not stack.reference_is_off() and not torch.allclose(logits(model), base_logits("llama"), atol=1e-3)
    with activate(Context(off=frozenset({"mam_prefix_tuning"}))):
        assert torch.equal(logits(model), base_logits("llama"))


@pytest.mark.parity("parallel_adapter", "Adapter_Layer of the paper's code, float64")
@pytest.mark.parametrize("options", [{"scale": 1.0}, {"scale": 4.0}, {"scale": "learned"}])
def test_the_three_parallel_forms_at_the_feed_forward_of_a_decoder(options: dict) -> None:
    """parallel: s = 1, scaled parallel: s fixed or one trained number; down, relu, up, times s, as in the code of the paper."""
    model, _ = on("llama", [ParallelAdapter(name="pa", r=5, input="residual", **options)])
    fill(model)
    model.double()
    block, x = model.model.layers[0], torch.randn(1, 7, 32, dtype=torch.float64)
    hook = block.mlp.pa
    scale = hook.scale if options["scale"] == "learned" else options["scale"]
    seen: list[Tensor] = []
    block.mlp.register_forward_hook(lambda m, i, y: seen.append(y))
    position = model.model.rotary_emb(x, torch.arange(7)[None])
    out = block(x, position_embeddings=position)
    with activate(Context(role="reference")):
        plain = block.mlp(block.post_attention_layernorm(out - seen[0]))
    # What enters the block after attention is the stream the adapter reads.
    down = torch.relu(nn.functional.linear(out - seen[0], hook.down, hook.down_bias))
    wanted = plain + nn.functional.linear(down, hook.up, hook.up_bias) * scale
    torch.testing.assert_close(seen[0], wanted, atol=1e-6, rtol=1e-6)


def test_peft_has_no_form_for_both_parts_at_once(tmp_path: Path) -> None:
    from llmrecipe.core.errors import ModelError
    from llmrecipe.interop.merged import export_merged
    from llmrecipe.interop.peft.exporter import export_peft
    from tests.trainings import train_recipe

    train_recipe(tmp_path / "run", "mam", "steps=1", "eval.at_start=false", "eval.batches=1", "stack.mam.hidden=8")
    with pytest.raises(ModelError, match="PEFT"):
        export_peft(tmp_path / "run")
    with pytest.raises(ModelError, match="mam_prefix_tuning"):
        export_merged(tmp_path / "run")
    assert not (tmp_path / "run" / "peft").exists()


def test_two_of_them_and_their_parts_share_a_stack() -> None:
    model, stack = on("llama", [Mam(name="one", **SMALL), Mam(name="two", **SMALL), ParallelAdapter(name="three", r=2)])
    fill(model)
    assert [w.name for w in stack] == [
        "one_prefix_tuning",
        "one_parallel_adapter",
        "two_prefix_tuning",
        "two_parallel_adapter",
        "three",
    ]
    logits(model).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
