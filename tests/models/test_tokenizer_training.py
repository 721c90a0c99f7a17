"""Tokenizers trained by a recipe: the same file from the same data, what comes back of held-out text, refusals that teach."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrecipe.core.errors import ModelError, RecipeError, RunError
from llmrecipe.models import tokenizer_training
from llmrecipe.models.load import load_config, load_tokenizer
from llmrecipe.models.tokenizer_training import trained_tokenizer, training_facts
from llmrecipe.recipe.compose import compose
from llmrecipe.training.train import train
from tests.data.conftest import own_cache  # noqa: F401 (used by every test)

STRANGE = "Hello  wörld\n\t我能吞下玻璃 🙂👩‍🚀 \u200bZWJ <0x41> \r\n naïve"
BASE = ["model.init=random", "tokenizer.train.vocab_size=400"]
ALGORITHMS = ("bpe", "unigram", "wordpiece")


def tokenizer_of(*words: str, recipe: str = "clm") -> Any:
    made = compose(recipe, [*BASE, *words]).recipe
    return load_tokenizer(made.model, made.tokenizer)


def texts(folder: Path, rows: list[str], validation: list[str] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", rows), ("valid", validation or [])):
        if split:
            lines = "".join(json.dumps({"text": text, "kind": "zzz"}) + "\n" for text in split)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_data_and_options_give_the_same_file(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for number in range(2):
        monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / str(number)))
        recipe = compose("clm", [*BASE, f"tokenizer.train.algorithm={algorithm}"]).recipe
        assert recipe.tokenizer.train is not None
        folder = trained_tokenizer(recipe.tokenizer.train)
        hashes.add(hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest())
    assert len(hashes) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_role_has_its_token_and_the_size_is_the_requested_one(algorithm: str) -> None:
    tokenizer = tokenizer_of(f"tokenizer.train.algorithm={algorithm}", "tokenizer.train.special.extra=['<|user|>']")
    assert len(tokenizer) == 400 == max(tokenizer.get_vocab().values()) + 1
    roles = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.mask_token, tokenizer.sep_token]
    assert roles == ["<pad>", "<bos>", "<eos>", "<mask>", "<sep>"]
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids("<|user|>") in tokenizer.all_special_ids
    assert tokenizer("Mia", "Mia")["input_ids"].count(tokenizer.sep_token_id) == 1
    assert (tokenizer.unk_token == "<unk>") == (algorithm == "wordpiece")


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_byte_level_tokenizers_give_any_text_back(algorithm: str) -> None:
    tokenizer = tokenizer_of(f"tokenizer.train.algorithm={algorithm}")
    assert tokenizer.decode(tokenizer.encode(STRANGE, add_special_tokens=False)) == STRANGE


def test_a_class_token_frames_texts_as_bert_does() -> None:
    tokenizer = tokenizer_of(
        "tokenizer.train.algorithm=wordpiece", "tokenizer.train.special.cls='[CLS]'", "tokenizer.train.special.sep='[SEP]'"
    )
    assert tokenizer.decode(tokenizer("Mia", "Mia")["input_ids"]) == "[CLS] Mia [SEP] Mia [SEP]"
    assert tokenizer("Mia", "Mia")["token_type_ids"] == [0, 0, 0, 1, 1]


def test_the_first_merge_is_the_commonest_pair_and_compression_is_counted_by_hand(tmp_path: Path) -> None:
    # "ab" three times, "cd" twice: with one token more than bytes and special tokens, that token is "ab". The held-out text
    # has 8 bytes and the tokens ab, " ", c, d, " ", ab; the column `kind` is no text of this format.
    data = texts(tmp_path / "data", ["ab", "ab", "ab", "cd", "cd"], ["ab cd ab"])
    recipe = compose("clm", ["model.init=random", "tokenizer.train.vocab_size=262", f"data.path={data}"]).recipe
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    assert tokenizer.convert_ids_to_tokens([261]) == ["ab"]
    assert recipe.tokenizer.train is not None
    facts = training_facts(recipe.tokenizer.train)
    assert (facts["trained_bytes"], facts["tried_on"], facts["texts"]) == (10, "validation", 1)
    assert (facts["bytes"], facts["tokens"], facts["round_trip"]) == (8, 6, 1.0)
    assert facts["bytes_per_token"] == pytest.approx(8 / 6)


def test_word_pieces_are_honest_about_what_does_not_come_back(tmp_path: Path) -> None:
    data = texts(tmp_path / "data", ["a b", "ab"], ["a b", "a  b", "b a"])
    words = ["model.init=random", "tokenizer.train.vocab_size=9", "tokenizer.train.algorithm=wordpiece", f"data.path={data}"]
    recipe = compose("clm", words).recipe  # <pad> <bos> <eos> <unk> <mask> <sep>, a, b, ##b
    assert recipe.tokenizer.train is not None
    assert training_facts(recipe.tokenizer.train)["round_trip"] == pytest.approx(2 / 3)


def test_a_tokenizer_is_trained_once_and_again_where_the_cache_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = tokenizer_training._train
    monkeypatch.setattr(tokenizer_training, "_train", lambda *a: (calls.append(1), real(*a))[1])
    tokenizer_of()
    recipe = compose("clm", BASE).recipe
    assert recipe.tokenizer.train is not None
    folder = trained_tokenizer(recipe.tokenizer.train)
    assert len(calls) == 1
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert len(tokenizer_of()) == 400 and len(calls) == 2
    tokenizer_of("tokenizer.train.rows=300")
    assert len(calls) == 3


def test_the_vocabulary_of_a_model_from_nothing_follows() -> None:
    for words in ([], ["model=native", "model.init=random"]):
        recipe = compose("clm", [*words, *BASE, "tokenizer.train.special.bos=null"]).recipe
        config = load_config(recipe.model)
        assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (400, 0, None, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tokenizer.train.vocab_size=400"], "tokenizer.train: the weights of tiny were trained on the tokens of its own"),
        (["model.init=random", "tokenizer.train.vocab_size=200"], "tokenizer.train.vocab_size: 200 is less than the 5 special"),
        ([*BASE, "tokenizer.path=tiny"], "tokenizer.path: names the tokenizer tiny, and tokenizer.train makes one"),
        ([*BASE, "tokenizer.train.special.eos=null"], "tokenizer.train.special.eos: null, and objective=clm cannot do without"),
        ([*BASE, "tokenizer.train.special.sep='<bos>'"], "tokenizer.train.special: '<bos>' is there 2 times"),
        ([*BASE, "tokenizer.train.special.ex=[a]"], "did you mean 'extra'"),
        ([*BASE, "tokenizer.train.special.extra=[' ']"], "at least one visible character"),
    ],
)
def test_refusals_before_anything_is_read(words: list[str], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        compose("clm", words)
    assert says in str(error.value)


def test_masked_objectives_need_a_mask_token() -> None:
    with pytest.raises(RecipeError, match=r"tokenizer\.train\.special\.mask: null, and objective=mlm"):
        compose("mlm", ["tokenizer.path=null", "tokenizer.train.vocab_size=400", "tokenizer.train.special.mask=null"])


@pytest.mark.parametrize(
    ("algorithm", "size", "way"),
    [("bpe", 9000, "large"), ("unigram", 9000, "large"), ("wordpiece", 9000, "large"), ("wordpiece", 40, "small")],
)
def test_a_vocabulary_that_does_not_fit_the_data_names_the_size_that_does(algorithm: str, size: int, way: str) -> None:
    with pytest.raises(ModelError) as error:
        tokenizer_of(f"tokenizer.train.algorithm={algorithm}", f"tokenizer.train.vocab_size={size}")
    said = str(error.value)
    assert f"tokenizer.train.vocab_size: {size} is too {way}" in said
    fitting = int(said.rpartition("set tokenizer.train.vocab_size=")[2].split()[0])
    assert len(tokenizer_of(f"tokenizer.train.algorithm={algorithm}", f"tokenizer.train.vocab_size={fitting}")) == fitting


def test_a_trained_tokenizer_belongs_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    words = [
        "model=native", *BASE, "model.config.hidden_size=16", "model.config.num_hidden_layers=1", "batch.size=4",
        "data.limit=16", "eval.at_start=false", "eval.test=false", "data.validation=0.02", "save.every=2", f"run.dir={run}",
    ]  # fmt: skip
    train(compose("clm", [*words, "steps=3"]))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    check = next(e for e in events if "tokenizer/round_trip" in e)
    report = json.loads((run / "report.json").read_text())
    assert check["tokenizer/round_trip"] == 1.0 == report["tokenizer"]["round_trip"]
    assert check["tokenizer/bytes_per_token"] == report["tokenizer"]["bytes_per_token"] > 2
    tokenizer, model = (
        AutoTokenizer.from_pretrained(run / "final"),
        AutoModelForCausalLM.from_pretrained(run / "final" / "model"),
    )
    assert len(tokenizer) == 400 == model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    # A cache that was emptied is no obstacle to a resume; another tokenizer is.
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "empty"))
    resumed = train(compose(run / "recipe.yaml", ["steps=4"]), run)
    assert resumed.progress.step == 4
    shutil.rmtree(run / "final")
    with pytest.raises(RunError, match="tokenizer"):
        train(compose(run / "recipe.yaml", ["steps=5", "tokenizer.train.vocab_size=401"]), run)
