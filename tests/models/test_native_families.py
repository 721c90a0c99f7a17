"""The native transformer computes what the families of Transformers compute: logits and every gradient, on copied weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from llmrecipe.engine.logprob import Post
from llmrecipe.models.native import (
    NativeConfig,
    NativeForCausalLM,
    NativeForImageClassification,
    NativeForMaskedLM,
    NativeForSeq2SeqLM,
)
from tests.models.test_native import GPT_2, SHAPE, ids

Links = Iterator[tuple[str, str, Callable[[Tensor], Tensor]]]
"""(our parameter, theirs, the view of theirs that corresponds)."""
Pair = tuple[nn.Module, nn.Module, Links, Callable[[nn.Module], Tensor]]
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
UNTIED = {"tie_word_embeddings": False}
LLAMA = {**SHAPE, "num_key_value_heads": 2, **UNTIED}


def same(t: Tensor) -> Tensor:
    return t


def ours(cls: Any, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(NativeConfig(**{**SHAPE, **config}))


def renamed(model: nn.Module, names: dict[str, str]) -> Links:
    """Links of a family whose state differs in the names of modules alone."""
    for name, _ in model.named_parameters():
        theirs = name
        for mine, yours in names.items():
            theirs = theirs.replace(mine, yours)
        yield name, theirs, same


LLAMA_NAMES = {"norm_attn": "input_layernorm", "norm_mlp": "post_attention_layernorm", "model.decoder.": "model."}


def causal(model: nn.Module) -> Tensor:
    return model(input_ids=ids(), attention_mask=MASK).logits[MASK.bool()]


def llama() -> Pair:
    mine = ours(NativeForCausalLM, num_key_value_heads=2, **UNTIED)
    return mine, LlamaForCausalLM(LlamaConfig(**LLAMA, rms_norm_eps=1e-6)), renamed(mine, LLAMA_NAMES), causal


def qwen3() -> Pair:
    mine = ours(NativeForCausalLM, num_key_value_heads=2, head_dim=16, qk_norm=True, **UNTIED)
    theirs = Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=16, rms_norm_eps=1e-6, rope_theta=10000.0))
    return mine, theirs, renamed(mine, LLAMA_NAMES), causal


def mixtral() -> Pair:
    mine = ours(NativeForCausalLM, num_key_value_heads=2, num_experts=4, norm_eps=1e-5, **UNTIED)
    theirs = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, rope_theta=10000.0))
    return mine, theirs, renamed(mine, LLAMA_NAMES | {"mlp.router": "mlp.gate"}), causal


def qwen2_moe() -> Pair:
    """Weights of the chosen experts that do not sum to 1, and a shared expert with its gate."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": False}
    mine = ours(NativeForCausalLM, num_key_value_heads=2, **experts, num_shared_experts=1, shared_expert_gate=True, **UNTIED)
    config = Qwen2MoeConfig(**LLAMA, **experts, shared_expert_intermediate_size=16, qkv_bias=False)
    return mine, Qwen2MoeForCausalLM(config), renamed(mine, LLAMA_NAMES | {"mlp.router": "mlp.gate"}), causal


def gpt2() -> Pair:
    mine = ours(NativeForCausalLM, **GPT_2)
    config = GPT2Config(vocab_size=64, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0)

    def links() -> Links:
        yield "model.decoder.embed_tokens.weight", "transformer.wte.weight", same
        yield "model.decoder.positions.weight", "transformer.wpe.weight", same
        for end in ("weight", "bias"):
            yield f"model.decoder.norm.{end}", f"transformer.ln_f.{end}", same
            turned = Tensor.t if end == "weight" else same
            for i in range(2):
                here, there = f"model.decoder.layers.{i}", f"transformer.h.{i}"
                yield f"{here}.norm_attn.{end}", f"{there}.ln_1.{end}", same
                yield f"{here}.norm_mlp.{end}", f"{there}.ln_2.{end}", same
                for j, part in enumerate("qkv"):
                    fused = lambda t, j=j: t[..., 32 * j : 32 * (j + 1)]  # noqa: E731
                    view = (lambda t, fused=fused: fused(t).t()) if end == "weight" else fused
                    yield f"{here}.self_attn.{part}_proj.{end}", f"{there}.attn.c_attn.{end}", view
                yield f"{here}.self_attn.o_proj.{end}", f"{there}.attn.c_proj.{end}", turned
                yield f"{here}.mlp.up_proj.{end}", f"{there}.mlp.c_fc.{end}", turned
                yield f"{here}.mlp.down_proj.{end}", f"{there}.mlp.c_proj.{end}", turned

    return mine, GPT2LMHeadModel(config), links(), causal


def bert() -> Pair:
    mine = ours(
        NativeForMaskedLM, kind="encoder", positions="learned", norm="layernorm", norm_eps=1e-12, pre_norm=False,
        embed_norm=True, type_vocab_size=2, gated=False, bias=True, hidden_act="gelu",
    )  # fmt: skip
    theirs = BertForMaskedLM(BertConfig(**SHAPE))
    names = {
        "model.encoder.embed_tokens": "bert.embeddings.word_embeddings",
        "model.encoder.positions": "bert.embeddings.position_embeddings",
        "model.encoder.types": "bert.embeddings.token_type_embeddings",
        "model.encoder.embed_norm": "bert.embeddings.LayerNorm",
        "model.encoder.layers": "bert.encoder.layer",
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.o_proj": "attention.output.dense",
        "norm_attn": "attention.output.LayerNorm",
        "mlp.up_proj": "intermediate.dense",
        "mlp.down_proj": "output.dense",
        "norm_mlp": "output.LayerNorm",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.norm": "cls.predictions.transform.LayerNorm",
        "lm_head.decoder.bias": "cls.predictions.bias",
    }
    types = torch.tensor([[0] * 4 + [1] * 5, [0] * 3 + [1] * 6])

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids(), attention_mask=MASK, token_type_ids=types).logits[MASK.bool()]

    return mine, theirs, renamed(mine, names), call


T5_SHAPE = {"kind": "encoder_decoder", "positions": "relative", "gated": False, "hidden_act": "relu"}


def t5(config: dict[str, Any] | None = None, **theirs_config: Any) -> Pair:
    """The head is the embedding, and the decoder's states are scaled before it."""
    mine = ours(NativeForSeq2SeqLM, **T5_SHAPE, **(config or {}))
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    theirs = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **theirs_config))

    def links() -> Links:
        yield "model.encoder.embed_tokens.weight", "shared.weight", same
        if not mine.config.tie_word_embeddings:
            yield "lm_head.weight", "lm_head.weight", same
        for side, last in (("encoder", 1), ("decoder", 2)):
            home = f"model.{side}"
            yield f"{home}.norm.weight", f"{side}.final_layer_norm.weight", same
            bias = "layer.0.SelfAttention.relative_attention_bias.weight"
            yield f"{home}.relative.weight", f"{side}.block.0.{bias}", same
            for i in range(2):
                here, there = f"{home}.layers.{i}", f"{side}.block.{i}.layer"
                parts = [("self_attn", "0.SelfAttention", "norm_attn", "0")]
                parts += [("cross_attn", "1.EncDecAttention", "norm_cross", "1")] if side == "decoder" else []
                for attention, theirs_name, norm, place in parts:
                    yield f"{here}.{norm}.weight", f"{there}.{place}.layer_norm.weight", same
                    for part in "qkvo":
                        yield f"{here}.{attention}.{part}_proj.weight", f"{there}.{theirs_name}.{part}.weight", same
                yield f"{here}.norm_mlp.weight", f"{there}.{last}.layer_norm.weight", same
                yield f"{here}.mlp.up_proj.weight", f"{there}.{last}.DenseReluDense.wi.weight", same
                yield f"{here}.mlp.down_proj.weight", f"{there}.{last}.DenseReluDense.wo.weight", same

    return mine, theirs, links(), pair


def t5_1_1() -> Pair:
    """In Transformers this config value says of a T5 that it does not scale; its head is the embedding all the same."""
    return t5({"scale_decoder_outputs": False}, **UNTIED)


def t5_untied() -> Pair:
    """A head of its own reads the states as they are."""
    mine, theirs, links, call = t5(UNTIED, **UNTIED)
    theirs.lm_head.weight = nn.Parameter(torch.zeros(64, 32))
    return mine, theirs, links, call


def pair(model: nn.Module) -> Tensor:
    return model(input_ids=ids(), attention_mask=MASK, decoder_input_ids=ids(2, 7)).logits


class Original(nn.Module):
    """The transformer of 2017 out of torch's own layers: scaled embedding, sines, norms after each sum, head tied."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        sizes = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, **sizes), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, **sizes), 2)

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) * math.sqrt(32)
        rows = [
            [(math.sin if i % 2 == 0 else math.cos)(t / 10000 ** (2 * (i // 2) / 32)) for i in range(32)]
            for t in range(tokens.shape[1])
        ]
        return x + torch.tensor(rows, dtype=x.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Any:
        padding = attention_mask == 0
        states = self.encoder(self.embed(input_ids), src_key_padding_mask=padding)
        later = torch.ones(decoder_input_ids.shape[1], decoder_input_ids.shape[1], dtype=torch.bool).triu(1)
        x = self.decoder(self.embed(decoder_input_ids), states, tgt_mask=later, memory_key_padding_mask=padding)
        return type("Out", (), {"logits": x @ self.table.weight.T})


def original() -> Pair:
    mine = ours(
        NativeForSeq2SeqLM, kind="encoder_decoder", positions="sinusoidal", norm="layernorm", norm_eps=1e-5, pre_norm=False,
        gated=False, bias=True, hidden_act="relu", scale_embedding=True,
    )  # fmt: skip

    def links() -> Links:
        yield "model.encoder.embed_tokens.weight", "table.weight", same
        for side in ("encoder", "decoder"):
            for i in range(2):
                here, there = f"model.{side}.layers.{i}", f"{side}.layers.{i}"
                attentions = {"self_attn": "self_attn"} | ({"cross_attn": "multihead_attn"} if side == "decoder" else {})
                norms = ["norm_attn", *(["norm_cross"] if side == "decoder" else []), "norm_mlp"]
                for end in ("weight", "bias"):
                    for attention, theirs in attentions.items():
                        for j, part in enumerate("qkv"):
                            view = lambda t, j=j: t[32 * j : 32 * (j + 1)]  # noqa: E731
                            yield f"{here}.{attention}.{part}_proj.{end}", f"{there}.{theirs}.in_proj_{end}", view
                        yield f"{here}.{attention}.o_proj.{end}", f"{there}.{theirs}.out_proj.{end}", same
                    for j, norm in enumerate(norms):
                        yield f"{here}.{norm}.{end}", f"{there}.norm{j + 1}.{end}", same
                    yield f"{here}.mlp.up_proj.{end}", f"{there}.linear1.{end}", same
                    yield f"{here}.mlp.down_proj.{end}", f"{there}.linear2.{end}", same

    return mine, Original(), links(), pair


def vit() -> Pair:
    image = {"image_size": 8, "patch_size": 4, "num_channels": 3}
    mine = ours(
        NativeForImageClassification, kind="vision", positions="learned", norm="layernorm", norm_eps=1e-12, gated=False,
        bias=True, hidden_act="gelu", num_labels=3, **image,
    )  # fmt: skip
    sizes = {key: SHAPE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    names = {
        "model.encoder.patches.class_token": "vit.embeddings.cls_token",
        "model.encoder.patches.projection": "vit.embeddings.patch_embeddings.projection",
        "model.encoder.positions.weight": "vit.embeddings.position_embeddings",
        "model.encoder.layers": "vit.layers",
        "model.encoder.norm": "vit.layernorm",
        "self_attn": "attention",
        "norm_attn": "layernorm_before",
        "norm_mlp": "layernorm_after",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    }

    def links() -> Links:
        shaped = {
            "cls_token": lambda t: t[0, 0],
            "position_embeddings": lambda t: t[0],
            "projection.weight": lambda t: t.flatten(1),
        }
        for name, there, view in renamed(mine, names):
            yield name, there, next((v for end, v in shaped.items() if there.endswith(end)), view)

    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return mine, ViTForImageClassification(ViTConfig(**sizes, **image, num_labels=3)), links(), lambda m: m(pixels).logits


FAMILIES = {f.__name__: f for f in (llama, qwen3, gpt2, bert, t5, t5_1_1, t5_untied, original, mixtral, qwen2_moe, vit)}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_the_family(family: str) -> None:
    mine, theirs, links, call = FAMILIES[family]()
    mine, theirs = mine.double().eval(), theirs.double().eval()
    generator = torch.Generator().manual_seed(2)
    own, other = dict(mine.named_parameters()), dict(theirs.named_parameters())
    linked = list(links)
    assert sorted(name for name, _, _ in linked) == sorted(own), "a parameter has no counterpart"
    with torch.no_grad():
        for name, there, view in linked:
            # Sizes at which attention is sharp, gates move, and every norm and bias is other than where it starts.
            drawn = torch.randn(own[name].shape, generator=generator, dtype=torch.float64)
            own[name].copy_(drawn * (0.2 if drawn.dim() > 1 else 0.1) + (1.0 if "norm" in name and "bias" not in name else 0.0))
            view(other[there]).copy_(own[name])
    for model in (mine, theirs):
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
    a, b = call(mine), call(theirs)
    assert a.std() > 0.1
    assert (a - b).abs().max() < 1e-5
    direction = torch.randn(a.shape, generator=generator, dtype=torch.float64)
    (a * direction).sum().backward()
    (b * direction).sum().backward()
    for name, there, view in linked:
        wanted, found = view(other[there].grad), own[name].grad
        if name.endswith("embed_tokens.weight"):
            wanted, found = wanted[1:], found[1:]  # the row of the padding token, which torch leaves without a gradient
        scale = max(1.0, float(wanted.abs().max()))
        assert wanted.abs().max() > 1e-6 or name.endswith("k_proj.bias"), f"{name} has no gradient to compare"
        assert (wanted - found).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_loss_of_a_mixture_includes_its_balance(family: str) -> None:
    mine, theirs, links, _ = FAMILIES[family]()
    mine, theirs = mine.eval(), theirs.eval()
    with torch.no_grad():
        own, other = dict(mine.named_parameters()), dict(theirs.named_parameters())
        for name, there, _ in links:
            own[name].mul_(5.0)
            other[there].copy_(own[name])
    mine.config.router_aux_loss_coef = theirs.router_aux_loss_coef = 0.5
    labels = ids().masked_fill(MASK == 0, -100)
    found = mine(ids(), attention_mask=MASK, labels=labels)
    wanted = theirs(ids(), attention_mask=MASK, labels=labels, output_router_logits=True)
    assert found.loss.item() == pytest.approx(wanted.loss.item(), abs=1e-6)
    assert found.aux_loss.item() == pytest.approx(wanted.aux_loss.item(), abs=1e-6) and found.aux_loss > 1.9


@pytest.mark.parametrize(
    ("config", "divisor"),
    [
        ({}, math.sqrt(32)),
        (UNTIED, 1.0),
        ({"scale_decoder_outputs": False}, 1.0),
        ({**UNTIED, "scale_decoder_outputs": True}, math.sqrt(32)),
        ({"positions": "learned"}, 1.0),
        ({"mup_base_width": 32}, math.sqrt(32)),
        ({"mup_base_width": 8}, 4 * math.sqrt(8)),  # as wide as four bases, whose own outputs are scaled to their width
    ],
)
def test_decoder_outputs_are_scaled_as_stated_before_and_after_a_folder(
    tmp_path: Path, config: dict[str, Any], divisor: float
) -> None:
    model = ours(NativeForSeq2SeqLM, **{**T5_SHAPE, **config}).eval()
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(2, 7)}
    for each in (model, NativeForSeq2SeqLM.from_pretrained(tmp_path).eval()):
        states = each.model(**inputs).last_hidden_state
        torch.testing.assert_close(each(**inputs).logits, states @ each.lm_head.weight.T / divisor)
        assert Post.of(each.config).scale == pytest.approx(1 / divisor, rel=1e-12)


def test_a_saved_model_without_the_key_divides_by_nothing(tmp_path: Path) -> None:
    """Its weights were trained so."""
    ours(NativeForSeq2SeqLM, **T5_SHAPE, scale_decoder_outputs=False).save_pretrained(tmp_path)
    saved = tmp_path / "config.json"
    text = {k: v for k, v in json.loads(saved.read_text(encoding="utf-8")).items() if k != "scale_decoder_outputs"}
    saved.write_text(json.dumps(text), encoding="utf-8")
    assert NativeConfig.from_pretrained(tmp_path).logit_divisor() == 1.0


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_outputs_of_a_decoder_that_is_not_there_are_refused(kind: str) -> None:
    with pytest.raises(Exception, match="scale_decoder_outputs: only kind: encoder_decoder has them"):
        NativeConfig(**{**SHAPE, "kind": kind, "scale_decoder_outputs": True})
