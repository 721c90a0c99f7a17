"""The embedded model: loads as a plain Llama, answers in its world, stops, and leaves the tasks of the recipes to learn."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrecipe.data.toy import generate, scorers
from llmrecipe.models import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny.FOLDER, dtype=torch.float32).eval()


def read(name: str, split: str = "test") -> list[dict]:
    return [json.loads(line) for line in (generate.FOLDER / name / f"{split}.jsonl").read_text().splitlines()]


@torch.no_grad()
def answers(model, tokenizer, prompts: list[list[dict]], sample: bool = False) -> list[tuple[str, bool]]:
    """Answers with whether they ended by themselves."""
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**batch, max_new_tokens=40, do_sample=sample, **({"top_k": 0} if sample else {}))[
        :, batch["input_ids"].shape[1] :
    ]
    return [(tokenizer.decode(row, skip_special_tokens=True), tokenizer.eos_token_id in row) for row in out]


@torch.no_grad()
def logprob(model, tokenizer, prompt: list[dict], answer: list[dict]) -> float:
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor([tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]])
    found = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(found[len(start) - 1 :].sum())


def test_size_and_files():
    assert 1e6 < sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny.FOLDER).parameters()) < 3e6
    assert sum(file.stat().st_size for file in tiny.FOLDER.iterdir()) < 5_000_000
    assert not list(tiny.FOLDER.glob("*.bin"))


def test_tokens_are_distinct_and_known_to_the_config(tokenizer, model):
    ids = [tokenizer.convert_tokens_to_ids(token) for token in [*tiny.SPECIAL.values(), *tiny.ROLES, *tiny.SENTINELS]]
    assert len(set(ids)) == len(ids) and max(ids) < 48
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    for name in ("pad", "bos", "eos"):
        expected = getattr(tokenizer, f"{name}_token_id")
        assert expected == getattr(model.config, f"{name}_token_id") == getattr(model.generation_config, f"{name}_token_id")


@pytest.mark.parametrize("text", ["The fox is red.", "Ünïcode ☃ 漢字 \t\n 1234", "", "don't  stop"])
def test_every_text_survives_the_tokenizer(tokenizer, text: str):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == text


def test_template_marks_the_answers(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "user "},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye"},
    ]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, m in zip(out["input_ids"], out["assistant_masks"]) if m]
    assert tokenizer.decode(trained) == "user <eos>Bye<eos>"
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert out["input_ids"][: len(prompt)] == prompt
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "Once"}], tokenize=False)


def test_it_answers_and_stops(model, tokenizer):
    questions = {
        "What is the opposite of hot?": "The opposite of hot is cold.",
        "Ann has a red ball. Ben has a blue cup. What colour is the cup?": "The cup is blue.",
        "What is the last word of this list: owl, mouse, cow, hen?": "The last word is hen.",
        "Where does the frog live?": "The frog lives in the river.",
        "Hello, I am Kim.": "Hello Kim, how can I help?",
    }
    found = answers(model, tokenizer, [generate.user_turn(question) for question in questions])
    assert found == [(text, True) for text in questions.values()]


def test_it_answers_held_out_questions(model, tokenizer):
    prompts, wanted = [], []
    for row in read("chat"):
        turn = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        prompts.append(row["messages"][:turn])
        wanted.append(row["messages"][turn]["content"])
    found = answers(model, tokenizer, prompts)
    assert sum(ended for _, ended in found) / len(found) > 0.99
    assert sum(text == right for (text, _), right in zip(found, wanted)) / len(found) > 0.6


def test_the_new_task_is_not_learnt_yet(model, tokenizer):
    rows = read("sft")[:60]
    found = answers(model, tokenizer, [row["prompt"] for row in rows])
    assert sum(scorers.exact(text, row["answer"]) for (text, _), row in zip(found, rows)) / len(rows) < 0.1


def test_it_has_no_preference_yet(model, tokenizer):
    rows = read("preference")
    wins = [
        logprob(model, tokenizer, r["prompt"], r["chosen"]) > logprob(model, tokenizer, r["prompt"], r["rejected"])
        for r in rows
    ]
    assert 0.35 < sum(wins) / len(wins) < 0.65


def test_its_own_answers_score_one_half(model, tokenizer):
    rows = read("prompts")
    found = [text for text, _ in answers(model, tokenizer, [row["prompt"] for row in rows], sample=True)]
    score = sum(scorers.manners(text, row["topic"], row["avoid"]) for text, row in zip(found, rows)) / len(rows)
    assert 0.4 < score < 0.6
    assert sum(map(scorers.well_formed, found)) / len(found) > 0.8


@pytest.mark.slow
def test_a_fresh_tokenizer_has_the_committed_tokens(tmp_path, tokenizer):
    corpus = [generate.write_set(tmp_path, name, seed=0)[0] for name in generate.CORPUS]
    tiny.start_tiny(tmp_path / "start", [*corpus, *(generate.FOLDER / name / "train.jsonl" for name in sorted(generate.SETS))])
    fresh = AutoTokenizer.from_pretrained(tmp_path / "start")
    assert set(fresh.get_vocab()) == set(tokenizer.get_vocab())
    assert fresh.chat_template == tokenizer.chat_template


def test_the_start_of_training_has_the_shape_and_tokenizer_of_the_package(tmp_path, model):
    tiny.start_tiny(tmp_path, [])
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny.FOLDER / "tokenizer.json").read_bytes()
    begun, done = json.loads((tmp_path / "config.json").read_text()), model.config.to_dict()
    assert all(done[key] == begun[key] for key in begun if key not in ("dtype", "architectures"))


def test_install_writes_bfloat16_files(tmp_path, model):
    model.save_pretrained(tmp_path / "run" / "final" / "model")
    AutoTokenizer.from_pretrained(tiny.FOLDER).save_pretrained(tmp_path / "run" / "final")
    tiny.main(["install", str(tmp_path / "run"), str(tmp_path / "out")])
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny.FOLDER / name).read_bytes()
