"""UniPELT: three gated parts in every block, against the formulas written out, and gates that never look ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.data.collate import Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.hybrid.unipelt import Unipelt
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.additive.harness import cached_generation_equals_uncached, fill, logits, model_of
from tests.methods.hybrid.written import on, stands_for, trains_alike
from tests.trainings import events, train_recipe

SMALL = {"num_virtual_tokens": 3, "hidden": 6, "r": 4, "reduction": 8}
IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2], [8, 1, 44, 12, 30, 6, 21]])
TEXT = """
unipelt_lora: {kind: lora, r: 4, gate: GATE}
unipelt_prefix_tuning: {kind: prefix_tuning, num_virtual_tokens: 3, hidden: 6, gate: GATE}
unipelt_adapter: {kind: adapter, placement: pfeiffer, reduction: 8, gate: GATE}
"""


@pytest.mark.parametrize(("family", "gate"), [("llama", "token"), ("bert", "mean"), ("gpt2", "token"), ("t5", "token")])
def test_it_is_the_stack_it_prints(family: str, gate: str) -> None:
    stands_for(family, Unipelt(name="unipelt", **SMALL), TEXT.replace("GATE", gate))


def test_options_reach_the_parts() -> None:
    text = """
unipelt_lora: {kind: lora, r: 4, gate: token, gate_share: per_layer}
unipelt_prefix_tuning: {kind: prefix_tuning, num_virtual_tokens: 3, hidden: 6, gate: token}
unipelt_adapter: {kind: adapter, placement: pfeiffer, reduction: 8, init: bert, gate: token, gate_input: raw}
"""
    model = stands_for("llama", Unipelt(name="unipelt", share="per_part", gate_input="raw", adapter_init="bert", **SMALL), text)
    gates = [n for n, _ in model.named_parameters() if n.endswith(("gate.weight", "__gate.gate"))]
    assert len(gates) == 2 * 3  # three a block
    stands_for("llama", Unipelt(name="unipelt", parts="AP", **SMALL), "\n".join(TEXT.replace("GATE", "token").split("\n")[2:]))
    flat = TEXT.replace("GATE", "token").replace("hidden: 6", "hidden: 6, reparam: flat")
    stands_for("llama", Unipelt(name="unipelt", reparam="flat", **SMALL), flat)


@pytest.mark.slow
def test_a_run_of_it_is_a_run_of_that_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
unipelt_lora: {kind: lora, gate: token}
unipelt_prefix_tuning: {kind: prefix_tuning, num_virtual_tokens: 10, hidden: 128, gate: token}
unipelt_adapter: {kind: adapter, placement: pfeiffer, gate: token}
"""
    trains_alike(tmp_path, "unipelt", text, capsys=capsys)
    step = events(tmp_path / "hybrid")[-1]
    assert all(0.0 < step[f"unipelt_{part}/gate"] < 1.0 for part in ("lora", "prefix_tuning", "adapter"))


# --- the formulas, in float64 -----------------------------------------------------------------------------------------


def columns(model: nn.Module, layer: int, heads: int) -> tuple[Tensor, Tensor]:
    """P_K and P_V (g, P, e) of a layer."""
    hooks = [p for _, _, _, p in all_hooks(model, "u_prefix_tuning") if hasattr(p, "tables")]
    made = hooks[0].tables["attn"].table()
    width = made.shape[1] // model.config.num_hidden_layers
    return tuple(half.view(3, heads, -1).transpose(0, 1) for half in made[:, layer * width : (layer + 1) * width].chunk(2, 1))


def attended(q: Tensor, k: Tensor, v: Tensor, p: tuple[Tensor, Tensor], g: Tensor, causal: bool) -> Tensor:
    """Row by row: softmax(q_t [g_t P_K; k]^T / sqrt(e)) [g_t P_V; v], (H, T, e)."""
    group, out = q.shape[0] // k.shape[0], torch.zeros_like(q)
    for head in range(q.shape[0]):
        for t in range(q.shape[1]):
            last = t + 1 if causal else k.shape[1]
            keys = torch.cat((g[t] * p[0][head // group], k[head // group][:last]))
            values = torch.cat((g[t] * p[1][head // group], v[head // group][:last]))
            out[head, t] = (q[head, t] @ keys.T / q.shape[-1] ** 0.5).softmax(-1) @ values
    return out


def heads_of(x: Tensor, size: int) -> Tensor:
    """(T, H e) -> (H, T, e)."""
    return x.view(x.shape[0], -1, size).transpose(0, 1)


def gate(x: Tensor, w: Tensor, b: Tensor, mean: bool) -> Tensor:
    """sigmoid(w x + b) of each token (T, 1), or their mean in each place."""
    g = torch.sigmoid(x @ w.reshape(-1) + b.reshape(()))[:, None]
    return g.mean(0, keepdim=True).expand_as(g) if mean else g


def projected(linear: nn.Module, x: Tensor, mean: bool) -> Tensor:
    """W x + g B A x."""
    hook = linear.u_lora
    plain = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
    return plain + gate(x, hook.gate.weight, hook.gate.bias, mean) * (x @ hook.A.T @ hook.B.T)


def bottleneck(hook: nn.Module, u: Tensor, read: Tensor, mean: bool) -> Tensor:
    """g (W_u relu(W_d u + b_d) + b_u)."""
    made = (u @ hook.down.T + hook.down_bias).clamp_min(0) @ hook.up.T + hook.up_bias
    return gate(read, hook.gate.weight, hook.gate.bias, mean) * made


@pytest.mark.parity("unipelt", "formulas of the paper, float64")
@pytest.mark.parametrize("pool", ["mean", "token"])
def test_an_encoder_is_the_formula_layer_by_layer(pool: str) -> None:
    model, _ = on("bert", [Unipelt(name="u", gate=pool, **SMALL)])
    fill(model)
    model.double()
    got, mean = logits(model, IDS), pool == "mean"
    with activate(Context(role="reference")):
        x = model.bert.embeddings(IDS[:1])[0]
        for index, block in enumerate(model.bert.encoder.layer):
            own = block.attention.self
            q, v = (heads_of(projected(f, x, mean), 8) for f in (own.query, own.value))
            k = heads_of(x @ own.key.weight.T + own.key.bias, 8)
            hook = own.u_prefix_tuning__gate
            g = gate(x, hook.gate, hook.bias, mean)
            out = attended(q, k, v, columns(model, index, 4), g, False).transpose(0, 1).reshape(7, 32)
            x = block.attention.output.LayerNorm(x + block.attention.output.dense(out))
            y = block.output.dense(torch.nn.functional.gelu(block.intermediate.dense(x)))
            norm = block.output.LayerNorm
            u = norm(x + y)
            x = norm(x + y + bottleneck(norm.u_adapter, u, u, mean))
        wanted = model.cls(x[None])
    torch.testing.assert_close(got[0], wanted[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parity("unipelt", "formulas of the paper, float64")
@pytest.mark.parametrize("source", ["normed", "raw"])
def test_a_decoder_is_the_formula_layer_by_layer_with_a_gate_a_token(source: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, _ = on("llama", [Unipelt(name="u", gate_input=source, **SMALL)])
    fill(model)
    model.double()
    got = logits(model, IDS)
    with activate(Context(role="reference")):
        x = model.model.embed_tokens(IDS[:1])
        cos, sin = model.model.rotary_emb(x, torch.arange(7)[None])
        x = x[0]
        for index, block in enumerate(model.model.layers):
            attention, n = block.self_attn, block.input_layernorm(x)
            q, v = (heads_of(projected(f, n, False), 8)[None] for f in (attention.q_proj, attention.v_proj))
            k = heads_of(n @ attention.k_proj.weight.T, 8)[None]
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            hook = attention.u_prefix_tuning__gate
            g = gate(n, hook.gate, hook.bias, False)
            out = attended(q[0], k[0], v[0], columns(model, index, 2), g, True).transpose(0, 1).reshape(7, 32)
            x = x + attention.o_proj(out)
            u = x + block.mlp(block.post_attention_layernorm(x))
            read = u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt() if source == "normed" else u
            x = u + bottleneck(block.u_adapter, u, read, False)
        wanted = model.lm_head(model.model.norm(x))
    # Transformers takes the mean of an RMS norm in float32.
    torch.testing.assert_close(got[0], wanted, atol=2e-6, rtol=1e-6)


def test_open_gates_are_the_plain_parts_at_scale_one() -> None:
    gated, _ = on("llama", [Unipelt(name="u", **SMALL)])
    fill(gated)
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if "gate" in name:
                parameter.fill_(60.0 if name.endswith("bias") else 0.0)
    plain = model_of("llama")
    options = {"name": "u_lora", "r": 4, "alpha": 4.0}
    prefix = on("llama", [Unipelt(name="u", **SMALL)])[1].wrappers[1]
    values = {f: getattr(prefix, f) for f in ("name", "num_virtual_tokens", "hidden")}
    Stack([Lora(**options), type(prefix)(**values), Adapter(name="u_adapter", placement="pfeiffer", reduction=8)]).attach(plain)
    state = dict(gated.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(state[name])
    torch.testing.assert_close(logits(gated), logits(plain), atol=2e-5, rtol=1e-5)


# --- what a gate may see ----------------------------------------------------------------------------------------------


def moved(family: str, **options: object) -> nn.Module:
    """Gates far from their start."""
    model, _ = on(family, [Unipelt(name="u", **SMALL, **options)])
    fill(model, scale=0.5)
    return model


def test_a_later_token_never_changes_an_earlier_output() -> None:
    model = moved("llama")
    changed = IDS.clone()
    changed[:, 5] = 33
    before, after = logits(model), logits(model, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-2)
    cached_generation_equals_uncached(model)


@pytest.mark.parametrize("family", ["llama", "t5", "native-encoder_decoder"])
def test_a_mean_on_a_decoder_is_refused(family: str) -> None:
    with pytest.raises(RecipeError, match=r"stack\.u\.gate: .*use gate: token"):
        on(family, [Unipelt(name="u", gate="mean", **SMALL)])
    if family == "llama":
        for wrapper in (Lora(name="w", gate="mean"), Adapter(name="w", gate="mean")):
            with pytest.raises(RecipeError, match=r"stack\.w\.gate: .*use gate: token"):
                on(family, [wrapper])


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_a_mean_on_a_decoder_would_read_tokens_to_come(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the refusal keeps from happening: without it, a later token moves earlier outputs."""
    import llmrecipe.methods._engines.input_gate as gates

    real = gates.anatomy
    monkeypatch.setattr(gates, "anatomy", lambda model: type("Blind", (), {"causal": False, "sites": real(model).sites}))
    wrapper = Lora(name="w", gate="mean") if kind == "lora" else Adapter(name="w", gate="mean", reduction=4)
    model, _ = on("llama", [wrapper])
    fill(model, scale=0.5)
    changed = IDS.clone()
    changed[:, 5] = 33
    assert not torch.allclose(logits(model)[:, :5], logits(model, changed)[:, :5], atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_padding_and_packing_leave_an_encoders_gates_alone(pool: str) -> None:
    model = moved("bert", gate=pool)
    rows = [Sequence([5, 9, 3, 60, 7], [1] * 5), Sequence([8, 1, 44], [1] * 3), Sequence([9, 9, 9, 9, 2, 4, 6, 11], [1] * 8)]
    engine = Engine(model).eval()
    with torch.no_grad():
        out = [engine(batch)["logprobs"] for batch in (pad(rows, 0), pack(rows))]
        alone = torch.cat([engine(pad([row], 0))["logprobs"] for row in rows])
        plain = model(input_ids=IDS[:1, :5]).logits
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
        wide = model(input_ids=torch.cat((IDS[:1, :5], torch.zeros(1, 2, dtype=torch.long)), 1), attention_mask=mask).logits
    torch.testing.assert_close(out[0], alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(wide[:, :5], plain, atol=2e-5, rtol=1e-5)


# --- what a gate forbids ----------------------------------------------------------------------------------------------


def test_a_gate_is_no_fixed_change_of_a_weight() -> None:
    gated = Lora(name="w", gate="token")
    model, _ = on("llama", [gated])
    assert not gated.merges() and Lora(name="w").merges()
    with pytest.raises(ModelError, match="cannot be merged"):
        gated.merge(model)
    for option in ({"init": "pissa"}, {"lora_bias": True}, {"use_rslora": True}):
        with pytest.raises(RecipeError, match="a gated branch has none"):
            on("llama", [Lora(name="w", gate="token", **option)])
    with pytest.raises(ModelError, match="leave embed out of the target"):
        on("llama", [Lora(name="w", target="embed", gate="token")])
    with pytest.raises(ModelError, match="gate_share: per_module"):
        on("llama", [Lora(name="w", target="attn.q + mlp.down", gate="token", gate_share="per_layer")])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["lora", "prefix_tuning", "adapter"])
def test_no_export_leaves_a_gate_out(part: str, tmp_path: Path) -> None:
    from llmrecipe.interop.merged import export_merged
    from llmrecipe.interop.peft.exporter import export_adapter_hub, export_peft

    options = {"lora": "", "prefix_tuning": ", positions: shift", "adapter": ", placement: pfeiffer"}[part]
    stack = f"+stack.w={{kind: {part}, gate: token{options}}}"
    train_recipe(tmp_path / "run", "sft", stack, "steps=1", "eval.at_start=false", "eval.batches=1")
    for export in (export_peft, export_merged, export_adapter_hub):
        with pytest.raises(ModelError, match=r"\bw\b"):
            export(tmp_path / "run")


def test_sizes_of_lora_by_layer() -> None:
    model, stack = on("llama", [Lora(name="w", r=4, sizes={"0": 0, "1": 3})])
    assert {p.shape[0] for n, p in model.named_parameters() if n.endswith("w.A")} == {3}
    assert not any("layers.0." in n and ".w." in n for n, _ in model.named_parameters())
    counts = next(iter(stack)).memory(model)["trainable"]
    assert counts == 3 * (32 + 32 + 32 + 16)
