"""PEFT folders: loaded by peft itself with the run's logits, and read back by us; what PEFT cannot hold is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe import load
from llmrecipe.core.errors import ModelError
from llmrecipe.interop import verify_logits
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective.bitfit import Bitfit
from tests.interop.saved_runs import base_folder, saved_run

IDS = torch.tensor([[5, 9, 3, 60, 7, 700, 2]])


def under_peft(adapter: Path, base: Path, **kwargs: Any) -> torch.nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **kwargs), adapter).eval()
    missing = [str(w.message) for w in seen if "missing" in str(w.message).lower()]
    assert not missing, missing
    return model


CASES = {
    "linear": ("llama", {"target": "all-linear"}, {}),
    "rslora": ("llama", {"target": "attn.q|v", "use_rslora": True}, {}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 4.0}}, {}),
    "some layers": ("llama", {"target": "layers.1.attn.q + layers.0.mlp.down"}, {}),
    "embedding": ("llama", {"target": "embed + attn.q"}, {}),
    "tied pair": ("llama", {"target": "embed + head"}, {"tie_word_embeddings": True}),
    "head": ("llama", {"target": "head"}, {}),
    "pissa": ("llama", {"init": "pissa"}, {}),
    "olora": ("llama", {"init": "olora"}, {}),
    "branch bias": ("gpt2", {"target": "attn.q|v + mlp.up", "lora_bias": True}, {}),
    "branch bias, bare host": ("llama", {"lora_bias": True, "use_rslora": True}, {}),
    "all biases": ("gpt2", {"target": "attn.q|v", "bias": "all"}, {}),
    "all biases, one of two names": ("bert", {"target": "attn.q|v", "bias": "all", "lora_bias": True}, {}),
    "biases of its layers": ("gpt2", {"target": "attn.qkv + mlp.up", "bias": "lora_only"}, {}),
    "biases of its rows": ("gpt2", {"target": "attn.q|v", "bias": "lora_only"}, {}),
    "Conv1D": ("gpt2", {"target": "attn.qkv + mlp.up"}, {}),
    "fused split": ("gpt2", {"target": "attn.q|v"}, {}),
    "interleaved split": ("gpt_neox", {"target": "attn.q|v"}, {}),
    "experts": ("mixtral", {"target": "experts"}, {}),
    "one expert tensor": ("mixtral", {"target": "experts.down + attn.q"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_folder_and_gives_the_logits_of_the_run(tmp_path: Path, case: str) -> None:
    family, options, more = CASES[case]
    base = base_folder(tmp_path, family, **more)
    model = saved_run(tmp_path / "run", base, Lora(name="lora", r=4, alpha=6.0, **options))
    wanted = model(input_ids=IDS).logits
    done = export_peft(tmp_path / "run")
    got = under_peft(done.path, base)(input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, atol=1e-5 * done.difference.scale, rtol=1e-5)
    assert (under_peft(done.path, base).base_model.model.get_input_embeddings() is not None) and done.difference.largest < 1e-3


def test_a_branch_without_a_bias_beside_one_with_it_gets_zeros_and_an_embedding_there_is_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    saved_run(tmp_path / "first", base, Lora(name="lora", target="attn.q|v", r=4, alpha=6.0, lora_bias=True))
    model = saved_run(tmp_path / "second", tmp_path / "first", Lora(name="lora", target="attn.q + mlp.up", r=2), seed=8)
    wanted = model(input_ids=IDS).logits
    for uniform in (False, True):
        done = export_peft(tmp_path / "second", tmp_path / f"out-{uniform}", uniform=uniform)
        torch.testing.assert_close(under_peft(done.path, base)(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        assert any("lora_bias" in note for note in done.notes)
    saved_run(tmp_path / "third", tmp_path / "first", Lora(name="lora", target="embed", r=2), seed=9)
    with pytest.raises(ModelError, match="embed_tokens: it has a branch of kind embedding, which PEFT cannot hold together"):
        export_peft(tmp_path / "third")
    assert not (tmp_path / "third" / "peft").exists()


def test_a_chain_of_runs_becomes_one_adapter_and_uniform_ranks_need_no_pattern(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    saved_run(tmp_path / "first", base, Lora(name="lora", target="attn.q", r=2))
    model = saved_run(tmp_path / "second", tmp_path / "first", Lora(name="lora", target="attn.q|v", r=4), seed=8)
    wanted = model(input_ids=IDS).logits
    for uniform in (False, True):
        done = export_peft(tmp_path / "second", tmp_path / f"out-{uniform}", uniform=uniform)
        torch.testing.assert_close(under_peft(done.path, base)(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        config = json.loads((done.path / "adapter_config.json").read_text())
        assert bool(config["rank_pattern"]) is not uniform
        assert not uniform or (config["r"] == config["lora_alpha"] == 6 and not config["alpha_pattern"])


def test_a_class_head_travels_with_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = base_folder(tmp_path)
    model = saved_run(tmp_path / "run", base, Lora(name="lora"), head="classification", labels=["a", "b", "c"])
    folder = export_peft(tmp_path / "run").path
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    assert config["task_type"] == "SEQ_CLS"
    twin = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), folder).eval()
    torch.testing.assert_close(verify_logits.logits_of(twin, IDS), verify_logits.logits_of(model, IDS), atol=1e-5, rtol=1e-5)


def test_quantized_runs_give_an_adapter_for_the_quantized_base(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    from llmrecipe.methods.memory.nf4 import Nf4

    base = base_folder(tmp_path)
    model = saved_run(tmp_path / "run", base, Nf4(name="nf4"), Lora(name="lora"))
    done = export_peft(tmp_path / "run")
    assert any("nf4" in note for note in done.notes)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    # Without gradients the library's own processor kernel repacks the weight, which narrow layers do not survive.
    twin = under_peft(done.path, base, quantization_config=config, dtype=torch.float32).train()
    got = twin(input_ids=IDS).logits
    torch.testing.assert_close(got, model(input_ids=IDS).logits, atol=1e-4 * done.difference.scale, rtol=0)


STARTS = ["linear", "patterns", "embedding", "tied pair", "experts", "Conv1D", "branch bias"]
STARTS += [case for case in CASES if "biases" in case]


@pytest.mark.parametrize("case", STARTS)
def test_a_folder_is_a_starting_point_by_its_path(tmp_path: Path, case: str) -> None:
    """`model.path=ADAPTER` opens the base the adapter names with the adapter on it, as Transformers does."""
    from llmrecipe.recipe.schema import ModelSection, TokenizerSection
    from llmrecipe.runs.open_model import open_model

    family, options, more = CASES[case]
    base = base_folder(tmp_path, family, **more)
    model = saved_run(tmp_path / "run", base, Lora(name="lora", r=4, alpha=6.0, **options))
    folder = export_peft(tmp_path / "run").path
    loaded = open_model(ModelSection(path=str(folder)), TokenizerSection())
    torch.testing.assert_close(loaded.model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_biases_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    """Whole values under their own names, through `base_layer` where a module has a branch; the word for them in the config."""
    from safetensors.torch import load_file

    base = base_folder(tmp_path, "gpt2")
    for bias in ("all", "lora_only"):
        model = saved_run(tmp_path / bias, base, Lora(name="lora", target="attn.qkv", bias=bias))
        done = export_peft(tmp_path / bias)
        assert json.loads((done.path / "adapter_config.json").read_text())["bias"] == bias
        assert any("read bias" in note for note in done.notes)
        tensors = {k: v for k, v in load_file(done.path / "adapter_model.safetensors").items() if k.endswith(".bias")}
        host = "base_model.model.transformer.h.0.attn"
        assert torch.equal(tensors[f"{host}.c_attn.base_layer.bias"], model.transformer.h[0].attn.c_attn.lora__bias.bias)
        assert (f"{host}.c_proj.bias" in tensors) is (bias == "all")
        assert len(tensors) == (2 * 6 + 1 if bias == "all" else 2)


def test_a_bitfit_run_below_a_lora_run_travels_with_the_adapter(tmp_path: Path) -> None:
    base = base_folder(tmp_path, "gpt2")
    saved_run(tmp_path / "first", base, Bitfit(name="bitfit"))
    model = saved_run(tmp_path / "second", tmp_path / "first", Lora(name="lora", target="attn.qkv", bias="lora_only"), seed=8)
    done = export_peft(tmp_path / "second")
    wanted = model(input_ids=IDS).logits
    torch.testing.assert_close(under_peft(done.path, base)(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_are_read_beside_a_class_head_and_weighed_with_the_adapter(tmp_path: Path, bias: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from llmrecipe.recipe.schema import ModelSection, TokenizerSection
    from llmrecipe.runs.open_model import open_model

    base = base_folder(tmp_path, "bert")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    plain.save_pretrained(base)  # with a pooler
    config = LoraConfig(target_modules=["query"], r=4, bias=bias, modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = get_peft_model(plain, config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(tmp_path / "adapter")
    wanted = verify_logits.logits_of(model, IDS)
    section = ModelSection(path=str(base), adapters={str(tmp_path / "adapter"): 1.0})
    loaded = open_model(section, TokenizerSection(), head="classification", labels=["a", "b", "c"])
    torch.testing.assert_close(verify_logits.logits_of(loaded.model, IDS), wanted, atol=1e-5, rtol=1e-5)
    half = section.model_copy(update={"adapters": {str(tmp_path / "adapter"): 0.5}})
    weighed = open_model(half, TokenizerSection(), head="classification", labels=["a", "b", "c"]).model
    query = "bert.encoder.layer.1.attention.self.query"
    start = weighed.get_submodule(query).bias
    trained = model.get_submodule(f"base_model.model.{query}.base_layer").bias
    torch.testing.assert_close(weighed.get_submodule(query).mounted0_lora__bias.bias, (start + trained) / 2)


def test_methods_peft_does_not_have_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path, "gpt2"), Bitfit(name="bitfit"))
    with pytest.raises(ModelError, match="PEFT has no such method \\('bitfit'\\); use --to merged"):
        export_peft(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["final"]


def test_a_transposed_expert_layout_would_be_caught_by_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrecipe.interop.peft import importer

    saved_run(tmp_path / "run", base_folder(tmp_path, "mixtral"), Lora(name="lora", target="experts"))
    original = importer._experts

    def rank_major(home: str, tensor: str, found: dict, r: int, scale: float) -> Any:
        branch = original(home, tensor, found, r, scale)
        return importer.Branch(**{**vars(branch), "A": branch.A.flip(0)})

    monkeypatch.setattr(importer, "_experts", rank_major)
    with pytest.raises(ModelError, match="does not compute what the run computes"):
        export_peft(tmp_path / "run")


def test_load_gives_a_model_that_generates(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora"))
    model, tokenizer = load(tmp_path / "run", device="cpu")
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(out[0, ids.shape[1]], model(input_ids=ids).logits[0, -1].argmax())
