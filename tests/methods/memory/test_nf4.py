"""4-bit base weights: levels, codes, scales, gradients, memory, eval in the middle of training, and the way back."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.quantized import bits_of, dense_weight, quantized
from llmrecipe.methods.memory.nf4 import Nf4, dequantize_model, packed_bytes

bnb = pytest.importorskip("bitsandbytes")


# --- the reference: NF4 written out -----------------------------------------------------------------------------------


def nf4_levels() -> Tensor:
    """Quantiles of N(0, 1): 8 above zero, 7 below, an exact zero, scaled to [-1, 1]."""
    delta = 0.9677083
    above = norm.ppf(torch.linspace(delta, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    below = -norm.ppf(torch.linspace(delta, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    levels = torch.tensor(sorted([*above, 0.0, *below]))
    return (levels / levels.max()).float()


def quantize_by_hand(w: Tensor, levels: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """(codes, scales): c = max |w| of a block, code = argmin |w / c - q|."""
    blocks = w.reshape(-1, block)
    scale = blocks.abs().amax(1)
    scaled = blocks * (1.0 / scale)[:, None]
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(scaled, middles).flatten(), scale


def tiny_llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, **{**sizes, **options}))


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **still))


IDS = torch.arange(24).reshape(2, 12)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_levels_are_normal_quantiles() -> None:
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type("nf4", device="cpu")
    assert torch.allclose(nf4_levels(), table, atol=2e-7, rtol=0)
    assert (table == 0).sum() == 1 and table.min() == -1 and table.max() == 1 and (table > 0).sum() == 8


def test_codes_scales_and_nibbles_equal_the_library_exactly() -> None:
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

    torch.manual_seed(1)
    w = torch.randn(32, 128)
    table = get_4bit_type("nf4", device="cpu")
    codes, scale = quantize_by_hand(w, table)
    packed, state = quantize_4bit(w, blocksize=64, compress_statistics=False, quant_type="nf4")
    assert torch.equal((codes[0::2] << 4 | codes[1::2]).to(torch.uint8), packed.flatten())
    assert torch.equal(state.absmax, scale)
    by_hand = (table[codes].reshape(-1, 64) * scale[:, None]).reshape(32, 128)
    assert torch.equal(by_hand, dequantize_4bit(packed, state))


def test_the_wrapper_stores_the_reference_weight() -> None:
    from bitsandbytes.functional import get_4bit_type

    model = tiny_llama()
    w = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    Nf4(name="nf4", double=False).attach(model)
    codes, scale = quantize_by_hand(w, get_4bit_type("nf4", device="cpu"))
    expected = (get_4bit_type("nf4", device="cpu")[codes].reshape(-1, 64) * scale[:, None]).reshape(w.shape)
    assert torch.equal(dense_weight(model.model.layers[0].mlp.up_proj), expected)


def test_a_layer_multiplies_by_its_weight_and_hands_its_codes_over_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library read (codes, 1) as a transposed weight before 0.50, which a square layer does not show by its shape."""
    model, seen = tiny_llama(), []
    Nf4(name="nf4").attach(model)
    product = bnb.matmul_4bit

    def noted(x: Tensor, codes: Tensor, **options: object) -> Tensor:
        seen.append(tuple(codes.shape))
        return product(x, codes, **options)

    monkeypatch.setattr(bnb, "matmul_4bit", noted)
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj):
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ dense_weight(layer).T, rtol=1e-5, atol=1e-5)
    assert seen == [(1, 64 * 64 // 2), (1, 64 * 128 // 2)]


def test_nf4_beats_fp4_beats_int4_on_normal_weights() -> None:
    torch.manual_seed(2)
    w = torch.randn(256, 256)

    def error(kind: str) -> float:
        if kind == "int4":
            c = w.reshape(-1, 64).abs().amax(1, keepdim=True)
            q = (w.reshape(-1, 64) / c * 7).round().clamp(-7, 7) * c / 7
            return float((q.reshape_as(w) - w).norm() / w.norm())
        layer = nn.ModuleDict({"a": nn.Linear(256, 256, bias=False)})
        layer["a"].weight.data = w.clone()
        Nf4(name="q", type=kind).attach(layer)
        return float((dense_weight(layer["a"]) - w).norm() / w.norm())

    assert error("nf4") == pytest.approx(0.092, abs=0.003)
    assert error("nf4") < error("fp4") and error("nf4") < error("int4")


@pytest.mark.parametrize("double", [False, True])
def test_memory_is_the_closed_form(double: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(1024, 1024, bias=False)})
    wrapper = Nf4(name="q", double=double)
    wrapper.attach(model)
    state = model["a"].weight.quant_state
    tensors = [model["a"].weight.data, state.absmax, state.code]
    if double:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    measured = sum(t.numel() * t.element_size() for t in tensors)
    assert measured == packed_bytes(1024 * 1024, double) == wrapper.memory(model)["base_bytes"]
    bits = 8 * packed_bytes(2**30, double) / 2**30
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) if double else 4.5, abs=1e-4)


def test_double_quantization_changes_outputs_by_less_than_one_percent() -> None:
    x = torch.randn(32, 512)
    weight = torch.randn(512, 512)
    outputs = []
    for double in (False, True):
        model = nn.ModuleDict({"a": nn.Linear(512, 512, bias=False)})
        model["a"].weight.data = weight.clone()
        Nf4(name="q", double=double).attach(model)
        outputs.append(model["a"](x))
    assert 0 < (outputs[0] - outputs[1]).norm() / outputs[0].norm() < 0.01


# --- gradients and modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_input_gradient_equal_the_dequantized_layer(bias: bool) -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.Linear(128, 96, bias=bias)})
    Nf4(name="q").attach(model)
    dense = nn.Linear(128, 96, bias=bias)
    dense.weight.data = dense_weight(model["a"])
    if bias:
        dense.bias.data = model["a"].bias.data.clone()
    x, y = (torch.randn(2, 5, 128).requires_grad_() for _ in range(2))
    y.data = x.data.clone()
    out, expected = model["a"](x), dense(y)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(x.grad, y.grad, atol=1e-4, rtol=1e-5)
    assert model["a"].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_evaluation_in_the_middle_of_training(dtype: torch.dtype, build) -> None:
    """The library alone repacks the weight in eval mode; the next training forward of a layer with a bias then fails."""
    model = build().to(dtype)
    stack = Stack([Nf4(name="nf4"), registry.load_class("stack", "lora")(name="lora", target="attn.o")])
    stack.attach(model)
    packed = {path: module.weight.data.clone() for path, module in quantized(model)}

    def train_step() -> float:
        model.train()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        return float(loss.detach())

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return float(model(IDS, labels=IDS).loss)

    first, between, again = train_step(), evaluate(), train_step()
    assert first == again
    assert between == first
    for path, module in quantized(model):
        assert torch.equal(module.weight.data, packed[path]) and module.weight.shape == packed[path].shape


def test_the_library_alone_still_has_the_defect() -> None:
    """Why `bnb_layers` exists; when this fails, the override can go."""
    layer = bnb.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so the library does not repack")
    shape = layer.weight.shape
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64, dtype=torch.bfloat16))
    assert layer.weight.shape != shape


def test_a_trained_bias_keeps_its_dtype() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    Nf4(name="q", compute_dtype="bfloat16").attach(model)
    model["a"].bias.requires_grad_(True)
    model["a"](torch.randn(3, 64)).sum().backward()
    assert model["a"].bias.dtype == torch.float32
    assert torch.allclose(model["a"].bias.grad, torch.full((64,), 3.0))


def test_autocast_decides_the_dtype_of_the_product() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    Nf4(name="q").attach(model)
    assert model["a"](torch.randn(2, 64)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model["a"](torch.randn(2, 64)).dtype == torch.bfloat16


# --- which layers -----------------------------------------------------------------------------------------------------


def test_heads_embeddings_norms_and_skipped_layers_stay() -> None:
    model = tiny_llama()
    Nf4(name="nf4", skip=["o_proj", "layers.1.mlp"]).attach(model)
    paths = {path for path, _ in quantized(model)}
    assert "model.layers.0.self_attn.q_proj" in paths and "model.layers.0.mlp.up_proj" in paths
    assert not any("o_proj" in p or "layers.1.mlp" in p or "lm_head" in p or "embed" in p for p in paths)
    assert type(model.lm_head) is nn.Linear


def test_a_weight_shared_with_another_module_stays_dense() -> None:
    model = nn.Module()
    model.table = nn.Embedding(96, 64)
    model.reader = nn.Linear(64, 96, bias=False)
    model.other = nn.Linear(64, 64)
    model.reader.weight = model.table.weight
    Nf4(name="q").attach(model)
    assert bits_of(model.reader) is None and bits_of(model.other) == 4


def test_quantized_weights_never_train_whatever_their_storage() -> None:
    for storage in ("uint8", "bfloat16"):
        model = tiny_llama()
        stack = Stack([Nf4(name="nf4", storage=storage)])
        stack.attach(model)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert "model.norm.weight" in trained
        assert not any(".q_proj." in n or ".up_proj." in n for n in trained)
        assert torch.isfinite(model(IDS).logits).all()


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(ModelError, match="no linear layer to quantize"):
        Nf4(name="nf4").attach(nn.ModuleDict({"e": nn.Embedding(4, 4)}))


def test_two_quantizers_are_refused() -> None:
    int8 = registry.load_class("stack", "int8")
    with pytest.raises(RecipeError, match="keep one"):
        Stack([Nf4(name="a"), int8(name="b")])


def test_meta_skeleton_weighs_what_the_packed_model_weighs() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)
    wrapper = Nf4(name="nf4")
    stack = Stack([wrapper, registry.load_class("stack", "lora")(name="lora", target="all-linear")])
    stack.attach(model)
    real = tiny_llama()
    wrapper.attach(real)
    assert wrapper.memory(model) == wrapper.memory(real)
    skeleton = dict(model.named_parameters())
    for name, parameter in real.named_parameters():
        assert skeleton[name].shape == parameter.shape and skeleton[name].dtype == parameter.dtype, name


# --- loading, copying, going back -------------------------------------------------------------------------------------


def test_loading_in_4_bits_equals_converting_in_memory(tmp_path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    wrapper = Nf4(name="nf4", skip=["down_proj"])
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **wrapper.load_kwargs())
    wrapper.attach(loaded)
    wrapper.attach(model)
    assert {p for p, _ in quantized(loaded)} == {p for p, _ in quantized(model)}
    for (_, a), (_, b) in zip(quantized(loaded), quantized(model), strict=True):
        assert torch.equal(a.weight.data, b.weight.data) and type(a) is type(b)
    assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_dequantized_model_computes_the_same_and_saves_as_an_ordinary_one(build, tmp_path) -> None:
    plain = build()
    plain.save_pretrained(tmp_path / "base")
    wrapper = Nf4(name="nf4")
    model = type(plain).from_pretrained(tmp_path / "base", dtype=torch.float32, **wrapper.load_kwargs()).eval()
    stack = Stack([wrapper, registry.load_class("stack", "lora")(name="lora", target="attn.o + mlp.down")])
    stack.attach(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.B"):
            nn.init.normal_(parameter, std=0.1)
    live = model(IDS).logits
    for part in stack:
        part.merge(model)
    assert not list(quantized(model))
    assert torch.allclose(model(IDS).logits, live, atol=1e-5)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}
    model.save_pretrained(tmp_path / "merged")
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert torch.allclose(again(IDS).logits, live, atol=1e-5)


def test_dequantizing_keeps_hooks_working() -> None:
    model = tiny_llama().eval()
    Stack([Nf4(name="nf4"), registry.load_class("stack", "lora")(name="lora", target="all-linear")]).attach(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.B"):
            nn.init.normal_(parameter, std=0.1)
    live = model(IDS).logits
    assert dequantize_model(model, torch.float32) == 14
    assert torch.allclose(model(IDS).logits, live, atol=1e-5)


def test_deep_copies_are_independent() -> None:
    model = tiny_llama().eval()
    Nf4(name="nf4").attach(model)
    twin = copy.deepcopy(model)
    before = model(IDS).logits
    assert torch.equal(twin(IDS).logits, before)
    dequantize_model(twin)
    assert torch.equal(model(IDS).logits, before) and len(list(quantized(model))) == 14


@pytest.mark.slow
def test_importing_leaves_the_terminal_alone() -> None:
    code = "import llmrecipe.methods._engines.quantized as q; q.layers()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""
