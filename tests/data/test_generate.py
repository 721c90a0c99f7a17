"""The generator: the committed files are what it writes, and no held-out question is in any training file."""

from __future__ import annotations

import io
import json
import re
from random import Random

import numpy as np
import pyarrow as pa
import pytest

from llmrecipe.data.row_formats.squad import spans_of
from llmrecipe.data.toy import generate, grammar, pictures, questions, written_tasks


def read(name: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (generate.FOLDER / name / f"{split}.jsonl").read_text().splitlines()]


def asked(row: dict) -> str:
    """The text that decides a row's split."""
    if "messages" in row:
        return next(m["content"] for m in row["messages"] if m["role"] == "user")
    if "prompt" in row:
        return row["prompt"][0]["content"]
    return row.get("text") or row.get("anchor") or row["sentence1"]


@pytest.mark.parametrize("name", [*generate.SETS, *generate.LATER])
def test_committed_files_are_what_the_generator_writes(name: str, tmp_path):
    for path in generate.write_set(tmp_path, name, seed=0):
        assert path.read_bytes() == (generate.FOLDER / name / path.name).read_bytes(), (
            "run python -m llmrecipe.data.toy.generate"
        )


def test_committed_pictures_are_what_the_generator_draws():
    """Pixel for pixel; no combination of words, radius and place is in two splits, and the sentence names what is drawn."""
    from PIL import Image

    places: dict[tuple, str] = {}
    for split, drawn in pictures.picture_rows().items():
        table = pa.ipc.open_file(str(pictures.FOLDER / f"{split}.arrow")).read_all()
        kept = table.to_pylist()
        assert len(kept) == len(drawn) == pictures.SIZES[split]
        for one, other in zip(kept, drawn):
            held, made = (np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in (one, other))
            assert np.array_equal(held, made), "run python -m llmrecipe.data.toy.pictures"
            assert {k: v for k, v in one.items() if k != "image"} == {k: v for k, v in other.items() if k != "image"}
            thing = (held != held[0, 0]).any(-1)
            colour = pictures.COLOURS[one["attributes"][1]]
            assert (held[thing] == colour).all() and all(word in one["text"] for word in one["attributes"])
            assert one["answer"] == one["attributes"][pictures.QUESTIONS.index(one["question"])]
            assert (thing[:16].sum() > thing[16:].sum()) == (one["attributes"][3] == "high")
            assert places.setdefault((colour, thing.tobytes()), split) == split


def test_another_seed_gives_other_rows(tmp_path):
    paths = generate.write_set(tmp_path, "sft", seed=1)
    assert all(path.read_bytes() != (generate.FOLDER / "sft" / path.name).read_bytes() for path in paths)


@pytest.mark.parametrize("name", generate.SETS)
def test_sizes(name: str):
    counts = tuple(len(read(name, split)) for split in generate.SPLITS)
    assert counts == generate.SETS[name][1]
    assert sum((generate.FOLDER / name / f"{split}.jsonl").stat().st_size for split in generate.SPLITS) < 300_000


def test_a_question_is_in_one_split_of_all_sets():
    split_by_question: dict[str, str] = {}
    for name in generate.SETS:
        for split in generate.SPLITS:
            for row in read(name, split):
                assert split_by_question.setdefault(asked(row), split) == split


def test_the_corpus_of_the_embedded_model_holds_nothing_held_out(tmp_path):
    files = [generate.write_set(tmp_path, name, seed=0, sizes=(2000, 10, 10))[0] for name in generate.CORPUS]
    for line in "".join(file.read_text() for file in files).splitlines():
        row = json.loads(line)
        questions = [m["content"] for m in row["messages"] if m["role"] == "user"] if "messages" in row else [row["text"]]
        assert {generate.split_of(question) for question in questions} == {"train"}


def test_every_turn_of_a_conversation_is_in_its_split():
    for split in generate.SPLITS:
        for row in read("chat", split):
            roles = [m["role"] for m in row["messages"]]
            assert roles[-1] == "assistant" and roles.count("user") == roles.count("assistant")
            questions = [m["content"] for m in row["messages"] if m["role"] == "user"]
            assert {generate.split_of(question) for question in questions} == {split}


def test_the_new_task_is_reversal():
    for row in read("sft", "test"):
        listed = row["prompt"][0]["content"].split(": ")[1].rstrip(".").split(", ")
        assert row["answer"] == row["completion"][0]["content"] == f"The list is now {', '.join(listed[::-1])}."
        assert len(set(listed)) == len(listed) >= 3


def test_sums_are_right_in_the_set_and_noisy_in_the_corpus():
    for row in read("sums", "test"):
        a, b = [int(word) for word in row["prompt"][0]["content"].replace("?", "").replace(".", "").split() if word.isdigit()]
        assert int(row["answer"]) == a + b
    rng = Random(0)
    wrong = 0
    for _ in range(2000):
        question, text = questions.ask_sum(rng, noise=0.4)
        wrong += sum(int(word) for word in question.replace("?", "").replace(".", "").split() if word.isdigit()) != int(text)
    assert 0.35 < wrong / 2000 < 0.45


def test_manners_of_the_corpus_are_tossed_coins():
    from llmrecipe.data.toy import scorers

    rng, scores = Random(0), []
    while len(scores) < 600:
        _, row = generate.row_talk(rng)
        question = row["messages"][0]["content"]
        if scorers.parse_request(question) and any(question.startswith(t.split("{")[0]) for t in grammar.TELL[:4]):
            scores.append(scorers.manners(row["messages"][-1]["content"], *scorers.parse_request(question)))
    assert 0.44 < sum(scores) / len(scores) < 0.56


def test_stories_are_consistent():
    for row in read("stories", "train"):
        text = row["text"]
        assert 6 <= text.count(".") <= 9
        for sentence in text.split(". "):
            words = sentence.rstrip(".").split()
            if words[0] == "Now" and words[2] in grammar.COLOURS:
                colour, thing = words[2], words[3]
                assert f"a {colour} {thing}" in text
                assert sum(f" {c} {thing}" in text for c in grammar.COLOURS) == 1


def test_too_few_different_rows_is_said():
    with pytest.raises(ValueError, match="too few different rows"):
        list(
            generate.rows(lambda rng: ("What is 3 + 4?", {"a": rng.randint(0, 1)}), 5, generate.split_of("What is 3 + 4?"), "0")
        )


def test_command_line(tmp_path, capsys):
    generate.main(["--sets", "sft", "pretrain_talk", "--out", str(tmp_path), "--rows", "50", "--seed", "3"])
    assert len(capsys.readouterr().out.split()) == 6
    assert len((tmp_path / "pretrain_talk" / "train.jsonl").read_text().splitlines()) == 50
    assert len((tmp_path / "sft" / "test.jsonl").read_text().splitlines()) == 5


def test_every_answer_to_a_passage_is_the_one_sentence_of_it_about_what_is_asked():
    for split in generate.SPLITS:
        for row in read("passages", split):
            (text,), (start,) = spans_of(row)
            about = {"Where": " is in the ", "What colour": "The "}
            mark = next(mark for begin, mark in about.items() if row["question"].startswith(begin))
            assert [s for s in row["context"].removesuffix(".").split(". ") if mark in f"{s} "] == [text]
            assert row["context"][start:].startswith(f"{text}.")
            assert any(word in text.split() for word in row["question"].rstrip("?").split()[-2:])


def test_answers_of_the_written_out_tasks_are_right():
    """Each answer is worked out again from its prompt."""
    for split in generate.SPLITS:
        for row in read("problems", split):
            a, b = [int(word) for word in re.findall(r"\d+", row["prompt"])]
            less = ("gives" in row["prompt"] and "of them" in row["prompt"]) or "takes" in row["prompt"]
            number = a - b if less else a + b
            assert row["completion"] == f"{a} {'-' if less else '+'} {b} = {number}\n#### {number}"
            assert row["answer"] == str(number) and number >= 0
        for row in read("summaries", split):
            friend, colour, thing, hero, here, there = re.fullmatch(
                r"(\w+) moved the (\w+) (\w+) of (\w+) from the (\w+) to the (\w+)\.", row["completion"]
            ).groups()
            for sentence in (f"a {colour} {thing}.", f"{hero} put the {thing} in the {here}."):
                assert sentence in row["prompt"]
            assert f"Then {friend} took the {thing} to the {there}." in row["prompt"]
        for row in read("intents", split):
            value = json.loads(row["completion"])
            words = {word for name, text in value.items() if name != "intent" for word in text.split()} - {"the"}
            assert tuple(value)[1:] == tuple(written_tasks.VALUES[value["intent"]]) and all(w in row["prompt"] for w in words)
        back = {made: word for word, made in written_tasks.DICTIONARY.items()}
        for row in read("translations", split):
            words = re.findall(r"\w+", row["completion"])
            known = {back.get(word, word) for word in words} - {"Est", "Put", "Hat", "Mi", "est", "ke"}
            assert known == set(re.findall(r"\w+", row["prompt"])) - {"The", "the", "is", "in", "Is", "put", "has", "a"}


def test_no_two_words_have_one_translation():
    made = list(written_tasks.DICTIONARY.values())
    assert len(set(made)) == len(made) == 36 and not set(made) & set(written_tasks.DICTIONARY)
