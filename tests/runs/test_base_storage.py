"""Chains of runs whose bases are stored in different ways: what can be done is done, the rest is refused by a check."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmrecipe import load
from llmrecipe.core.errors import ModelError, RecipeError, UserError
from llmrecipe.core.paths import ASSETS
from llmrecipe.methods._engines.quantized import bits_of, dense_weight, quantized
from llmrecipe.recipe.compose import compose
from llmrecipe.training.dry_run import examine
from tests.trainings import learned, train_recipe

bnb = pytest.importorskip("bitsandbytes")

SHORT = ["steps=1", "batch.size=2", "data.limit=4", "eval.at_start=false", "eval.load_best=false", "save.end=false"]
STILL = [*SHORT, "optim.lr=1e-30"]
"""Training that moves no weight."""
LORA = ["stack.lora.r=2", "stack.lora.target=attn.q"]
PLACE = "model.layers.0.self_attn.q_proj"
FACTOR = 16.0
"""alpha / r of the parents."""


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run on it as it is (`dense`) and one on it in 4 bits (`nf4`)."""
    place = tmp_path_factory.mktemp("parents")
    shutil.copytree(ASSETS / "tiny", place / "base")
    base = f"model.path={place}/base"
    train_recipe(place / "dense", "sft_lora", *SHORT, *LORA, base, "optim.lr=0.1")
    train_recipe(place / "nf4", "sft_lora", *SHORT, "stack=[nf4,lora]", *LORA, base, "optim.lr=0.1")
    return place


def weight(place: Path) -> Tensor:
    """The base's own weight."""
    return load_file(str(place / "base" / "model.safetensors"))[f"{PLACE}.weight"].float()


def in_nf4(w: Tensor) -> Tensor:
    codes, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    return bnb.functional.dequantize_4bit(codes, state)


def in_int8(w: Tensor) -> Tensor:
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(w.half())
    return codes.float() * (scale / 127.0)[:, None]


def branch(run: Path) -> Tensor:
    """alpha / r B A of a parent."""
    found = learned(run)
    a, b = (next(t for n, t in found.items() if n.startswith(PLACE) and n.endswith(f".{x}")) for x in "AB")
    return FACTOR * b @ a


def child(parents: Path, parent: str, folder: Path, recipe: str, *options: str) -> Any:
    """Check, train and open a run on a parent."""
    words = [*STILL, f"model.path={parents / parent}", *options]
    examine(compose(recipe, words))
    train_recipe(folder, recipe, *words)
    return load(folder)[0]


def of(model: Any) -> Any:
    return model.get_submodule(PLACE)


def test_a_4_bit_run_goes_on_in_8_bits_from_the_weights_it_was_fitted_to(parents: Path, tmp_path: Path) -> None:
    model = child(parents, "nf4", tmp_path / "run", "sft_lora", "stack=[int8,lora]", *LORA)
    assert bits_of(of(model)) == 8
    assert torch.equal(dense_weight(of(model), torch.float32), in_int8(in_nf4(weight(parents))))
    again = child(parents, str(tmp_path / "run"), tmp_path / "next", "sft_lora", *LORA)
    assert torch.equal(dense_weight(of(again), torch.float32), in_int8(in_nf4(weight(parents)))), "int8 is inherited"


def test_a_dense_run_goes_on_in_4_bits(parents: Path, tmp_path: Path) -> None:
    model = child(parents, "dense", tmp_path / "run", "sft_lora", "stack=[nf4,lora]", *LORA)
    assert bits_of(of(model)) == 4
    assert torch.equal(dense_weight(of(model), torch.float32), in_nf4(weight(parents)))
    mounted = load_file(str(tmp_path / "run" / "final" / "parent-0.safetensors"))
    assert all(torch.equal(mounted[name], value) for name, value in learned(parents / "dense").items())


def test_a_4_bit_run_goes_on_with_every_weight(parents: Path, tmp_path: Path) -> None:
    model = child(parents, "nf4", tmp_path / "run", "sft")
    assert not list(quantized(model))
    wanted = in_nf4(weight(parents)) + branch(parents / "nf4")
    torch.testing.assert_close(of(model).weight.data, wanted, rtol=0, atol=1e-6)
    assert float(branch(parents / "nf4").abs().max()) > 1e-3


def test_a_way_of_computing_is_no_way_of_storing(parents: Path, tmp_path: Path) -> None:
    options = ["stack=[nf4,lora]", "stack.nf4.compute_dtype=float32", *LORA]
    model = child(parents, "nf4", tmp_path / "run", "sft_lora", *options)
    assert torch.equal(dense_weight(of(model), torch.float32), in_nf4(weight(parents)))


def test_another_base_is_refused_however_it_is_stored(parents: Path, tmp_path: Path) -> None:
    shutil.copytree(parents / "base", tmp_path / "base")
    shutil.copytree(parents / "dense", tmp_path / "dense")
    content = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    content[-1] ^= 1  # a bit that no sample of the weights need contain
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    stack = tmp_path / "dense" / "final" / "stack.yaml"
    stack.write_text(stack.read_text().replace(str(parents), str(tmp_path)))
    (tmp_path / "dense" / "final" / "checksums.json").unlink()
    with pytest.raises(ModelError, match=r"trained on another base model: the weights in .*base have other content"):
        child(tmp_path, "dense", tmp_path / "run", "sft_lora", "stack=[nf4,lora]", *LORA)


REFUSED: dict[str, tuple[list[str], str]] = {
    "continue in another way": (["model.path=nf4", "model.continue=true", "stack=[int8,lora]", *LORA], "is stored with nf4"),
    "continue without it": (["model.path=nf4", "model.continue=true", *LORA], "is stored with nf4"),
    "continue a dense run in 4 bits": (
        ["model.path=dense", "model.continue=true", "stack=[nf4,lora]", *LORA],
        "is stored with no quantization",
    ),
    "continue a model": (["model.path=base", "model.continue=true"], "has no adapter to continue"),
    "continue the embedded model": (["model.continue=true"], "has no adapter to continue"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_a_check(name: str, parents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, message = REFUSED[name]
    monkeypatch.chdir(parents)
    with pytest.raises(RecipeError, match=message):
        examine(compose("sft_lora", [*STILL, *words]))


def test_codes_learned_with_an_adapter_are_kept(parents: Path, tmp_path: Path) -> None:
    options = [*SHORT, "stack=[nf4,lora]", *LORA, "stack.lora.init=loftq", f"model.path={parents}/base"]
    train_recipe(tmp_path / "loftq", "sft_lora", *options)
    words = [*STILL, f"model.path={tmp_path}/loftq", *LORA]
    with pytest.raises(RecipeError, match=r"stack\.int8: lora of .*loftq was initialized together .*--to merged"):
        examine(compose("sft_lora", [*words, "stack=[int8,lora]"]))
    examine(compose("sft_lora", words))


def test_what_cannot_be_merged_stops_full_training_before_weights_are_read(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "prefix_tuning", *SHORT)
    with pytest.raises(UserError, match="cannot be merged into the weights, so they cannot all be trained further"):
        examine(compose("sft", [*STILL, f"model.path={tmp_path}/run"]))
