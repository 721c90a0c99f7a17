"""A language model from nothing on real text: fewer held-out bits per byte than n-grams, and fewer the more it reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.recipes.ngrams import Trigram, own_bits
from tests.support import shared
from tests.trainings import events, train_recipe

START, END = 256, 257
STEPS, ROWS, LENGTH = 300, 4, 128
"""1x is 300 steps of four rows of 128 tokens, 153,600 tokens."""
WORDS = [
    "model=native", "model.init=random", "model.config.hidden_size=96", "model.config.num_hidden_layers=3",
    "tokenizer.train.vocab_size=512", f"data.max_length={LENGTH}", "data.blocks=true", "data.packing=off",
    f"batch.size={ROWS}", "optim.lr=4e-3", "eval.at_start=false",
]  # fmt: skip


def as_bytes(split: str) -> list[list[int]]:
    """Documents as bytes between a start and an end token."""
    lines = (shared("data", "text_shakespeare") / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [[START, *json.loads(line)["text"].encode(), END] for line in lines]


def test_a_trigram_by_hand() -> None:
    # Twenty documents "ab": two tokens tell the next for certain, one does as well, so what is known costs next to nothing.
    a, b = 1, 2
    model = Trigram([[START, a, b, END]] * 20, 300)
    assert sum(model.weights) == pytest.approx(1.0) and model.weights[2] + model.weights[3] > 0.99
    assert model.bits([[START, a, b, END]]) < 0.05 < 5.0 < model.bits([[START, b, a, END]])
    # With weights of its own: p(a) = 1/4 1/300 + 1/4 1/3 + 1/4 1 after the start, where no trigram is possible.
    model.weights = [0.25, 0.25, 0.25, 0.25]
    assert model.bits([[START, a]]) == pytest.approx(-math.log2((1 / 300 + 1 / 3 + 1) / 3))


def test_an_untrained_trigram_is_uniform() -> None:
    model = Trigram([[START, 1, END]] * 20, 4)
    model.weights = [1.0, 0.0, 0.0, 0.0]
    assert model.bits([[START, 1, 2, END]]) == pytest.approx(3 * 2.0)


def test_entropies_by_hand() -> None:
    # Tokens 1 1 2 and the end of each of two documents: shares 1/2, 1/4, 1/4. After a start comes 1, after 1 come 1 and 2.
    documents = [[START, 1, 1, 2, END]] * 2
    assert own_bits(documents, 1) == pytest.approx(8 * 1.5) and own_bits(documents, 2) == pytest.approx(4 * 1.0)
    assert own_bits(documents, 3) == pytest.approx(0.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], float]:
    """Held-out bits per byte of a run, by seed and multiple of the tokens."""
    folder: Path = tmp_path_factory.mktemp("runs")
    data = shared("data", "text_shakespeare")

    @cache
    def run(seed: int, times: int) -> float:
        place = folder / f"{seed}-{times}"
        train_recipe(place, "clm", *WORDS, f"data.path={data}", f"seed={seed}", f"steps={STEPS * times}")
        return float(events(place, "evaluation")[-1]["eval/bits_per_byte"])

    return run


def test_the_first_loss_on_real_text_is_the_logarithm_of_the_vocabulary(tmp_path: Path) -> None:
    run = train_recipe(tmp_path, "clm", *WORDS, f"data.path={shared('data', 'text_shakespeare')}", "steps=1", "eval.batches=1")
    assert events(tmp_path)[0]["loss"] == pytest.approx(math.log(len(run.tokenizer)), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twice_the_tokens_are_better_than_once_and_than_a_trigram(seed: int, measured: Callable[[int, int], float]) -> None:
    held_out = as_bytes("valid")
    trigram = Trigram(as_bytes("train"), END).bits(held_out) / sum(len(d) - 2 for d in held_out)
    # By the held-out texts' own counts, so that no unigram and no bigram model needs fewer bits.
    alone, one_before = (own_bits(held_out, order) / sum(len(d) - 2 for d in held_out) for order in (1, 2))
    assert measured(seed, 2) < trigram < one_before < alone
    assert measured(seed, 2) < measured(seed, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_seven_times_the_tokens_are_better_than_a_trigram_of_the_same_tokens(tmp_path: Path) -> None:
    data = shared("data", "text_shakespeare")
    longer = [
        "model.config.hidden_size=128",
        "model.config.dropout=0.1",
        "optim.lr=3e-3",
        "optim.weight_decay=0.1",
        "steps=2200",
    ]
    run = train_recipe(tmp_path, "clm", *WORDS, *longer, f"data.path={data}", "eval.every=800")
    texts = {
        split: [json.loads(line)["text"] for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "valid")
    }
    tokens = {split: [[*run.tokenizer(t)["input_ids"], run.tokenizer.eos_token_id] for t in texts[split]] for split in texts}
    bits = Trigram(tokens["train"], len(run.tokenizer)).bits(tokens["valid"])
    assert events(tmp_path, "evaluation")[-1]["eval/bits_per_byte"] < bits / sum(len(t.encode()) for t in texts["valid"])
