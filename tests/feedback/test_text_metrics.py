"""Metrics of corpora and of JSON, and the reward for answers that keep to their source."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.feedback.generated_answers import score_answers
from llmrecipe.feedback.metrics.json_equal import equal_values
from llmrecipe.feedback.rewards.grounded import Grounded, claims_of
from llmrecipe.objectives.reward_interface import Answer
from llmrecipe.recipe.compose import compose
from tests.trainings import events, train_recipe


def answered(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"prompt": "", "answer": ours, "references": [theirs]} for ours, theirs in pairs]


def test_corpus_scores_are_sacrebleus_on_the_same_predictions() -> None:
    """Counts are added up over rows: neither is the mean of the rows' scores."""
    metrics = pytest.importorskip("sacrebleu.metrics")
    chance = random.Random(0)
    words = ["the", "red", "hen", "sat", "in", "a", "barn", ",", "and", "it", "was", "not", "green", "."]
    pairs = [(" ".join(chance.choices(words, k=9)), " ".join(chance.choices(words, k=8))) for _ in range(12)]
    pairs += [("the red hen sat in the barn", "the red hen sat in a barn"), ("", "nothing")]
    found = score_answers(answered(pairs), ["bleu", "chrf"])
    ours, theirs = [p for p, _ in pairs], [[r for _, r in pairs]]
    assert found["bleu"].value == pytest.approx(metrics.BLEU().corpus_score(ours, theirs).score, abs=1e-9)
    assert found["chrf"].value == pytest.approx(metrics.CHRF().corpus_score(ours, theirs).score, abs=1e-9)
    mean = sum(found["bleu"].metric.score(p, r) for p, r in pairs) / len(pairs)
    assert abs(mean - found["bleu"].value) > 1


def several(count: int, seed: int) -> list[dict[str, Any]]:
    """Answers with one to three right answers each, drawn from few words."""
    chance = random.Random(seed)
    words = ["the", "red", "hen", "sat", "in", "a", "barn", ",", "and", "it", "was", "not", "green", "."]

    def text() -> str:
        return " ".join(chance.choices(words, k=chance.randint(4, 9)))

    rows = [{"prompt": "", "answer": text(), "references": [text() for _ in range(1 + n % 3)]} for n in range(count)]
    return [*rows, {"prompt": "", "answer": "a hen", "references": ["the barn", "the hen"]}]


def test_of_several_references_corpus_scores_are_sacrebleus() -> None:
    """Rows may have unlike numbers of references, which sacrebleu takes as missing ones."""
    metrics = pytest.importorskip("sacrebleu.metrics")
    rows = several(12, 2)
    ours = [row["answer"] for row in rows]
    theirs = [[row["references"][n] if n < len(row["references"]) else None for row in rows] for n in range(3)]
    found = score_answers(rows, ["bleu", "chrf"])
    assert found["bleu"].value == pytest.approx(metrics.BLEU().corpus_score(ours, theirs).score, abs=1e-9)
    assert found["chrf"].value == pytest.approx(metrics.CHRF().corpus_score(ours, theirs).score, abs=1e-9)
    first = [{**row, "references": row["references"][:1]} for row in rows]
    alone = score_answers(first, ["bleu", "chrf"])
    assert all(found[name].value > alone[name].value for name in found)


def test_of_several_references_the_best_score_counts() -> None:
    """ROUGE is rouge-score's own `score_multi`; exact match and word F1 are SQuAD's maximum over answers."""
    rouge = pytest.importorskip("rouge_score.rouge_scorer")
    rows = several(20, 3)
    found = score_answers(rows, ["rouge_l", "rouge_lsum", "exact_match", "squad_match", "token_f1"])
    for name, theirs in (("rouge_l", "rougeL"), ("rouge_lsum", "rougeLsum")):
        scorer = rouge.RougeScorer([theirs])
        wanted = [scorer.score_multi(row["references"], row["answer"])[theirs].fmeasure for row in rows]
        assert [values[0] for values in found[name].rows] == pytest.approx(wanted, abs=1e-12)
    last = {name: scored.rows[-1][0] for name, scored in found.items()}
    assert (last["exact_match"], last["squad_match"], last["token_f1"]) == (0.0, 1.0, 1.0)


def test_a_generated_answer_that_is_any_of_a_row_s_right_answers_counts(tmp_path: Path) -> None:
    """The first is trained and the model has learned it; then the others alone are wrong, and all together right."""
    lists = {"first": ["blue", "azure"], "last": ["azure", "blue"], "other": ["azure", "cyan"]}
    for name, answers in lists.items():
        row = json.dumps({"prompt": "Name the colour of the sky:", "completion": [f" {text}" for text in answers]}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(row * 8, encoding="utf-8")
    found = {}
    for name in lists:
        words = [
            f"data.path={tmp_path}/first.jsonl", f"data.validation={tmp_path}/{name}.jsonl", "steps=12", "batch.size=4",
            "optim.lr=0.01", "schedule=constant", "eval.metrics=[exact_match,bleu]", "eval.max_new_tokens=4",
            "data.max_length=64", "eval.at_start=false", "eval.samples=1", "eval.load_best=false",
        ]  # fmt: skip
        train_recipe(tmp_path / name, "sft_lora", *words)
        found[name] = events(tmp_path / name, "evaluation")[-1]["eval/exact_match"]
        assert events(tmp_path / name, "sample")[-1]["reference"] == lists[name]
    assert found == {"first": 1.0, "last": 1.0, "other": 0.0}


def test_rouge_l_is_the_librarys_on_the_same_predictions() -> None:
    """The F measure of rouge-score without stemming, row by row; its mean is the score of the rows."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    chance = random.Random(1)
    words = ["The", "red", "hen", "sat", "in", "a", "barn,", "3.5", "hen's", "re-read", "Köln", "日本", "-", "and"]
    pairs = [(" ".join(chance.choices(words, k=chance.randint(1, 9))), " ".join(chance.choices(words, k=6))) for _ in range(60)]
    pairs += [("", "nothing"), ("nothing", ""), ("", ""), ("日本", "日本"), ("a a b", "b a a")]
    wanted = [scorer.score(theirs, ours)["rougeL"].fmeasure for ours, theirs in pairs]
    (found,) = score_answers(answered(pairs), ["rouge_l"]).values()
    assert [found.metric.score(*pair) for pair in pairs] == pytest.approx(wanted, abs=1e-12)
    assert found.value == pytest.approx(sum(wanted) / len(wanted))


def test_rouge_lsum_compares_lines_in_any_order() -> None:
    """Two lines swapped share every word; as one text they share a subsequence of the longer one alone."""
    pytest.importorskip("rouge_score")
    lsum, plain = (registry.load_class("metric", name)() for name in ("rouge_lsum", "rouge_l"))
    swapped = ("the hen sat\nthe owl slept", "the owl slept\nthe hen sat")
    assert lsum.score(*swapped) == 1.0 and plain.score(*swapped) == 0.5
    assert lsum.score("a b", "a b\na b") == pytest.approx(2 / 3), "a word counts as often as the prediction has it"
    assert lsum.score("the hen sat", "the hen slept") == plain.score("the hen sat", "the hen slept")
    assert lsum.score("", "x") == lsum.score("x", "\n") == 0.0 and "chrf" in lsum.unfit(["日本語"])


def test_a_metric_that_reads_no_letter_of_the_references_says_so_once(tmp_path: Path) -> None:
    """Chinese answers that are right to the letter score 0; names with an accent are no reason to warn."""
    rouge = registry.load_class("metric", "rouge_l")()
    assert rouge.unfit(["The old café in Köln was open again today, she said.", ""]) is None and rouge.unfit([]) is None
    assert "100% of the letters and digits" in rouge.unfit(["日本語"]) and "chrf" in rouge.unfit(["кот and cat"])
    row = json.dumps({"prompt": "Say it. ", "completion": "日本語"}, ensure_ascii=False) + "\n"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(row * 4, encoding="utf-8")
    words = [
        f"data.path={tmp_path}",
        "steps=2",
        "batch.size=4",
        "eval.every=1",
        "eval.metrics=[rouge_l]",
        "eval.max_new_tokens=2",
    ]
    train_recipe(tmp_path / "run", "sft_lora", *words)
    said = [e["message"] for e in events(tmp_path / "run", "warning") if "rouge_l" in e["message"]]
    assert len(said) == 1 and said[0].startswith("eval.metrics: rouge_l: 100% of the letters")


def test_json_is_compared_as_values() -> None:
    assert equal_values({"a": [1, {"b": None}]}, {"a": [1.0, {"b": None}]})
    assert not equal_values({"a": True}, {"a": 1}) and not equal_values([1, 2], [2, 1]) and not equal_values({"a": 1}, {})
    found = score_answers(
        answered([('{"a": 1}', '{"a":1}'), ("{a: 1}", '{"a":1}'), ("[]", "{}")]), ["json_equal", "json_valid"]
    )
    assert found["json_equal"].value == pytest.approx(1 / 3) and found["json_valid"].value == pytest.approx(2 / 3)


def test_the_share_of_answers_that_state_nothing_readable_by_hand() -> None:
    """An unreadable answer is a wrong one in the score; a metric that reads every text has no such share."""
    rows = answered([("42", "42"), ("I do not know", "7"), ("It is \\sqrt{2}.", "3"), ("", "1")])
    found = score_answers(rows, ["last_number", "exact_match"])["last_number"]
    assert (found.value, found.invalid_rate, found.unread) == (1 / 4, 2 / 4, [False, True, False, True])
    assert score_answers(rows, ["exact_match"])["exact_match"].invalid_rate is None
    rows = answered([('{"a": 1}', '{"a": 1}'), ("{a: 1}", '{"a": 1}'), ("[]", "{}"), ("no", "yes")])
    found = score_answers(rows, ["json_equal"])["json_equal"]
    assert (found.value, found.unread) == (1 / 4, [False, True, False, False])
    assert score_answers([], ["json_equal"])["json_equal"].invalid_rate == 0.0


def test_an_evaluation_shows_the_share_beside_the_score_with_its_interval() -> None:
    from llmrecipe.evaluation.evaluate_model import evaluate_path
    from llmrecipe.feedback.directions import direction_of
    from llmrecipe.objectives.finetuning.sft import Sft

    words = ["objective=sft", "data.path=builtin:sft", "eval.metrics=[last_number]", "eval.batches=1", "batch.size=4"]
    found = evaluate_path("tiny", [*words, "eval.max_new_tokens=3", "eval.bootstrap=50"])
    share = found["last_number/invalid_rate"]
    assert share in (0.5, 0.75, 1.0) and found["last_number"] <= 1.0 - share
    assert 0.0 <= found["last_number/invalid_rate/low"] <= share <= found["last_number/invalid_rate/high"] <= 1.0
    assert direction_of("eval/last_number/invalid_rate", Sft(), ["last_number"]) == "min"


def test_claims_by_hand() -> None:
    text = 'On Monday Ann-Marie Lee of Oslo sold 3 hens for 1,200.50. She said: "a fair price". Bo agreed.'
    assert claims_of(text) == ["3", "1,200.50", "Monday Ann-Marie Lee", "Oslo", "a fair price"]
    assert claims_of("It was quiet.") == [] and claims_of(text, names=False, quotes=False) == ["3", "1,200.50"]


def test_the_share_of_claims_in_the_source_is_the_score() -> None:
    source = "Ann Lee of  Oslo sold 312 hens."
    reward = Grounded()

    def score(text: str, given: Grounded = reward) -> float:
        return given.score([Answer("12 asked", text, {"source": source}, [1], [2], True)])[0]

    assert score("We know that Ann Lee sold 312 of them in oslo.") == 1.0
    assert score("We know that Ann Lee sold 12.") == 0.5, "12 does not occur in 312"
    assert score("We know that Bo Lee sold 12.") == 0.0 and score("Nothing is known.") == 1.0
    assert score("We know that Ann Lee sold 12.", Grounded(prompt=True)) == 1.0
    with pytest.raises(RecipeError, match="looks for nothing"):
        Grounded(numbers=False, names=False, quotes=False).check(["source"], "objective.reward.grounded")


@pytest.mark.parametrize("seed", range(4))
def test_the_f1_of_written_labels_is_scikit_learns_and_what_is_no_label_hits_nothing(seed: int) -> None:
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    chance = random.Random(seed)
    labels = ["positive", "negative", "neutral", "mixed"]
    gold = [chance.choice(labels[: 3 + seed % 2]) for _ in range(30)]
    written = [chance.choice([right, right, *labels, "no idea"]) for right in gold]
    found = score_answers(answered([(f" {w.capitalize()}.", g) for w, g in zip(written, gold)]), ["label_f1"])["label_f1"]
    wanted = f1_score(gold, written, average="macro", labels=sorted(set(gold)), zero_division=0)
    assert found.value == pytest.approx(wanted, abs=1e-12)
    assert found.invalid_rate == sum(w not in gold for w in written) / 30
    assert score_answers([], ["label_f1"])["label_f1"].value == 0.0
    either = [
        {"prompt": "", "answer": "sad", "references": ["bad", "sad"]},
        {"prompt": "", "answer": "bad", "references": ["bad"]},
    ]
    assert score_answers(either, ["label_f1"])["label_f1"].value == 1.0


def test_what_is_compared_can_be_extracted() -> None:
    """The last match, or its group; an answer without one is wrong and counted, a reference without one stays whole."""
    rows = answered(
        [("A, B or C? I take (C)", "C"), ("the answer is B.", "The answer is: B"), ("none", "A"), ("D", "the last")]
    )
    found = score_answers(rows, ["exact_match", "json_valid"], r"\b([A-E])\b")
    assert [row[0] for row in found["exact_match"].rows] == [1.0, 1.0, 0.0, 0.0]
    assert found["exact_match"].invalid_rate == 0.25 and found["json_valid"].invalid_rate is not None
    assert score_answers(rows, ["exact_match"])["exact_match"].value == 0.0


@pytest.mark.parametrize(
    ("given", "told"), [("(a", "eval.extract: must be a regular expression \\("), ("(a)(b)", "of one group at most")]
)
def test_a_pattern_that_cannot_be_is_told_with_the_recipe(given: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        compose("sft", [f"eval.extract='{given}'"])
