"""The native transformer: causality, caches, padding, counts, gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmrecipe.models.module_map import anatomy
from llmrecipe.models.native import (
    NativeConfig,
    NativeForCausalLM,
    NativeForMaskedLM,
    NativeForSeq2SeqLM,
    NativeForSequenceClassification,
)
from llmrecipe.models.sinusoids import sinusoids

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
GPT_2 = {"positions": "learned", "norm": "layernorm", "norm_eps": 1e-5, "gated": False, "bias": True, "hidden_act": "gelu_new"}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": GPT_2,
    "original": {"positions": "sinusoidal", "norm": "layernorm", "pre_norm": False, "gated": False, "scale_embedding": True},
    "relative": {"positions": "relative", "gated": False, "hidden_act": "relu", "tie_word_embeddings": False},
    "none": {"positions": "none", "bias": True, "embed_norm": True},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 2, "qk_norm": True},
    "mixture": {"num_experts": 4, "moe_intermediate_size": 24, "num_shared_experts": 1, "shared_expert_gate": True},
    "switch": {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False, "gated": False, "bias": True},
}


def native(variant: str = "llama", kind: str = "decoder", scale: float = 5.0, **more: Any) -> Any:
    """A seeded model whose weights are large enough for differences to show."""
    classes = {"decoder": NativeForCausalLM, "encoder": NativeForMaskedLM, "encoder_decoder": NativeForSeq2SeqLM}
    torch.manual_seed(0)
    model = classes[kind](NativeConfig(kind=kind, **{**SHAPE, **VARIANTS[variant], **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def ids(rows: int = 2, columns: int = 9) -> torch.Tensor:
    return torch.randint(3, 64, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_later_tokens_change_nothing_before_them(variant: str, backend: str) -> None:
    model = native(variant)
    model.set_attn_implementation(backend)
    # Kernels that group tokens by expert round by the size of a group; this one takes each token by itself.
    model.set_experts_implementation("batched_mm")
    x = ids(1, 10)
    y = x.clone()
    y[0, 6] = (y[0, 6] + 7) % 60 + 3
    a, b = model(x).logits, model(y).logits
    assert torch.equal(a[:, :6], b[:, :6])
    assert (a[:, 6:] - b[:, 6:]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_sdpa_equals_eager(variant: str) -> None:
    model = native(variant)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    model.set_attn_implementation("sdpa")
    a = model(ids(), attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation("eager")
    assert torch.allclose(a, model(ids(), attention_mask=mask).logits[mask.bool()], atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_equals_no_cache(variant: str) -> None:
    model = native(variant)
    x = ids(2, 10)
    whole = model(x, use_cache=False).logits
    out = model(x[:, :4], use_cache=True)
    steps = [out.logits]
    for t in range(4, 10):
        out = model(x[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert torch.allclose(whole, torch.cat(steps, 1), atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padding_equals_right_padding(variant: str) -> None:
    model = native(variant)
    x = ids(1, 6)
    pad = torch.zeros(1, 3, dtype=torch.long)
    ones, zeros = torch.ones(1, 6, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    bare = model(x).logits
    right = model(torch.cat((x, pad), 1), attention_mask=torch.cat((ones, zeros), 1)).logits[:, :6]
    left = model(torch.cat((pad, x), 1), attention_mask=torch.cat((zeros, ones), 1)).logits[:, 3:]
    assert torch.allclose(bare, right, atol=2e-5)
    assert torch.allclose(bare, left, atol=2e-5)
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    from_left = model.generate(torch.cat((pad, x), 1), attention_mask=torch.cat((zeros, ones), 1), **greedy)[:, -4:]
    assert torch.equal(from_left, model.generate(x, attention_mask=ones, **greedy)[:, -4:])


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_of_the_parameter_count(kind: str, variant: str) -> None:
    for changes in ({}, {"bias": True}, {"tie_word_embeddings": False}, {"type_vocab_size": 2, "head_dim": 6}):
        if kind == "encoder" and not {**VARIANTS[variant], **changes}.get("tie_word_embeddings", True):
            continue
        model = native(variant, kind, **changes)
        assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count(), changes


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_first_loss_is_the_logarithm_of_the_vocabulary(variant: str, kind: str) -> None:
    model = native(variant, kind, scale=1.0, router_aux_loss_coef=0.0)
    x = ids(8, 32)
    assert model(x, labels=x).loss.item() == pytest.approx(math.log(64), rel=0.05)


def test_residual_projections_start_smaller() -> None:
    model = NativeForCausalLM(NativeConfig(**{**SHAPE, "hidden_size": 128, "num_hidden_layers": 8}))
    layer = model.model.decoder.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.model.decoder.embed_tokens.weight[0].abs().max() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_float64(variant: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 3, "head_dim": 4, "vocab_size": 11}
    model = native(variant, **sizes, num_attention_heads=2, num_key_value_heads=1)
    model = model.double()
    model.set_experts_implementation("eager")
    x = torch.tensor([[3, 5, 7, 4]])
    inner = {"mixture": "experts.gate_up_proj", "switch": "experts.up_proj"}.get(variant, "up_proj.weight")
    names = ["layers.1.self_attn.k_proj.weight", f"layers.0.mlp.{inner}", "layers.0.norm_attn.weight"]
    names += ["layers.0.mlp.router.weight"] if model.config.num_experts else []
    parameters = dict(model.model.decoder.named_parameters())
    for name in names:

        def loss(value: torch.Tensor, name: str = name) -> torch.Tensor:
            full = {f"model.decoder.{name}": value}
            return torch.func.functional_call(model, full, (x,), {"labels": x, "use_cache": False}).logits.logsumexp(-1).sum()

        value = parameters[name].detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, (value,), atol=1e-4, fast_mode=True)


def test_sinusoids() -> None:
    """PE[t, 0] = sin t, PE[t, 1] = cos t, PE[t, 2] = sin(t / 100) for D = 4."""
    table = sinusoids(torch.tensor([[0, 1, 3]]), 4)[0]
    expected = [[math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)] for t in (0, 1, 3)]
    assert torch.allclose(table, torch.tensor(expected))


def test_an_encoder_without_positions_does_not_see_order() -> None:
    model = native("none", "encoder")
    x = ids(1, 8)
    order = torch.tensor([3, 1, 0, 2, 7, 5, 6, 4])
    assert torch.allclose(model(x).logits[:, order], model(x[:, order]).logits, atol=2e-5)
    assert not torch.allclose(native("llama", "encoder")(x).logits[:, order], native("llama", "encoder")(x[:, order]).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_decoder_cache_and_padding(variant: str) -> None:
    model = native(variant, "encoder_decoder")
    source, target = ids(2, 7), ids(2, 6)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    whole = model(source, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
    short = model(source[1:, :4], decoder_input_ids=target[1:], use_cache=False).logits
    assert torch.allclose(whole[1:], short, atol=3e-5)
    changed = source.clone()
    changed[0, 6] = changed[0, 6] % 60 + 4
    assert (model(changed, attention_mask=mask, decoder_input_ids=target).logits - whole)[0].abs().max() > 1e-3
    out = model(source, attention_mask=mask, decoder_input_ids=target[:, :2], use_cache=True)
    steps = [out.logits]
    for t in range(2, 6):
        kwargs = {"attention_mask": mask, "past_key_values": out.past_key_values, "use_cache": True}
        out = model(source, decoder_input_ids=target[:, t : t + 1], **kwargs)
        steps.append(out.logits)
    assert torch.allclose(whole, torch.cat(steps, 1), atol=3e-5)
    made = model.generate(source, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert made.shape[0] == 2


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model = native("llama", kind)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    extra = {"decoder_input_ids": ids()} if kind == "encoder_decoder" else {}
    assert torch.equal(model(ids(), **extra).logits, again.eval()(ids(), **extra).logits)
    passing = ("_name_or_path", "dtype")
    facts = [{k: v for k, v in m.config.to_dict().items() if k not in passing} for m in (model, again)]
    assert facts[0] == facts[1]
    weights = [again.get_input_embeddings().weight, again.get_output_embeddings().weight]
    assert weights[0] is weights[1]


def test_both_sides_share_one_table_also_with_a_head_of_its_own(tmp_path: Path) -> None:
    model = native("relative", "encoder_decoder")
    model.save_pretrained(tmp_path)
    again = NativeForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert again.model.encoder.embed_tokens.weight is again.model.decoder.embed_tokens.weight
    assert again.lm_head.weight is not again.model.encoder.embed_tokens.weight
    assert torch.equal(model(ids(), decoder_input_ids=ids()).logits, again(ids(), decoder_input_ids=ids()).logits)


def test_auto_classes_know_it() -> None:
    config = AutoConfig.for_model("llmrecipe_native", **SHAPE)
    assert isinstance(AutoModelForCausalLM.from_config(config), NativeForCausalLM)
    with pytest.raises(ValueError, match="needs kind: encoder"):
        NativeForMaskedLM(NativeConfig(**SHAPE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "rotory"}, "positions: 'rotory' is not one of rotary"),
        ({"hidden_size": 33}, "no multiple of 4 heads"),
        ({"num_key_value_heads": 3}, "no multiple of 3"),
        ({"head_dim": 5}, "must be even"),
    ],
)
def test_shapes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        NativeConfig(**{**SHAPE, **change})


def test_logits_to_keep_and_hidden_states() -> None:
    model = native("llama")
    whole = model(ids(), output_hidden_states=True)
    assert torch.allclose(model(ids(), logits_to_keep=2).logits, whole.logits[:, -2:], atol=1e-6)
    assert len(whole.hidden_states) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_the_same_gradients(variant: str) -> None:
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = native(variant).train()
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(ids(), labels=ids(), use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_anatomy_of_the_native_family() -> None:
    parts = anatomy(native("llama"))
    assert parts.source == "family" and parts.rope and parts.causal and parts.pre_norm
    assert parts.at("layers.1.attn.q")[0].path == "model.decoder.layers.1.self_attn.q_proj"
    assert len(parts.at("all-linear")) == 14
    both = anatomy(native("relative", "encoder_decoder"))
    assert [s.path for s in both.at("decoder.layers.0.cross.k")] == ["model.decoder.layers.0.cross_attn.k_proj"]
    assert not anatomy(native("original", "encoder")).pre_norm and not anatomy(native("llama", "encoder")).causal


def test_classifier_pools_the_last_real_token() -> None:
    torch.manual_seed(0)
    model = NativeForSequenceClassification(NativeConfig(**SHAPE, num_labels=3)).eval()
    x = ids(1, 6)
    padded = torch.cat((x, torch.zeros(1, 2, dtype=torch.long)), 1)
    mask = (padded != 0).long()
    assert torch.allclose(model(x).logits, model(padded, attention_mask=mask).logits, atol=1e-5)
