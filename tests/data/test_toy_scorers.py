"""The rules, on hand-written answers and on every generated row they are meant to judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmrecipe.data.toy import generate, scorers


def read(name: str, split: str) -> list[dict]:
    path = Path(generate.FOLDER) / name / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_exact_ignores_only_case_space_and_the_full_stop():
    assert scorers.exact(" Cat,  ball.", "cat, ball") == 1
    assert scorers.exact("ball, cat", "cat, ball") == 0
    assert scorers.exact("cat", "cat, ball") == 0


def test_last_number():
    assert scorers.last_number("3 + 4 is 7.", "7") == 1
    assert scorers.last_number("7 it is, or 8", "7") == 0
    assert scorers.last_number("seven", "7") == 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Thank you for asking. The fox is red and lives in the forest.", 1.0),
        ("Go away and be quiet. The fox is red and lives in the forest.", 0.5),
        ("Thank you for asking. The hen is brown and lives in the barn.", 0.5),
        ("Thank you for asking. The fox is not the hen.", 0.5),
        ("I am tired of you. The hen is brown and likes rice.", 0.0),
        ("The fox is red. Thank you for asking.", 0.5),
        ("Thank you for asking. Go away and be quiet. The fox is red.", 0.5),
        ("", 0.0),
    ],
)
def test_manners_by_hand(text: str, score: float):
    assert scorers.manners(text, "fox", "hen") == score


def test_on_topic_reads_whole_words():
    assert scorers.on_topic("The catfish swims.", "cat", "dog") == 0
    assert scorers.on_topic("The cat is happy.", "cat", "hen") == 1
    assert scorers.on_topic("Then the cat came.", "cat", "hen") == 1


def test_well_formed_needs_one_opener_and_one_true_fact():
    assert scorers.well_formed("It is a pleasure. The pig is pink and likes fruit.") == 1
    assert scorers.well_formed("It is a pleasure. The pig is red and likes fruit.") == 0
    assert scorers.well_formed("It is a pleasure. It is a pleasure. The pig is pink and likes fruit.") == 0
    assert scorers.well_formed("The pig is pink and likes fruit.") == 0


def test_preference_rows_are_separated_by_the_rule():
    for split in generate.SPLITS:
        for row in read("preference", split):
            prompt = row["prompt"][0]["content"]
            chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
            topic, avoid = scorers.parse_request(prompt)
            assert scorers.manners(chosen, topic, avoid) == 1 > scorers.manners(rejected, topic, avoid)
            assert scorers.well_formed(chosen) == scorers.well_formed(rejected) == 1
            assert (scorers.prefers(prompt, chosen, rejected), scorers.prefers(prompt, rejected, chosen)) == (1, 0)
            assert scorers.prefers(prompt, chosen, chosen) == 0.5


def test_length_does_not_tell_chosen_from_rejected():
    rows = read("preference", "train")
    longer = [len(r["chosen"][0]["content"].split()) - len(r["rejected"][0]["content"].split()) for r in rows]
    assert abs(sum(longer) / len(longer)) < 0.25


def test_unpaired_labels_are_the_rule():
    rows = read("unpaired", "train")
    for row in rows:
        topic, avoid = scorers.parse_request(row["prompt"][0]["content"])
        assert (scorers.manners(row["completion"][0]["content"], topic, avoid) == 1) is row["label"]
    assert 0.4 < sum(row["label"] for row in rows) / len(rows) < 0.6


@pytest.mark.parametrize("name", ["prompts", "constitution"])
def test_columns_of_requests_are_what_the_text_asks(name: str):
    for row in read(name, "train"):
        assert scorers.parse_request(row["prompt"][0]["content"]) == (row["topic"], row["avoid"])


def test_parse_knows_no_other_text():
    assert scorers.parse_request("What is 3 + 4?") is None
    assert scorers.parse_request("Ann knows the fox. Now tell Ben about the hen.") is None


def test_sentiment_is_the_label_of_classify():
    for row in read("classify", "train"):
        assert scorers.sentiment(row["text"]) == row["label"]


def test_similarity_is_the_score_of_pairs():
    for row in read("pairs", "train"):
        assert scorers.similarity(row["sentence1"], row["sentence2"]) == row["score"]


def test_triples_by_slots():
    for row in read("triples", "train"):
        assert scorers.similarity(row["anchor"], row["positive"]) == 1 > scorers.similarity(row["anchor"], row["negative"])


def test_revision_leaves_nothing_to_criticise():
    for row in [*read("preference", "train"), *read("preference", "test")]:
        prompt, bad = row["prompt"][0]["content"], row["rejected"][0]["content"]
        assert scorers.critique(prompt, bad)
        better = scorers.corrected(prompt, bad)
        assert scorers.critique(prompt, better) == []
        assert scorers.well_formed(better) == 1
        chosen = row["chosen"][0]["content"]
        assert scorers.corrected(prompt, chosen) == chosen


def test_critique_names_each_fault():
    wrong = scorers.critique("Tell me about the fox, not the hen.", "Go away and be quiet. The hen is brown and likes rice.")
    assert len(wrong) == 3 and "rude" in wrong[0] and "hen" in wrong[1] and "fox" in wrong[2]
