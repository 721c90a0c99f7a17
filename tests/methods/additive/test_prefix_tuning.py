"""Prefix-tuning against peft, against attention written out in float64, and in generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.data.collate import Sequence
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive._engines.prefix_kv import PrefixTables, Table, drop_mlp, tables_of
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.additive.prefix_support import IDS, adapted, gradients, greedy_cached, greedy_whole, pair_model, trained
from tests.tiny import roles_for, tiny_model

P = 6


def prefix(**options: Any) -> PrefixTuning:
    return PrefixTuning(name="prefix", **{"num_virtual_tokens": P, "hidden": 16, **options})


def peft_twin(family: str, projected: bool) -> nn.Module:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=projected, encoder_hidden_size=16
    )
    return get_peft_model(tiny_model(family), config).eval()


def copy_from_peft(model: nn.Module, twin: nn.Module) -> None:
    source = twin.prompt_encoder["default"]
    (hook,) = tables_of(model, "prefix")
    table = hook.tables["attn"]
    with torch.no_grad():
        if hasattr(table, "flat"):
            table.flat.copy_(source.embedding.weight)
            return
        table.small.copy_(source.embedding.weight)
        for ours, theirs in ((table.inner, source.transform[0]), (table.outer, source.transform[2])):
            ours.load_state_dict(theirs.state_dict())


@pytest.mark.parity("prefix_tuning", "PEFT PrefixTuningConfig")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reparam", ["flat", "mlp"])
def test_logits_and_gradients_equal_peft(family: str, reparam: str) -> None:
    model = adapted(prefix(reparam=reparam, positions="shift"), family)
    twin = peft_twin(family, reparam == "mlp")
    copy_from_peft(model, twin)
    outs = [m(input_ids=IDS).logits for m in (model, twin)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    for out in outs:
        out.square().sum().backward()
    ours = sorted((p.grad for p in trained(model).values()), key=lambda g: g.shape)
    theirs = sorted((p.grad for p in twin.parameters() if p.grad is not None), key=lambda g: g.shape)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
    assert sum(p.numel() for p in trained(model).values()) == sum(p.numel() for p in twin.parameters() if p.requires_grad)


def test_learned_positions_see_the_difference_between_free_and_shift() -> None:
    free, shift = (adapted(prefix(reparam="flat", positions=p), "gpt2")(input_ids=IDS).logits for p in ("free", "shift"))
    assert float((free - shift).detach().norm() / free.detach().norm()) > 0.05


def test_counts_follow_the_closed_forms() -> None:
    layers, kv, c = 2, 16, 16
    model = adapted(prefix())
    wanted = P * kv + c * (kv + 1) + 2 * layers * kv * (c + 1)
    assert sum(p.numel() for p in trained(model).values()) == wanted
    facts = prefix().memory(model)
    assert facts["trainable"] == wanted
    assert facts["kept"] == 2 * layers * P * kv
    assert sum(p.numel() for p in trained(adapted(prefix(reparam="flat"))).values()) == 2 * layers * P * kv


def attention64(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, scale: float, bias: Tensor | float, causal: bool
) -> Tensor:
    """softmax(q [pk; k]^T s + [0; bias] + mask) [pv; v] with one key/value head a query head, (H, T, E)."""
    scores = torch.einsum("hqe,hke->hqk", q, k) * scale + bias
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    weights = torch.cat((torch.einsum("hqe,hpe->hqp", q, pk) * scale, scores), -1).softmax(-1)
    return torch.einsum("hqk,hke->hqe", weights, torch.cat((pv, v), 1))


@pytest.mark.parity("prefix_tuning", "formula, float64")
def test_one_layer_is_the_formula_in_float64() -> None:
    model = adapted(prefix(reparam="flat"), num_hidden_layers=1).double()
    (hook,) = tables_of(model, "prefix")
    keys, values = hook.tables["attn"]()[0]
    table = hook.tables["attn"].flat
    # Layer-major columns: the first half of the only layer is K, two key/value heads of size 8.
    assert torch.equal(keys[0, 1, 3], table[3, 8:16])
    assert torch.equal(values[0, 0, 2], table[2, 16:24])
    seen: dict[str, Tensor] = {}
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=kwargs["hidden_states"], cos=kwargs["position_embeddings"]), with_kwargs=True
    )
    model(input_ids=IDS)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads = [p(seen["x"]).view(1, 7, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    q, k = apply_rotary_pos_emb(heads[0], heads[1], *seen["cos"])
    wide = [x[0].repeat_interleave(2, 0) for x in (k, heads[2], keys, values)]
    wanted = attention64(q[0], *wide, 8**-0.5, 0.0, True).transpose(0, 1).reshape(7, 32)
    torch.testing.assert_close(seen["out"][0], wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder_and_cross_attention_have_tables_of_their_own(family: str) -> None:
    model = adapted(prefix(reparam="flat", target="attn + cross"), family)
    roles = {path: sorted(hook.tables) for path, _, _, hook in all_hooks(model) if isinstance(hook, PrefixTables)}
    assert sorted(roles.values()) == [["attn"], ["attn", "cross"]]
    model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits.square().sum().backward()
    for name, parameter in trained(model).items():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).all()), name
    assert sum(p.numel() for p in trained(model).values()) == 3 * 2 * 2 * P * 32


@pytest.mark.parity("prefix_tuning", "formula, float64")
def test_a_relative_model_follows_the_formula_in_float64() -> None:
    """T5: no scale, a bias on real columns only; encoder, decoder and cross-attention of the first layer."""
    model = adapted(prefix(reparam="flat", target="attn + cross"), "t5").double()
    modules = {
        "encoder": model.encoder.block[0].layer[0].SelfAttention,
        "decoder": model.decoder.block[0].layer[0].SelfAttention,
        "cross": model.decoder.block[0].layer[1].EncDecAttention,
    }
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    inputs: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.o.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        module.q.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        module.k.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(f"{name}.k", args[0]))
    model(input_ids=IDS, decoder_input_ids=IDS[:, :4])
    tables = {
        "encoder": model.encoder.prefix.tables["attn"],
        "decoder": model.decoder.prefix.tables["attn"],
        "cross": model.decoder.prefix.tables["cross"],
    }
    for name, module in modules.items():
        q = module.q(inputs[name]).view(-1, 4, 8).transpose(0, 1)
        k, v = (p(inputs[f"{name}.k"]).view(-1, 4, 8).transpose(0, 1) for p in (module.k, module.v))
        bias = module.compute_bias(q.shape[1], k.shape[1])[0] if name != "cross" else 0.0
        pk, pv = (x[0] for x in tables[name]()[0])
        wanted = attention64(q, k, v, pk, pv, 1.0, bias, name == "decoder").transpose(0, 1).reshape(-1, 32)
        torch.testing.assert_close(seen[name][0], wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("reparam", ["mlp", "flat"])
def test_every_entry_learns(family: str, reparam: str) -> None:
    if family == "bert":
        from tests.methods.additive.prefix_support import bert_classifier

        model = bert_classifier()
        Stack([prefix(reparam=reparam)]).attach(model)
    else:
        model = adapted(prefix(reparam=reparam), family)
    model(input_ids=IDS).logits.square().sum().backward()
    grads = {n: p.grad for n, p in trained(model).items() if "prefix" in n}
    assert grads
    assert all(g is not None and bool((g != 0).all()) for g in grads.values())


def test_the_mlp_runs_once_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(prefix(), num_hidden_layers=4)
    calls: list[int] = []
    original = Table.table
    monkeypatch.setattr(Table, "table", lambda self: calls.append(1) or original(self))
    gradients(model, checkpointing=True)
    assert len(calls) == 1


def test_dropping_the_mlp_keeps_the_outputs_bit_for_bit() -> None:
    model = adapted(prefix())
    before = model(input_ids=IDS).logits
    wrapper = prefix()
    assert wrapper.structure(model) == {"reparam": "mlp"}
    wrapper.finish(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert [n for n, _ in model.named_parameters() if "prefix" in n] == ["model.prefix.tables.attn.flat"]
    assert wrapper.structure(model) == {"reparam": "flat"}
    again = tiny_model()
    stack = Stack([wrapper])
    stack.attach(again, {"prefix": wrapper.structure(model)})
    stack.restore(again, wrapper.delta(model))
    assert torch.equal(again(input_ids=IDS).logits, before)
    drop_mlp(model, "prefix")
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("positions", ["free", "shift"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_from_a_cache_and_left_padding_change_nothing(family: str, positions: str) -> None:
    model = adapted(prefix(reparam="flat", positions=positions), family)
    prompts = [[5, 9, 3, 60, 7], [4, 8], [7, 7, 21]]
    wanted = [greedy_whole(model, p, 8) for p in prompts]
    assert greedy_cached(model, prompts, 8) == wanted


def test_beams_carry_the_prefix() -> None:
    model = adapted(prefix(reparam="flat"))
    prompts = [[5, 9, 3, 60, 7], [4, 8]]
    together = greedy_cached(model, prompts, 6, num_beams=3)
    assert together == [greedy_cached(model, [p], 6, num_beams=3)[0] for p in prompts]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"gate_init": "closed", "reparam": "flat"}])
def test_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    plain, replayed = (gradients(adapted(prefix(**options)), c) for c in (False, True))
    assert plain.keys() == replayed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(grad, replayed[name])


def test_checkpointing_without_the_context_is_an_error_and_not_a_wrong_gradient() -> None:
    model = adapted(prefix())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with pytest.raises(ModelError, match="checkpoint_contexts"):
        model(input_ids=IDS, use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("gate", ["open", "closed"])
def test_packed_documents_each_see_the_whole_prefix_and_nobody_else(gate: str) -> None:
    model = adapted(prefix(reparam="flat", gate_init=gate))
    with torch.no_grad():
        for hook in tables_of(model, "prefix"):
            if gate == "closed":
                hook.tables["attn"].gate.fill_(0.7)
    sequences = [Sequence([5, 9, 3], [0, 1, 1]), Sequence([60, 7], [1, 1], parent=0), Sequence([4, 4, 8, 2], [0, 1, 1, 1])]
    values = []
    for packing in (True, False):
        roles = roles_for(model, packing=packing)
        batch = roles.layout(sequences)
        values.append(batch.sum_by_sequence(roles.engine(batch)["logprobs"]))
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-4)


def test_a_closed_gate_starts_at_the_base_bit_for_bit_and_opens() -> None:
    base = tiny_model()(input_ids=IDS).logits
    model = adapted(prefix(reparam="flat", gate_init="closed"))
    assert prefix(gate_init="closed").starts_at_base()
    assert torch.equal(model(input_ids=IDS).logits, base)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS).logits.square().sum().backward()
        optimizer.step()
    (hook,) = tables_of(model, "prefix")
    assert bool((hook.tables["attn"].gate != 0).all())
    assert bool((hook.tables["attn"].flat.grad != 0).all())


def test_an_open_prefix_is_not_the_base_even_at_zero() -> None:
    """Zero keys take P shares of each softmax."""
    base = tiny_model()(input_ids=IDS).logits
    model = adapted(prefix(reparam="flat", init="zero"))
    assert not prefix().starts_at_base()
    assert float((model(input_ids=IDS).logits - base).norm() / base.norm()) > 0.05
    with activate(Context(role="reference")):
        assert torch.equal(model(input_ids=IDS).logits, base)


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 60 + 3 for c in text]}


@pytest.mark.parametrize(("family", "positions"), [("llama", "free"), ("llama", "shift"), ("qwen3", "free"), ("gpt2", "shift")])
def test_a_prefix_from_text_is_that_text_in_front(family: str, positions: str) -> None:
    wrapper = prefix(reparam="flat", init="text", init_text="sum", positions=positions)
    model = adapted(wrapper, family)
    wrapper.calibrate(model, Probe(None, None, tokenizer=Letters()))
    text = (Letters()("sum")["input_ids"] * P)[:P]
    wanted = tiny_model(family)(input_ids=torch.tensor([[*text, *IDS[0].tolist()]])).logits[:, P:]
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=2e-4, rtol=1e-4)


def test_a_gate_of_each_query_is_the_formula_in_float64_packed_or_not() -> None:
    """softmax([g q P_K^T, q K^T] / sqrt(e)) [g P_V; V] with a different g at every query."""
    model = adapted(prefix(reparam="flat", gate="token"), num_hidden_layers=1).double()
    attention = model.model.layers[0].self_attn
    attention.prefix__gate.gate.data.normal_()
    seen: dict[str, Tensor] = {}
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out, "x": args[0]}))
    model(input_ids=IDS, position_ids=torch.zeros(1, 7, dtype=torch.long), attention_mask=torch.ones(1, 7))
    # Positions all zero: rotary angles vanish.
    q, k, v = (seen[n].view(7, -1, 8).transpose(0, 1) for n in ("q_proj", "k_proj", "v_proj"))
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    keys, values = (x[0].repeat_interleave(2, 0) for x in tables_of(model, "prefix")[0].tables["attn"]()[0])
    g = torch.sigmoid(seen["x"][0] @ attention.prefix__gate.gate + attention.prefix__gate.bias)[None, :, None]
    scores = torch.einsum("hqe,hke->hqk", q, k).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    weights = (torch.cat((g * torch.einsum("hqe,hpe->hqp", q, keys), scores), -1) * 8**-0.5).softmax(-1)
    wanted = g * weights[..., :P] @ values + weights[..., P:] @ v
    torch.testing.assert_close(seen["out"][0], wanted.transpose(0, 1).reshape(7, 32), atol=1e-12, rtol=1e-10)


def test_gated_prefixes_packed_cached_and_replayed() -> None:
    model = adapted(prefix(reparam="flat", gate="token"))
    for _, _, _, hook in all_hooks(model):
        if hasattr(hook, "gate"):
            hook.gate.data.normal_()
    sequences = [Sequence([5, 9, 3], [0, 1, 1]), Sequence([60, 7], [1, 1], parent=0), Sequence([4, 4, 8, 2], [0, 1, 1, 1])]
    values = []
    for packing in (True, False):
        roles = roles_for(model, packing=packing)
        batch = roles.layout(sequences)
        values.append(batch.sum_by_sequence(roles.engine(batch)["logprobs"]))
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-4)
    model.eval()
    prompts = [[5, 9, 3, 60, 7], [4, 8]]
    assert greedy_cached(model, prompts, 8) == [greedy_whole(model, p, 8) for p in prompts]
    plain, replayed = (gradients(adapted(prefix(gate="token")), c) for c in (False, True))
    assert all(bool((g != 0).any()) for g in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(grad, replayed[name])


def test_a_mean_gate_ignores_padding_and_is_refused_where_it_would_look_ahead() -> None:
    from tests.methods.additive.prefix_support import bert_classifier

    model = bert_classifier()
    Stack([prefix(reparam="flat", gate="mean")]).attach(model)
    alone = model(input_ids=IDS[:, :4], attention_mask=torch.ones(1, 4, dtype=torch.long)).logits
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(RecipeError, match="gate: token"):
        adapted(prefix(gate="mean"))


def test_some_layers_only() -> None:
    model = adapted(prefix(reparam="flat", target="layers.1:.attn"), num_hidden_layers=3)
    (hook,) = tables_of(model, "prefix")
    assert hook.tables["attn"].flat.shape == (P, 2 * 2 * 16)
    hosts = [path for path, module, _, p in all_hooks(model) if not isinstance(p, PrefixTables)]
    assert hosts == ["model.layers.1.self_attn", "model.layers.2.self_attn"]


def test_what_cannot_work_is_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError, match="attention module"):
        adapted(prefix(target="attn.q"))
    with pytest.raises(RecipeError, match="reparam: flat"):
        adapted(prefix(init="zero"))
    with pytest.raises(RecipeError, match="positions: free"):
        adapted(prefix(positions="shift"), "t5")
    wrapper = prefix(reparam="flat", init="text")
    model = adapted(wrapper)
    with pytest.raises(RecipeError, match="at least one token"):
        wrapper.calibrate(model, Probe(None, None, tokenizer=Letters()))
    wrapper = prefix(reparam="flat", init="text", init_text="a")
    model = pair_model("t5")
    Stack([wrapper]).attach(model)
    with pytest.raises(RecipeError, match="encoder-decoder"):
        wrapper.calibrate(model, Probe(None, None, tokenizer=Letters()))


@pytest.mark.slow
def test_a_finished_run_holds_columns_only_and_is_mounted_exactly(tmp_path: Any) -> None:
    from llmrecipe.recipe.schema import ModelSection, TokenizerSection
    from llmrecipe.runs.open_model import open_model
    from tests.trainings import learned, train_recipe

    run = train_recipe(tmp_path / "run", "prefix_tuning", "steps=3", "stack.prefix_tuning.num_virtual_tokens=4")
    assert list(learned(tmp_path / "run")) == ["model.prefix_tuning.tables.attn.flat"]
    mounted = open_model(ModelSection(path=str(tmp_path / "run")), TokenizerSection())
    run.model.eval()
    mounted.model.eval()
    wanted = run.model(input_ids=IDS).logits
    torch.testing.assert_close(mounted.model(input_ids=IDS).logits, wanted)
    with activate(Context(role="reference")):
        # A mounted prefix is part of the reference.
        torch.testing.assert_close(mounted.model(input_ids=IDS).logits, wanted)
