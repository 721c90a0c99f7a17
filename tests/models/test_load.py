"""Loading: safe by default, exact about weights, dtype, attention and vocabulary, and errors that teach before heavy work."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import is_progress_bar_enabled

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate, current
from llmrecipe.models import checkpoint_path, new_token_rows
from llmrecipe.models.load import load_model, load_tokenizer, prepare_for_training, skeleton
from llmrecipe.models.resolve_class import load_config, resolve_dtype
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from tests.models.configs import GROUPED, tiny
from tests.support import ROOT, shared


def words(count: int = 64, **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `count` tokens."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, count)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **special)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of two layers with a tokenizer, on disk."""
    path = tmp_path / "model"
    tiny("llama", tie_word_embeddings=True).save_pretrained(path)
    words().save_pretrained(path)
    return path


def section(path: Any, **more: Any) -> ModelSection:
    return ModelSection(path=str(path), **more)


def ids() -> torch.Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def test_loads_the_weights_as_they_are(folder: Path) -> None:
    model = load_model(section(folder))
    assert torch.equal(model(ids()).logits, tiny("llama", tie_word_embeddings=True)(ids()).logits)
    assert not model.training and model.new_heads == () and model.attention_routed
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_real_model_with_its_tokenizer() -> None:
    path = shared("models", "stories260k")
    tokenizer = load_tokenizer(section(path), TokenizerSection())
    assert tokenizer.pad_token == "<unk>"
    model = load_model(section(path), tokenizer=tokenizer)
    assert sum(p.numel() for p in model.parameters()) == 260032
    start = tokenizer("Once upon a time", return_tensors="pt")
    made = model.generate(**start, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(made[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily"
    )


# --- safety ------------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("allow", [False, True])
def test_hostile_pickle_is_never_executed(folder: Path, tmp_path: Path, allow: bool) -> None:
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb works
    mark.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    load_model(section(folder, allow_pickle=allow))  # safetensors are there and win
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="more than tensors" if allow else "allow_pickle"):
        load_model(section(folder, allow_pickle=allow))
    assert not mark.exists()


def test_pickle_weights_by_opt_in(folder: Path) -> None:
    model = load_model(section(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle weights only"):
        load_model(section(folder))
    again = load_model(section(folder, allow_pickle=True))
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_an_index_cannot_smuggle_pickles_in(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="only safetensors files in the same folder are read"):
        load_model(section(folder))


def test_remote_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "configuration_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        load_model(section(folder))
    assert not mark.exists()


def test_no_recipe_turns_remote_code_or_pickle_on() -> None:
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert not re.search(r"(trust_remote_code|allow_pickle):\s*true", path.read_text(encoding="utf-8")), path


# --- weights that do not fit -------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a model folder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ModelError, match=r"1 missing from the checkpoint.*\n.*\n?.*allow_mismatch=\[model.layers.1.mlp.up_proj"
    ):
        load_model(section(folder))
    model = load_model(section(folder, allow_mismatch=["model.layers.1.mlp.*"]))
    assert model.new_heads == ("model.layers.1.mlp.up_proj",)


def test_extra_weights_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}))
    with pytest.raises(ModelError, match=r"this model does not have: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(section(folder))
    load_model(section(folder, allow_mismatch=["model.layers.2.*"]))


def test_reshaped_weights_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(16)}))
    with pytest.raises(ModelError, match=r"1 of another shape: model\.norm\.weight"):
        load_model(section(folder))


def test_a_new_classification_head_is_expected_and_reported(folder: Path) -> None:
    labels = ["negative", "neutral", "positive"]
    model = load_model(section(folder), rows_head="classification", labels=labels, seed=3)
    assert model.new_heads == ("score",)
    assert model.score.weight.shape == (3, 32)
    assert model.config.id2label == dict(enumerate(labels)) and model.config.label2id["positive"] == 2
    again = load_model(section(folder), rows_head="classification", labels=labels, seed=3)
    assert torch.equal(again.score.weight, model.score.weight)
    other = load_model(section(folder), rows_head="classification", labels=labels, seed=4)
    assert not torch.equal(other.score.weight, model.score.weight)


def test_a_trained_classifier_keeps_its_head_unless_the_classes_differ(folder: Path, tmp_path: Path) -> None:
    model = load_model(section(folder), rows_head="classification", labels=["no", "yes"])
    model.save_pretrained(tmp_path / "classifier")
    same = load_model(section(tmp_path / "classifier"), rows_head="classification", labels=["yes", "no"])
    assert same.new_heads == () and torch.equal(same.score.weight, model.score.weight)
    assert same.config.id2label == {0: "no", 1: "yes"}  # the checkpoint's order, not the data's
    wider = load_model(section(tmp_path / "classifier"), rows_head="classification", labels=["a", "b", "c"])
    assert wider.new_heads == ("score",) and wider.score.weight.shape == (3, 32)


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForMaskedLM"])
def test_states_are_loaded_from_an_encoder_with_or_without_its_head(kind: str, tmp_path: Path) -> None:
    """A sentence encoder comes without the head of its language model, and with a pooler that only classifiers read."""
    whole = tiny("bert")
    saved = whole if kind != "AutoModel" else transformers.AutoModel.from_config(whole.config)
    saved.save_pretrained(tmp_path)
    model = load_model(section(tmp_path), rows_head="states")
    assert bool(model.new_heads) is (kind == "AutoModel")
    backbone = saved if kind == "AutoModel" else saved.base_model
    wanted = backbone.eval()(input_ids=ids()).last_hidden_state
    torch.testing.assert_close(model.base_model(input_ids=ids()).last_hidden_state, wanted)


def test_states_are_those_of_a_decoder_or_an_encoder(folder: Path, tmp_path: Path) -> None:
    assert type(load_model(section(folder), rows_head="states")).__name__ == "LlamaForCausalLM"
    tiny("bart").save_pretrained(tmp_path / "bart")
    with pytest.raises(ModelError, match="needs a decoder or an encoder, and 'bart' is neither"):
        load_model(section(tmp_path / "bart"), rows_head="states")
    rewrite(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ModelError, match="missing from the checkpoint"):
        load_model(section(folder), rows_head="states")


def test_an_encoder_gets_a_pooler_and_a_classifier(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    model = load_model(section(tmp_path), rows_head="classification", labels=["a", "b"])
    assert model.new_heads == ("bert.pooler.dense", "classifier")


@pytest.mark.parametrize(
    ("family", "head", "message"),
    [
        ("bert", "causal", "needs a causal language model, but 'bert' offers: classification, masked"),
        ("t5", "masked", "offers: classification, seq2seq"),
        ("llama", "masked", "needs a masked language model, but 'llama' offers: causal, classification"),
        ("llama", "seq2seq", "needs an encoder-decoder"),
    ],
)
def test_a_head_the_family_lacks(family: str, head: str, message: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(section(tmp_path), rows_head=head)


# --- what is not a model -----------------------------------------------------------------------------------------------


def broken(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "rubbish":
        weights.write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00hello")
    elif how == "gguf":
        weights.unlink()
        (folder / "model.gguf").touch()
    elif how == "none":
        weights.unlink()
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "adapter":
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").touch()
    elif how == "inner":
        shutil.copytree(folder, folder / "final")
        (folder / "config.json").unlink()
    elif how == "shard":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "is damaged"),
        ("pointer", "git lfs pull"),
        ("rubbish", "not a readable safetensors file"),
        ("gguf", "GGUF file is for inference and cannot be trained"),
        ("none", "no weights .* model.init=random"),
        ("json", "config.json: not valid JSON"),
        ("adapter", "it is a PEFT adapter"),
        ("inner", "did you mean .*final"),
        ("shard", "lacks model-1.safetensors"),
    ],
)
def test_folders_that_are_no_model(folder: Path, how: str, message: str) -> None:
    broken(folder, how)
    for open_it in (load_model, skeleton):
        with pytest.raises(ModelError, match=message):
            open_it(section(folder))


def test_folders_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*modle; did you mean 'model'"):
        load_model(section(folder.parent / "modle"))
    with pytest.raises(ModelError, match="does not exist either"):
        load_model(section("/nowhere/at/all"))
    (folder / "x.gguf").touch()
    with pytest.raises(ModelError, match=r"is a file; .*GGUF"):
        load_model(section(folder / "x.gguf"))


def test_no_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(checkpoint_path.socket, "getaddrinfo", lambda *a: (_ for _ in ()).throw(OSError("no network")))
    started = time.monotonic()
    with pytest.raises(
        ModelError, match=r"'nobody/nothing' is no folder here .*HF_HUB_OFFLINE is set.*hf download nobody/nothing"
    ):
        load_model(section("nobody/nothing"))
    with pytest.raises(ModelError, match="did you mean 'tiny'"):
        load_model(section("tinny"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelError, match="cannot be reached from here"):
        load_tokenizer(section("nobody/nothing"), TokenizerSection())
    assert time.monotonic() - started < 5


# --- config, dtype, attention ------------------------------------------------------------------------------------------


def test_random_weights_from_a_config(folder: Path) -> None:
    config = {"model_type": "llama", **GROUPED}
    one, two = (load_model(ModelSection(init="random", config=config), seed=5) for _ in range(2))
    other = load_model(ModelSection(init="random", config=config), seed=6)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight) and not torch.equal(one.lm_head.weight, other.lm_head.weight)
    state = torch.get_rng_state()
    load_model(ModelSection(init="random", config=config), seed=5)
    assert torch.equal(state, torch.get_rng_state())
    fresh = load_model(section(folder, init="random", config={"num_hidden_layers": 3}))
    assert len(fresh.model.layers) == 3
    (folder / "model.safetensors").unlink()
    load_model(section(folder, init="random"))


def test_native_by_config() -> None:
    config = {"model_type": "llmrecipe_native", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "kind": "decoder"}
    model = load_model(ModelSection(init="random", config=config))
    assert type(model).__name__ == "NativeForCausalLM" and model.attention_routed
    with pytest.raises(
        ModelError, match="needs a masked language model, but 'llmrecipe_native' offers: causal, classification"
    ):
        load_model(ModelSection(init="random", config=config), rows_head="masked")
    masked = load_model(ModelSection(init="random", config=config | {"kind": "encoder"}), rows_head="masked")
    assert type(masked).__name__ == "NativeForMaskedLM"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"config": {"num_hiden_layers": 3}}, r"model.config.num_hiden_layers: .*did you mean 'num_hidden_layers'"),
        ({"config": {"model_type": "lama"}, "init": "random"}, "did you mean 'llama'"),
        ({"config": {"model_type": "llama"}}, "only with model.init=random"),
        ({"config": {"num_hidden_layers": "three"}}, "model.config"),
        ({"dtype": "float16"}, "float16 on a CPU"),
        ({"attention": "flash_attention_2"}, "needs a CUDA GPU"),
    ],
)
def test_values_that_cannot_be(folder: Path, more: dict[str, Any], message: str) -> None:
    if "flash" in message and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match=message):
        load_model(section(folder, **more))


def test_dtypes(folder: Path, tmp_path: Path) -> None:
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_model(section(tmp_path / "half")).dtype == torch.float32
    assert load_model(section(tmp_path / "half", dtype="bfloat16")).dtype == torch.bfloat16
    config = load_config(section(tmp_path / "half"))
    assert resolve_dtype("auto", config, "cuda") == torch.bfloat16
    assert resolve_dtype("float16", config, "cuda") == torch.float16


def test_attention_backends(folder: Path, tmp_path: Path) -> None:
    assert load_model(section(folder)).config._attn_implementation == "llmrecipe_sdpa"
    assert load_model(section(folder, attention="eager")).config._attn_implementation == "llmrecipe_eager"
    tiny("gemma2").save_pretrained(tmp_path / "capped")
    assert load_model(section(tmp_path / "capped")).config._attn_implementation == "llmrecipe_eager"
    with pytest.raises(ModelError, match="has no sdpa attention"):
        load_model(section(tmp_path / "capped", attention="sdpa"))


def test_a_skeleton_takes_no_memory(folder: Path) -> None:
    bones, model = skeleton(section(folder)), load_model(section(folder))
    assert all(p.is_meta for p in bones.parameters())
    shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (bones, model)]
    assert shapes[0] == shapes[1]


def test_gradient_checkpointing_replays_the_context_and_changes_no_gradient(folder: Path) -> None:
    def gradients(on: bool) -> tuple[list[torch.Tensor], list[str]]:
        model = load_model(section(folder)).train()
        prepare_for_training(model, section(folder, gradient_checkpointing=on))
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad_(False)  # frozen inputs: re-entrant checkpointing would give no gradients at all
        roles: list[str] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: roles.append(current().role))
        with activate(Context(role="value")):
            loss = model(ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None], roles

    plain, once = gradients(False)
    replayed, twice = gradients(True)
    assert once == ["value"] and twice == ["value", "value"]
    assert len(plain) == len(replayed) == 19
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, replayed, strict=True))


# --- tokenizers --------------------------------------------------------------------------------------------------------


def test_padding_never_costs_a_token(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(section(folder), TokenizerSection())
    assert len(tokenizer) == 64 and tokenizer.pad_token == "</s>"  # no padding, no unknown token declared: the end token
    words(pad_token="w5").save_pretrained(tmp_path / "own")
    assert load_tokenizer(section(folder), TokenizerSection(path=str(tmp_path / "own"))).pad_token == "w5"
    assert load_tokenizer(section(folder), TokenizerSection(pad_token="w9")).pad_token_id == 9
    with pytest.raises(ModelError, match="'w99' is not in the vocabulary; did you mean"):
        load_tokenizer(section(folder), TokenizerSection(pad_token="w99"))


def test_tokenizer_errors(folder: Path, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(section(tmp_path / "bare"), TokenizerSection())
    with pytest.raises(ModelError, match=r"tokenizer\.path: there is no folder"):
        load_tokenizer(section(folder), TokenizerSection(path=str(tmp_path / "nothing")))


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_grow_the_model(tmp_path: Path, tied: bool) -> None:
    tiny("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    here = section(tmp_path / "model")
    tokenizer = load_tokenizer(here, TokenizerSection(add_tokens=["<|call|>", "new"]))
    assert tokenizer("w3 <|call|> new")["input_ids"] == [3, 64, 65]
    assert tokenizer.decode([64, 65], skip_special_tokens=True).strip() == "new"
    before, model = load_model(here), load_model(here, tokenizer=tokenizer)
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embed is head) == tied == model.config.tie_word_embeddings
    assert embed.shape[0] == head.shape[0] == model.config.vocab_size == 66
    assert torch.equal(embed[:64], before.get_input_embeddings().weight)
    assert torch.allclose(embed[64], embed[:64].mean(0)) and torch.allclose(head[65], head[:64].mean(0))
    assert torch.equal(model(ids()).logits[..., :64], before(ids()).logits)
    assert new_token_rows.fold_token_rows(model) == 2
    model.save_pretrained(tmp_path / "grown")
    again = load_model(section(tmp_path / "grown"), tokenizer=tokenizer)
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_spare_rows_are_used_before_the_model_grows(folder: Path) -> None:
    tokenizer = words(count=60)
    assert load_model(section(folder), tokenizer=tokenizer).config.vocab_size == 64


def test_positions_of_roberta_start_behind_its_padding(tmp_path: Path) -> None:
    model = load_model(ModelSection(init="random", config={"model_type": "roberta", **_plain()}), rows_head="masked")
    assert model.position_offset == model.config.pad_token_id + 1 == 1
    x = ids()
    by_hand = model(x, position_ids=torch.arange(7)[None] + model.position_offset).logits
    assert torch.allclose(model(x).logits, by_hand)
    assert load_model(ModelSection(init="random", config={"model_type": "llama", **GROUPED})).position_offset == 0


def _plain() -> dict[str, Any]:
    return {key: value for key, value in GROUPED.items() if key != "num_key_value_heads"}


def test_a_download_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bars of the libraries are off, so a line of our own stands for them, also where no terminal is."""
    blobs = tmp_path / "models--someone--large" / "blobs"
    blobs.mkdir(parents=True)

    def slow(**place: Any) -> Any:
        assert place["local_files_only"] is False and not is_progress_bar_enabled()
        (blobs / "ab12.incomplete").write_bytes(bytes(3 << 20))
        time.sleep(0.12)
        return LlamaConfig()

    monkeypatch.setattr("llmrecipe.core.console.EVERY", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("llmrecipe.models.resolve_class.offline", lambda: None)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", slow)
    load_config(ModelSection(path="someone/large"))
    shown = capsys.readouterr()
    assert shown.out == "" and set(shown.err.splitlines()) == {"reading someone/large: 0 s so far, 3 MB of it in the hub cache"}
