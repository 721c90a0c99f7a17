"""Several adapters of one base as one, and PEFT folders written by peft as a starting point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe import load
from llmrecipe.cli.app import run_command as command
from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.interop.merge_adapters import open_combination
from llmrecipe.interop.merge_options import MergeConfig
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import open_model
from tests.interop.saved_runs import base_folder, fill, saved_run

IDS = torch.tensor([[5, 9, 3, 60, 7, 700, 2]])


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = base_folder(tmp_path)
    saved_run(tmp_path / "one", base, Lora(name="lora", r=4, target="attn.q|v"))
    saved_run(tmp_path / "two", base, Lora(name="lora", r=4, alpha=4.0, target="attn.v + mlp.up"), seed=9)
    return base, tmp_path / "one", tmp_path / "two"


def test_cat_is_the_weighted_sum_of_the_changes(pair: tuple[Path, Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    base, one, two = pair
    start = weights(AutoModelForCausalLM.from_pretrained(base))
    first, second = (weights(AutoModelForCausalLM.from_pretrained(export_merged(p).path)) for p in (one, two))
    both = open_combination([(str(one), 0.75), (str(two), -0.5)])
    merged = weights(AutoModelForCausalLM.from_pretrained(export_merged(one, one / "both", loaded=both).path))
    for name, value in start.items():
        wanted = value + 0.75 * (first[name] - value) - 0.5 * (second[name] - value)
        torch.testing.assert_close(merged[name], wanted, atol=1e-5, rtol=1e-5)


def test_branch_biases_are_added_by_weight_and_only_so(tmp_path: Path) -> None:
    base = base_folder(tmp_path, "gpt2")
    one, two = tmp_path / "one", tmp_path / "two"
    saved_run(one, base, Lora(name="lora", r=4, alpha=6.0, target="attn.qkv", lora_bias=True))
    saved_run(two, base, Lora(name="lora", r=4, alpha=4.0, target="attn.qkv + mlp.up"), seed=9)
    start = weights(open_model(ModelSection(path=str(base)), TokenizerSection()).model)
    first = weights(load_merged(one, tmp_path / "merged"))
    both = open_combination([(str(one), -0.75), (str(two), 0.5)])
    mixed = weights(load_merged(one, tmp_path / "both", both))
    name = "transformer.h.1.attn.c_attn.bias"
    assert (first[name] - start[name]).abs().max() > 0.1
    torch.testing.assert_close(mixed[name], start[name] - 0.75 * (first[name] - start[name]), atol=1e-6, rtol=1e-5)
    with pytest.raises(ModelError, match=r"--combine svd: transformer.h.0.attn.c_attn has a bias in its branch \(lora_bias\)"):
        open_combination([(str(one), 0.5), (str(two), 0.5)], MergeConfig("svd"))


def test_trained_biases_of_the_base_are_no_change_that_could_be_added(tmp_path: Path) -> None:
    base = base_folder(tmp_path, "gpt2")
    one, two = tmp_path / "one", tmp_path / "two"
    saved_run(one, base, Lora(name="lora", target="attn.qkv"))
    saved_run(two, base, Lora(name="lora", target="attn.qkv", bias="lora_only"), seed=9)
    with pytest.raises(ModelError, match=r"two trained 2 biases of the base \(bias, bitfit\), which are no low-rank change"):
        open_combination([(str(one), 0.5), (str(two), 0.5)])


def load_merged(run: Path, out: Path, loaded: Any = None) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(export_merged(run, out, loaded=loaded).path)


WEIGHTS = {"cat": (0.75, 0.5), "linear": (0.75, -0.5), "ties": (0.75, -0.5), "ties_svd": (0.75, -0.5)}


@pytest.mark.parametrize("way", ["cat", "linear", "ties", "magnitude_prune", "svd", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_peft_combines_the_same_folders_to_the_same_logits(pair: tuple[Path, Path, Path], way: str, sign: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if sign == "frequency" and "ties" not in way:
        pytest.skip("only TIES elects signs")
    base, one, two = pair
    folders = [export_peft(p).path for p in (one, two)]
    first, second = WEIGHTS.get(way, (0.75, 0.5))
    density = 0.4 if "density" in registry.spec("merge_method", way).options else None
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="one")
    twin.load_adapter(folders[1], adapter_name="two")
    twin.add_weighted_adapter(
        ["one", "two"], [first, second], "both", combination_type=way, density=density, majority_sign_method=sign
    )
    twin.set_adapter("both")
    ours = open_combination([(str(folders[0]), first), (str(two), second)], MergeConfig(way, density, sign))
    torch.testing.assert_close(ours.model(input_ids=IDS).logits, twin.eval()(input_ids=IDS).logits, atol=2e-4, rtol=1e-4)


def test_dare_merges_adapters_by_the_seed(pair: tuple[Path, Path, Path]) -> None:
    _base, one, two = pair
    parts = [(str(one), 0.5), (str(two), 0.5)]
    logits = {
        (way, seed): open_combination(parts, MergeConfig(way, 0.5, seed=seed)).model(input_ids=IDS).logits
        for way in ("dare_linear", "dare_ties_svd")
        for seed in (1, 2)
    }
    again = open_combination(parts, MergeConfig("dare_linear", 0.5, seed=1)).model(input_ids=IDS).logits
    assert torch.equal(again, logits["dare_linear", 1])
    for way in ("dare_linear", "dare_ties_svd"):
        assert (logits[way, 1] - logits[way, 2]).abs().max() > 1e-2
    whole = open_combination(parts, MergeConfig("dare_linear", 1.0)).model(input_ids=IDS).logits
    torch.testing.assert_close(whole, open_combination(parts, MergeConfig("linear")).model(input_ids=IDS).logits)


def test_the_verb_writes_a_combination(pair: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _base, one, two = pair
    words = ["export", str(one), "--to", "peft", "--weight", "0.5", "--add", f"{two}=0.5", "--out", str(one / "mix")]
    assert command(words) == 0
    assert "proven" in capsys.readouterr().out
    wanted = open_combination([(str(one), 0.5), (str(two), 0.5)]).model(input_ids=IDS).logits
    model, _ = load(one / "mix", device="cpu")
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    assert command(["export", str(one), "--to", "peft", "--add", str(two)]) == 2
    assert "RUN=WEIGHT" in capsys.readouterr().err
    for words, message in (
        (["--combine", "tiess"], "did you mean 'ties'"),
        (["--combine", "ties"], "needs --density"),
        (["--density", "0.5"], "keeps every entry"),
        (["--combine", "ties", "--density", "2"], "no share of the entries"),
        (["--combine", "ties", "--density", "0.2", "--sign", "most"], "allowed: total, frequency"),
    ):
        assert command(["export", str(one), "--to", "peft", "--add", f"{two}=1", *words]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_what_cannot_be_added_is_refused(tmp_path: Path, pair: tuple[Path, Path, Path]) -> None:
    base, one, _two = pair
    other = base_folder(tmp_path / "b", seed=5)
    saved_run(tmp_path / "three", other, Lora(name="lora"))
    saved_run(tmp_path / "four", base, Dora(name="dora"))
    saved_run(tmp_path / "five", base, Lora(name="lora", r=2))
    with pytest.raises(ModelError, match="another base"):
        open_combination([(str(one), 1.0), (str(tmp_path / "three"), 1.0)])
    with pytest.raises(ModelError, match="DoRA"):
        open_combination([(str(one), 1.0), (str(tmp_path / "four"), 1.0)])
    with pytest.raises(ModelError, match="equal ranks"):
        open_combination([(str(one), 1.0), (str(tmp_path / "five"), 1.0)], MergeConfig("linear"))


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "rank_pattern": {"q_proj": 3}}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.1.*": 3}}),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "branch bias": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "branch bias, bare host": ("llama", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_written_by_peft_is_read_with_equal_logits(tmp_path: Path, case: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    family, options = CONFIGS[case]
    base = base_folder(tmp_path, family)
    twin = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=6, **options)).eval()
    fill(twin)
    wanted = twin(input_ids=IDS).logits
    twin.save_pretrained(tmp_path / "adapter")
    loaded = open_model(ModelSection(path=str(tmp_path / "adapter")), TokenizerSection())
    torch.testing.assert_close(loaded.model(input_ids=IDS).logits, wanted, atol=2e-4, rtol=1e-4)
    named = ModelSection(path=str(base), adapters={str(tmp_path / "adapter"): 1.0})
    again = open_model(named, TokenizerSection()).model
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=2e-4, rtol=1e-4)


def test_an_adalora_folder_written_by_peft_after_its_pruning_is_read_with_equal_logits(tmp_path: Path) -> None:
    from peft import AdaLoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path)
    schedule = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 6}
    config = AdaLoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=6, **schedule)
    twin = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    fill(twin)
    for step in range(1, 6):
        twin(input_ids=IDS, labels=IDS).loss.backward()
        twin.base_model.update_and_allocate(step)
        twin.zero_grad()
    ranks = [sum(kept) for kept in twin.peft_config["default"].rank_pattern.values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1
    wanted = twin.eval()(input_ids=IDS).logits
    twin.save_pretrained(tmp_path / "adapter")
    loaded = open_model(ModelSection(path=str(tmp_path / "adapter")), TokenizerSection())
    torch.testing.assert_close(loaded.model(input_ids=IDS).logits, wanted, atol=2e-4, rtol=1e-4)
    doubled = open_combination([(str(tmp_path / "adapter"), 2.0)]).model
    again = open_combination([(str(tmp_path / "adapter"), 1.0), (str(tmp_path / "adapter"), 1.0)]).model
    torch.testing.assert_close(doubled(input_ids=IDS).logits, again(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_for_another_shape_or_method_is_refused_with_the_reason(tmp_path: Path) -> None:
    from peft import LoraConfig, OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, wide = base_folder(tmp_path), base_folder(tmp_path / "wide", intermediate_size=64)
    oft = OFTConfig(target_modules=["q_proj"], oft_block_size=4)
    for name, config in (("up", LoraConfig(target_modules=["up_proj"])), ("oft", oft)):
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match="48 x 32, this model has 64 x 32"):
        open_model(ModelSection(path=str(wide), adapters={str(tmp_path / "up"): 1.0}), TokenizerSection())
    with pytest.raises(ModelError, match="type OFT cannot be read"):
        open_model(ModelSection(path=str(tmp_path / "oft")), TokenizerSection())


def test_training_continues_from_an_adapter_and_says_which_options_fit(tmp_path: Path) -> None:
    from llmrecipe.core.errors import RunError
    from tests.trainings import train_recipe

    saved_run(tmp_path / "run", "tiny", Lora(name="lora", r=4, alpha=6.0, target="attn.q"))
    folder = export_peft(tmp_path / "run").path
    words = [f"model.path={folder}", "model.continue=true", "steps=1", "optim.lr=1e-9", "batch.size=2"]
    with pytest.raises(RunError, match=r"target=attn\.q stack\.lora\.r=4 stack\.lora\.alpha=6"):
        train_recipe(tmp_path / "bad", "sft_lora", *words)
    fitting = ["stack.lora.target=attn.q", "stack.lora.r=4", "stack.lora.alpha=6.0"]
    run = train_recipe(tmp_path / "good", "sft_lora", *words, *fitting)
    before, _ = load(folder, device="cpu")
    torch.testing.assert_close(run.model(input_ids=IDS).logits, before(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    again, _ = load(tmp_path / "good", device="cpu")
    torch.testing.assert_close(again(input_ids=IDS).logits, before(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
