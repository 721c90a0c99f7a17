"""Plain facts that hold for whole runs: what can be separated is, what has learned nothing guesses, what is replayed stays."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.runs.run_dir import read_metrics
from tests.trainings import train_recipe

COLOURS = ("red", "green", "blue", "brown", "grey", "white", "black", "golden")
SIDES = {"bird": ("hen", "owl", "duck"), "fruit": ("pear", "plum", "apple")}
FAMILIES = {
    "full": ("[]", "5e-4"),
    "additive": ("[adapter]", "5e-3"),
    "selective": ("[bitfit] stack.bitfit.missing=add_zero", "1e-2"),
    "reparameterized": ("[lora]", "5e-3"),
    "hybrid": ("[mam]", "5e-3"),
    "memory": ("[nf4,lora]", "5e-3"),
    "regularization": ("[l2sp]", "5e-4"),
}
"""Family of methods -> a stack of it (with its options as words), and a learning rate."""


def written(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_separable_set_is_separated_under_every_family(family: str, tmp_path: Path) -> None:
    """The noun decides; held-out rows are other pairs of known words."""
    rows = [
        {"text": f"the {c} {n}", "label": side} for side, nouns in SIDES.items() for c, n in itertools.product(COLOURS, nouns)
    ]
    random.Random(0).shuffle(rows)
    train, held = written(tmp_path / "train.jsonl", rows[:32]), written(tmp_path / "held.jsonl", rows[32:])
    stack, rate = FAMILIES[family]
    words = [
        *f"stack={stack}".split(),
        f"optim.lr={rate}",
        f"data.path={train}",
        f"data.validation={held}",
        "batch.size=16",
        "steps=48",
    ]
    train_recipe(tmp_path / "run", "classify", *words, "eval.every=12", "data.max_length=32")
    assert read_metrics(tmp_path / "run")["eval/accuracy"] > 0.97


def test_fresh_weights_choose_by_chance(tmp_path: Path) -> None:
    """Four options that are drawn alike, any of them the right one: 1/4 within three standard deviations, by every rank."""
    chance, count = random.Random(3), 256
    names = [f" {c} {n}" for c in COLOURS for nouns in SIDES.values() for n in nouns]
    rows = []
    for number in range(count):
        options = chance.sample(names, 4)
        rows.append({"prompt": f"Which is number {number}?", "completion": chance.choice(options), "options": options})
    path = written(tmp_path / "rows.jsonl", rows)
    words = ["objective=choices", "model.init=random", f"data.path={path}", f"data.validation={path}", "eval.bootstrap=0"]
    found = evaluate_path("tiny", [*words, "batch.size=64", "data.max_length=64", "seed=1"])
    ranks = {name: value for name, value in found.items() if name.startswith("rank_accuracy")}
    assert len(ranks) == 5
    assert all(abs(value - 0.25) < 3 * math.sqrt(0.25 * 0.75 / count) for value in ranks.values()), ranks


@pytest.mark.slow
def test_replay_keeps_more_than_half_of_what_full_fine_tuning_forgets(tmp_path: Path) -> None:
    """Two languages without a common letter, and a model that knew the first: a fifth of the tokens replays it."""
    chance = random.Random(0)

    def texts(letters: str, count: int) -> list[dict[str, str]]:
        """Words of three kinds of letters in turn, so that each letter says which may follow."""
        kinds = [letters[i::3] for i in range(3)]
        return [{"text": "".join(chance.choice(kinds[i % 3]) for i in range(24))} for _ in range(count)]

    old, new = "abcdefghijkl", "nopqrstuvwxy"
    first, second, held = (
        written(tmp_path / f"{name}.jsonl", texts(letters, count))
        for name, letters, count in (("first", old, 160), ("second", new, 160), ("held", old, 24))
    )
    small = ["model.config.hidden_size=48", "model.config.num_hidden_layers=2", "data.max_length=32", "optim.lr=3e-3"]
    small += ["batch.size=16", "schedule=constant", "data.blocks=false"]
    every = written(tmp_path / "both.jsonl", [*texts(old, 8), *texts(new, 8)])
    # A tokenizer of both languages: bytes and a few pairs.
    made = train_recipe(
        tmp_path / "old", "clm_from_nothing", *small, f"data.path={{{first}: 0.99, {every}: 0.01}}", "steps=60",
        "tokenizer.train.vocab_size=300",
    )  # fmt: skip
    lost = {}
    for name, data in (("plain", second), ("replay", f"{{{second}: 0.8, {first}: 0.2}}")):
        words = ["model.init=pretrained", f"model.path={made.dir.path}"]
        train_recipe(
            tmp_path / name, "clm", *words, f"data.path={data}", "data.shares=tokens", "data.max_length=32", "steps=60",
            "batch.size=16", "schedule=constant", "optim.lr=3e-3", f"+eval.forgetting.old={held}", "eval.bootstrap=0",
        )  # fmt: skip
        lost[name] = read_metrics(tmp_path / name)["forget/old"]
    assert lost["plain"] > 1.0 and lost["replay"] < 0.5 * lost["plain"], lost
