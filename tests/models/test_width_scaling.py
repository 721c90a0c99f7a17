"""muP: what starts, rates and outputs are, that activations do not grow with the width, and that exports compute the same."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.engine.logprob import Post
from llmrecipe.interop.plain_family import as_plain_family
from llmrecipe.models.native import (
    NativeConfig,
    NativeForCausalLM,
    NativeForImageClassification,
    NativeForMaskedLM,
    NativeForSeq2SeqLM,
)
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.optim.optimizers.adamw import AdamW
from llmrecipe.optim.optimizers.muon import Muon
from llmrecipe.optim.optimizers.sgd import SGD

BASE = 32
V = 48


def config(width: int, base: int | None = BASE, **more: Any) -> NativeConfig:
    return NativeConfig(
        **{
            "vocab_size": V, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 32, "mup_base_width": base, **more,
        }
    )  # fmt: skip


def decoder(width: int, base: int | None = BASE, seed: int = 0, **more: Any) -> NativeForCausalLM:
    torch.manual_seed(seed)
    return NativeForCausalLM(config(width, base, **more))


def ids() -> Tensor:
    return torch.randint(V, (4, 16), generator=torch.Generator().manual_seed(1))


def test_at_the_base_width_nothing_differs() -> None:
    plain, scaled = decoder(BASE, None), decoder(BASE)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    assert torch.equal(plain(ids()).logits, scaled(ids()).logits)
    rates = {g.lr for g in parameter_groups(scaled, AdamW(lr=1e-3))}
    assert rates == {1e-3} and Post.of(scaled.config) == Post()


def test_starts_rates_and_decays_of_a_model_eight_times_as_wide() -> None:
    experts = {"num_experts": 4, "num_shared_experts": 1, "shared_expert_gate": True}
    model = decoder(8 * BASE, **experts, tie_word_embeddings=False, initializer_range=0.1)
    groups = {name: g for g in parameter_groups(model, AdamW(lr=8e-3, weight_decay=0.1)) for name in g.names}
    block, residual = "model.decoder.layers.0.", math.sqrt(4)
    wanted = {
        "model.decoder.embed_tokens.weight": (0.1, 8e-3, 0.1),
        "lm_head.weight": (0.1, 8e-3, 0.1),
        f"{block}self_attn.q_proj.weight": (0.1 / 8**0.5, 1e-3, 0.8),
        f"{block}self_attn.o_proj.weight": (0.1 / 8**0.5 / residual, 1e-3, 0.8),
        f"{block}mlp.experts.gate_up_proj": (0.1 / 8**0.5, 1e-3, 0.8),
        f"{block}mlp.experts.down_proj": (0.1 / 8**0.5 / residual, 1e-3, 0.8),
        f"{block}mlp.router.weight": (0.1 / 8, 1e-3, 0.8),
        f"{block}mlp.shared_expert_gate.weight": (0.1 / 8, 1e-3, 0.8),
        f"{block}norm_attn.weight": (0.0, 8e-3, 0.0),
    }
    for name, tensor in model.named_parameters():
        if name in wanted:
            std, rate, decay = wanted.pop(name)
            assert float(tensor.detach().std()) == pytest.approx(std, rel=0.15), name
            assert (groups[name].lr, groups[name].weight_decay) == pytest.approx((rate, decay)), name
    assert not wanted


def test_inputs_and_relative_positions_keep_their_starts_and_rates() -> None:
    image = NativeForImageClassification(config(2 * BASE, kind="vision", positions="learned", image_size=8, num_labels=3))
    pair = NativeForSeq2SeqLM(config(2 * BASE, kind="encoder_decoder", positions="relative"))
    for name, tensor in (*image.named_parameters(), *pair.named_parameters()):
        if name.endswith((".relative.weight", "projection.weight", "class_token", "positions.weight", "embed_tokens.weight")):
            assert float(tensor.detach().std()) == pytest.approx(0.02, rel=0.25), name
    slow = {name for model in (image, pair) for name in model.learning_rate_scales()}
    assert "classifier.weight" in slow and "model.decoder.layers.1.cross_attn.k_proj.weight" in slow
    assert not [n for n in slow if n.endswith((".relative.weight", "patches.projection.weight", "embed_tokens.weight"))]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, math.sqrt(8) / 32),  # four heads at the base too, of 8
        ({"mup_base_head_dim": 32}, 1 / math.sqrt(32)),  # one head at the base, so heads have grown in number alone
        ({"positions": "relative"}, 8 / 32),
        ({"mup_base_width": None}, 1 / math.sqrt(32)),
        ({"mup_base_width": None, "positions": "relative"}, 1.0),
    ],
)
def test_scores_and_logits_by_hand(more: dict[str, Any], wanted: float) -> None:
    model = decoder(4 * BASE, **more) if "mup_base_width" not in more else decoder(4 * BASE, None, positions=more.get("positions", "rotary"))  # noqa: E501  # fmt: skip
    assert model.model.decoder.layers[0].self_attn.scaling == pytest.approx(wanted)
    hidden = model.model(ids()).last_hidden_state
    share = 1.0 if model.config.mup_base_width is None else 0.25
    torch.testing.assert_close(model(ids()).logits, share * (hidden @ model.lm_head.weight.T))
    assert Post.of(model.config).scale == share


def test_masked_heads_scale_their_logits() -> None:
    torch.manual_seed(0)
    model = NativeForMaskedLM(config(2 * BASE, kind="encoder"))
    hidden = model.model(ids()).last_hidden_state
    torch.testing.assert_close(model(ids()).logits, model.lm_head(hidden) / 2)


def growth(base: int | None, **more: Any) -> dict[str, float]:
    """The slope of log2(mean |x| after three steps of Adam) over log2(width), of the last states and of what logits moved."""
    widths, found = (32, 64, 128, 256), defaultdict[str, list[float]](list)
    for width in widths:
        sums = dict.fromkeys(("states", "logits"), 0.0)
        for seed in range(2):
            model = decoder(width, base, seed=seed, **more)
            optimizer = build_optimizer(AdamW(lr=1e-2), parameter_groups(model, AdamW(lr=1e-2)))
            start = model(ids()).logits.detach()
            for _ in range(3):
                model(ids(), labels=ids()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                out = model(ids(), output_hidden_states=True)
            sums["states"] += float(out.hidden_states[-2].abs().mean())
            sums["logits"] += float((out.logits - start).abs().mean())
        for name, value in sums.items():
            found[name].append(math.log2(value))
    x = [math.log2(width) for width in widths]
    return {name: statistics.linear_regression(x, y).slope for name, y in found.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_activations_do_not_grow_with_the_width(tied: bool) -> None:
    """The coordinate check of the paper (its section D): flat with muP, and a power of the width without."""
    scaled, plain = growth(BASE, tie_word_embeddings=tied), growth(None, tie_word_embeddings=tied)
    assert all(-0.3 < slope < 0.1 for slope in scaled.values()), scaled
    assert all(slope > 0.4 for slope in plain.values()), plain


@pytest.mark.parametrize("optimizer", [SGD(), Muon()])
def test_optimizers_of_another_kind_are_refused(optimizer: Any) -> None:
    with pytest.raises(RecipeError, match=r"optim\.kind: \w+ makes steps of another size"):
        parameter_groups(decoder(2 * BASE), optimizer)
    assert parameter_groups(decoder(2 * BASE, None), optimizer)


@pytest.mark.parametrize("more", [{}, {"qk_norm": True}, {"num_experts": 4}, {"tie_word_embeddings": False}])
def test_an_export_as_a_plain_family_computes_the_same(more: dict[str, Any]) -> None:
    model = decoder(4 * BASE, initializer_range=0.2, **more).eval()
    plain = as_plain_family(model)
    assert isinstance(plain, nn.Module) and not type(plain).__name__.startswith("Native")
    torch.testing.assert_close(plain(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mup_base_width": None, "mup_base_head_dim": 4}, "only with mup_base_width"),
        ({"scale_embedding": True}, "multiplies embeddings by more in wider models"),
        ({"mup_base_width": 0}, r"mup_base_width \(0\) must be at least 1"),
    ],
)
def test_configs_that_contradict_themselves(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NativeConfig(**{"mup_base_width": 32, **change})
