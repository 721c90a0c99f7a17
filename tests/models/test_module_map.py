"""Sites: exact paths for every family, rows of fused matrices, the target grammar, errors that teach."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models import site_finder
from llmrecipe.models.family import part_names_of
from llmrecipe.models.module_map import anatomy, name_by_hand
from tests.models.configs import FAMILIES, tiny

PARTS = ["attn", "attn.q", "attn.k", "attn.v", "attn.o", "mlp", "mlp.gate", "mlp.up", "mlp.down", "norm.attn", "norm.mlp"]


def row(home: str, *names: str) -> dict[str, str]:
    """Expected paths in layer 1, in the order of PARTS; '-' where the family has none."""
    return {part: f"{home}.{name}" for part, name in zip(PARTS, names, strict=True) if name != "-"}


LLAMA_LIKE = row(
    "model.layers.1",
    *["self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    *["mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"],
)
SANDWICH = LLAMA_LIKE | {"norm.mlp": "model.layers.1.pre_feedforward_layernorm"}
SPARSE = {key: path for key, path in LLAMA_LIKE.items() if not key.startswith("mlp.")} | {
    "experts": "model.layers.1.mlp.experts",
    "router": "model.layers.1.mlp.gate",
}
LATENT = SPARSE | {
    "attn.q_a": "model.layers.1.self_attn.q_a_proj",
    "attn.q": "model.layers.1.self_attn.q_b_proj",
    "attn.kv_a": "model.layers.1.self_attn.kv_a_proj_with_mqa",
    "attn.kv": "model.layers.1.self_attn.kv_b_proj",
    "attn.k": "model.layers.1.self_attn.kv_b_proj",
    "attn.v": "model.layers.1.self_attn.kv_b_proj",
    "shared.down": "model.layers.1.mlp.shared_experts.down_proj",
}


def bert_like(name: str) -> dict[str, str]:
    return row(
        f"{name}.encoder.layer.1",
        *["attention.self", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
        *["-", "-", "intermediate.dense", "output.dense", "attention.output.LayerNorm", "output.LayerNorm"],
    )


EXPECTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma"], LLAMA_LIKE),
    **dict.fromkeys(["gemma2", "gemma3_text"], SANDWICH),
    "phi": row(
        "model.layers.1",
        *["self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"],
        *["mlp", "-", "mlp.fc1", "mlp.fc2", "input_layernorm", "-"],
    ),
    "phi3": row(
        "model.layers.1",
        *["self_attn", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj"],
        *["mlp", "mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"],
    ),
    "gpt2": row(
        "transformer.h.1",
        *["attn", "attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"],
        *["mlp", "-", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"],
    ),
    "gpt_neox": row(
        "gpt_neox.layers.1",
        *[
            "attention",
            "attention.query_key_value",
            "attention.query_key_value",
            "attention.query_key_value",
            "attention.dense",
        ],
        *["mlp", "-", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "input_layernorm", "post_attention_layernorm"],
    ),
    "opt": row(
        "model.decoder.layers.1",
        *["self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"],
        *["-", "-", "fc1", "fc2", "self_attn_layer_norm", "final_layer_norm"],
    ),
    "bert": bert_like("bert"),
    "roberta": bert_like("roberta"),
    "distilbert": row(
        "distilbert.transformer.layer.1",
        *["attention", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"],
        *["ffn", "-", "ffn.lin1", "ffn.lin2", "sa_layer_norm", "output_layer_norm"],
    ),
    "t5": row(
        "decoder.block.1.layer",
        *["0.SelfAttention", "0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o"],
        *["2.DenseReluDense", "-", "2.DenseReluDense.wi", "2.DenseReluDense.wo", "0.layer_norm", "2.layer_norm"],
    )
    | {"cross.q": "decoder.block.1.layer.1.EncDecAttention.q", "norm.cross": "decoder.block.1.layer.1.layer_norm"},
    "bart": row(
        "model.decoder.layers.1",
        *["self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"],
        *["-", "-", "fc1", "fc2", "self_attn_layer_norm", "final_layer_norm"],
    )
    | {"cross.v": "model.decoder.layers.1.encoder_attn.v_proj", "norm.cross": "model.decoder.layers.1.encoder_attn_layer_norm"},
    "mixtral": SPARSE,
    "qwen2_moe": SPARSE | {"shared.down": "model.layers.1.mlp.shared_expert.down_proj"},
    "qwen3_moe": SPARSE,
    "olmoe": SPARSE,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}
EMBED_HEAD = {
    "gpt2": ("transformer.wte", "lm_head"),
    "gpt_neox": ("gpt_neox.embed_in", "lm_head"),
    "opt": ("model.decoder.embed_tokens", "lm_head"),
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "roberta": ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    "distilbert": ("distilbert.embeddings.word_embeddings", "vocab_projector"),
    "t5": ("shared", "lm_head"),
    "bart": ("model.shared", "lm_head"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_of_every_role(family: str) -> None:
    model = tiny(family)
    parts = anatomy(model)
    side = "decoder" if any(s.side == "decoder" for s in parts.sites) else "encoder"
    found: dict[str, str] = {}
    for site in parts.sites:
        if site.layer == 1 and site.side == side:
            found.setdefault(site.role, site.path)
    expected = EXPECTED[family]
    assert {role: found.get(role) for role in expected} == expected
    missing = [part for part in PARTS if part not in expected]
    assert not [part for part in missing if part in found]
    assert (parts.at("embed")[0].path, parts.at("head")[0].path) == EMBED_HEAD.get(family, ("model.embed_tokens", "lm_head"))
    assert (parts.layers, parts.width, parts.heads) == (2, 32, 4)
    assert parts.source == "family"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_parameter_belongs_to_a_site(family: str) -> None:
    """A pattern that misses a matrix would leave it out of `all-linear` in silence."""
    model = tiny(family)
    leaves = [s.path for s in anatomy(model).sites if s.role not in ("block", "attn", "cross", "mlp", "shared")]
    homes = [s.path + "." for s in anatomy(model).sites if s.role == "block"]
    inside = [name for name, _ in model.named_parameters() if name.startswith(tuple(homes))]
    assert [name for name in inside if not name.startswith(tuple(leaf + "." for leaf in leaves))] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_are_those_of_the_computation(family: str) -> None:
    """Widths, also of Conv1D and of 2-D router weights, equal the last sizes that go in and come out."""
    model, parts = tiny(family), anatomy(tiny(family))
    seen: dict[str, tuple[int, int]] = {}

    def record(path: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
                seen[path] = (inputs[0].shape[-1], output.shape[-1])

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(record(path))
    ids = torch.arange(3, 9)[None]
    extra = {"decoder_input_ids": ids} if parts.encoder_decoder else {}
    model(input_ids=ids, **extra)
    checked = 0
    for site in parts.sites:
        if site.path in seen and site.rows is None and not site.role.startswith(("embed", "experts")):
            assert (site.width_in, site.width_out) == seen[site.path], site.path
            checked += 1
    assert checked >= 12


FUSED = ["gpt2", "gpt_neox", "phi3", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("family", FUSED)
def test_fused_rows_are_the_values_the_attention_uses(family: str) -> None:
    """Rows sliced from the fused projection equal the q, k, v handed to the attention function.

    Values carry no rotary turn, so they compare directly; queries and keys at position 0 are not turned either.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny(family)
    parts = anatomy(model)
    calls: list[tuple[torch.Tensor, ...]] = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object, **kwargs: object) -> object:
        calls.append((q, k, v))
        return stock(module, q, k, v, *args, **kwargs)

    outputs: dict[str, torch.Tensor] = {}
    for site in parts.at("attn.q|k|v"):
        site.module.register_forward_hook(lambda m, i, o, path=site.path: outputs.__setitem__(path, o))
    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register("spy", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("spy")
    model(input_ids=torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0)))

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    for layer in range(2):
        used = dict(zip("qkv", calls[layer], strict=True))
        value = parts.at(f"layers.{layer}.attn.v")[0]
        assert torch.equal(outputs[value.path].view(2, 6, -1)[..., list(value.indices())], heads(used["v"]))
        if not family.startswith("deepseek"):
            for part in "qk":
                site = parts.at(f"layers.{layer}.attn.{part}")[0]
                sliced = outputs[site.path][..., list(site.indices())]
                assert torch.allclose(sliced[:, 0], heads(used[part])[:, 0], atol=1e-6)
        else:
            key = parts.at(f"layers.{layer}.attn.k")[0]
            unturned = used["k"][..., : model.config.qk_nope_head_dim]
            assert torch.equal(outputs[key.path].view(2, 6, -1)[..., list(key.indices())], heads(unturned))


def test_gate_and_up_are_the_halves_the_feed_forward_uses() -> None:
    model = tiny("phi3")
    gate, up = anatomy(model).at("layers.0.mlp.gate|up")
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    whole = gate.module(x)
    mlp = anatomy(model).at("layers.0.mlp")[0].module
    by_hand = mlp.down_proj(nn.functional.silu(whole[..., list(gate.indices())]) * whole[..., list(up.indices())])
    assert torch.allclose(mlp(x), by_hand, atol=1e-7)


def test_expert_tensors() -> None:
    parts = anatomy(tiny("mixtral"))
    gate_up, down = parts.at("layers.0.experts")
    assert (gate_up.tensor, gate_up.experts, gate_up.width_in, gate_up.width_out) == ("gate_up_proj", 4, 32, 96)
    assert (down.tensor, down.width_in, down.width_out) == ("down_proj", 48, 32)
    assert (gate_up.name("lora"), down.name("lora")) == ("lora__gate_up", "lora__down")
    assert [s.chosen for s in parts.at("layers.0.experts.0|3")] == [(0, 3), (0, 3)]
    assert [s.chosen for s in parts.at("layers.0.experts.0 + experts.down.2")] == [(0,), (0, 2), (2,)]
    assert {s.chosen for s in parts.at("experts.1 + experts")} == {None}
    with pytest.raises(ModelError, match="experts 0 to 3"):
        parts.at("experts.4")


def test_names_of_hooks_differ_where_one_module_holds_several_sites() -> None:
    q, k, v = anatomy(tiny("gpt2")).at("layers.0.attn.q|k|v")
    assert [site.name("lora") for site in (q, k, v)] == ["lora__q", "lora__k", "lora__v"]
    assert anatomy(tiny("llama")).at("layers.0.attn.q")[0].name("lora") == "lora"


@pytest.mark.parametrize(
    ("target", "paths"),
    [
        ("attn.q|v", ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]),
        ("layers.0:1.mlp.down", ["0.mlp.down_proj"]),
        ("layers.-1.block", ["1"]),
        ("layers.-1:.mlp", ["1.mlp"]),
        ("layers.0|1.attn.o", ["0.self_attn.o_proj", "1.self_attn.o_proj"]),
        ("layers.*.mlp.up", ["0.mlp.up_proj", "1.mlp.up_proj"]),
        ("layers.1.attn|mlp", ["1.self_attn", "1.mlp"]),
        ("layers.1.mlp.down + layers.0.attn.q", ["0.self_attn.q_proj", "1.mlp.down_proj"]),
        ("layers.0.mlp.*", ["0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"]),
        ("layers.0.attn.q + layers.0.attn.q|q", ["0.self_attn.q_proj"]),
        ("decoder.layers.0.norm", ["0.input_layernorm", "0.post_attention_layernorm"]),
    ],
)
def test_target_grammar(target: str, paths: list[str]) -> None:
    assert [s.path for s in anatomy(tiny("llama")).at(target)] == [f"model.layers.{path}" for path in paths]


def test_all_linear_takes_fused_matrices_once_and_leaves_head_and_experts_out() -> None:
    for family, count in {
        "llama": 14,
        "gpt2": 8,
        "phi3": 8,
        "gpt_neox": 8,
        "opt": 12,
        "bert": 12,
        "t5": 32,
        "mixtral": 8,
    }.items():
        found = anatomy(tiny(family)).at("all-linear")
        assert len({site.path for site in found}) == len(found) == count, family
        assert not [site for site in found if site.rows is not None]


def test_sides_and_cross_attention() -> None:
    parts = anatomy(tiny("t5"))
    assert [s.path for s in parts.at("decoder.layers.1:.cross.k|v")] == [
        "decoder.block.1.layer.1.EncDecAttention.k",
        "decoder.block.1.layer.1.EncDecAttention.v",
    ]
    assert {s.side for s in parts.at("attn.q")} == {"encoder", "decoder"}
    assert {s.path for s in parts.at("encoder.norm.final")} == {"encoder.final_layer_norm"}
    assert len(parts.at("norm")) == 2 + 4 + 6


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("llama", "attn.qq", "did you mean 'attn.q'"),
        ("llama", "layers.2.mlp", "it has 2 layers, numbered 0 to 1"),
        ("llama", "q_proj", "the module model.layers.0.self_attn.q_proj is the site 'attn.q'"),
        ("llama", "layers.0:1", "write 'layers.0:1.block'"),
        ("llama", "layers.a.mlp", "malformed range"),
        ("llama", "attn.q + ", "an empty term"),
        ("llama", "cross.k", "only encoder-decoder models have cross-attention"),
        ("llama", "attn.q|x", "matches nothing"),
        ("opt", "mlp", "its feed-forward has no module of its own"),
        ("mixtral", "mlp.down", "its feed-forward is a mixture: use 'experts'"),
    ],
)
def test_a_target_that_matches_nothing_explains_itself(family: str, target: str, message: str) -> None:
    with pytest.raises(ModelError) as error:
        anatomy(tiny(family)).at(target)
    assert message in str(error.value)
    if "matches nothing" in str(error.value):
        assert "attn.q " in str(error.value) and "self_attn.q_proj" in str(error.value)  # the anatomy is printed


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_finds_what_the_table_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its row, a family keeps its attention and feed-forward sites (wholes, where matrices are fused)."""
    model = tiny(family)
    roles = ("block", "attn", "cross", "mlp", "experts", "router", "embed", "head", "norm.final")
    known = {(s.role, s.path) for s in anatomy(model).sites if s.rows is None and s.role.startswith(roles)}
    row = part_names_of(model.config.model_type)
    monkeypatch.setattr(site_finder, "part_names_of", lambda model_type: None)
    inferred = site_finder.build_anatomy(model)
    assert inferred.source == "inference"
    found = {(s.role, s.path) for s in inferred.sites}
    assert {pair for pair in known if not pair[0].startswith("embed.")} - found == set()
    assert row is not None and inferred.causal == row.causal


def test_anatomy_by_hand() -> None:
    class Blocks(nn.Module):
        pass

    model = tiny("llama")
    model.model.stages = model.model.layers
    del model.model.layers
    for block in model.model.stages:
        block.mixer = block.self_attn
        del block.self_attn
    with pytest.raises(ModelError, match=r"anatomy: \{layers: model.blocks"):
        anatomy(model)
    name_by_hand(model, {"layers": "model.stages", "attn": "mixer", "attn.q": "mixer.q_proj", "norm.final": "model.norm"})
    parts = anatomy(model)
    assert parts.source == "recipe"
    assert [s.path for s in parts.at("attn.q")] == ["model.stages.0.mixer.q_proj", "model.stages.1.mixer.q_proj"]
    assert parts.at("norm.final")[0].path == "model.norm"
    assert parts.at("layers.0.mlp.down")[0].path == "model.stages.0.mlp.down_proj"


def test_kept_anatomy_follows_the_model() -> None:
    model = tiny("llama")
    first = anatomy(model)
    assert anatomy(model) is first
    model.resize_token_embeddings(70)
    assert anatomy(model).at("embed")[0].module is model.get_input_embeddings()
    twin = copy.deepcopy(model)
    assert anatomy(twin).at("embed")[0].module is twin.get_input_embeddings()
    assert anatomy(twin).at("embed")[0].module is not model.get_input_embeddings()


def test_four_bit_layers_keep_their_logical_widths() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny("llama")
    dense = model.model.layers[0].mlp.down_proj
    packed = bitsandbytes.nn.Linear4bit(48, 32, bias=False, quant_type="nf4")
    packed.load_state_dict(dense.state_dict())
    model.model.layers[0].mlp.down_proj = packed.to("cpu")
    site = anatomy(model).at("layers.0.mlp.down")[0]
    assert site.module.weight.shape != (32, 48)
    assert (site.width_in, site.width_out) == (48, 32)


def test_facts_about_the_shape() -> None:
    assert anatomy(tiny("gpt_neox")).parallel_blocks and anatomy(tiny("phi")).parallel_blocks
    assert not anatomy(tiny("gpt_neox", use_parallel_residual=False)).parallel_blocks
    assert not anatomy(tiny("bert")).pre_norm and anatomy(tiny("t5")).pre_norm
    assert not anatomy(tiny("opt", do_layer_norm_before=False)).pre_norm
    assert anatomy(tiny("llama")).rope and not anatomy(tiny("gpt2")).rope
    assert anatomy(tiny("llama")).causal and not anatomy(tiny("bert")).causal
    assert (anatomy(tiny("llama")).kv_heads, anatomy(tiny("deepseek_v3")).head_dim) == (2, 12)
    assert anatomy(tiny("olmoe")).ffn_width == 16
