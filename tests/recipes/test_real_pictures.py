"""Pictures of real sets: what hidden words gain by them.

Word pieces of a small tokenizer trained on the captions, thumbnails of 8 x 8 pixels as one patch, a small encoder from nothing.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.evaluation.evaluate_model import open_subject, token_rows
from llmrecipe.objectives.feature_inputs import VIEW, VIEWS
from tests.support import shared
from tests.trainings import train_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
Row = dict[str, Any]
SPLITS = ("train", "valid", "test")
FUNCTION_WORDS = {"a", "and", "at", "for", "in", "of", "on", "one", "the", "to", "two", "with"}
MODEL = [
    "tokenizer.path=null", "processor.config={size: {height: 8, width: 8}}", "objective.patch=8", "optim.lr=2e-3",
    "+model.config.initializer_range=0.1", "+model.config.dropout=0.2", "eval.at_start=false", "eval.load_best=false",
]  # fmt: skip
MASKED = ["objective.prob=1.0"]
"""Every word of the name is hidden at once, so that nothing but the picture tells it."""


def named(row: Row) -> Row:
    """Hide the words of the name; "a drawing of" is in every caption."""
    words = row["text"].split()[3:]
    return {**row, "attributes": [word for word in words if word not in FUNCTION_WORDS] or words}


def of_kind(row: Row) -> Row:
    """Add the kind to the caption, and hide it too."""
    kind = row["label"].lower()
    return {**row, "text": f"{row['text']}, one of {kind}", "attributes": [*named(row)["attributes"], *kind.split(" & ")]}


def copied(folder: Path, name: str, change: Callable[[Row], Row], shuffle: bool = False) -> str:
    """`data.path` of a set with other rows; shuffled training rows have the pictures of others."""
    source = shared("data", name)
    shutil.copytree(source / "images", folder / "images")
    for split in SPLITS:
        rows = [change(json.loads(line)) for line in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        if shuffle and split == "train":
            pictures = [row["image"] for row in rows]
            random.Random(0).shuffle(pictures)
            rows = [{**row, "image": picture} for row, picture in zip(rows, pictures, strict=True)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data.path={folder}"


Losses = dict[str, list[tuple[float, float]]]
"""View -> (nll, hidden tokens) of each held-out row."""


def losses(folder: Path) -> Losses:
    """The held-out rows of both splits under a finished run."""
    subject = open_subject(str(folder), ["data.cache=false"])
    found: Losses = {view: [] for view in VIEWS}
    for split in ("validation", "test"):
        data = token_rows(subject, split, None)
        rows = subject.objective.evaluation_rows(data, list(range(len(data))))
        with torch.no_grad(), subject.roles.evaluating():
            batch = subject.objective.collate(rows, subject.roles)
            nll = batch.sum_by_sequence(-subject.roles.policy(batch)["logprobs"])
        for row, one, count in zip(rows, nll.tolist(), batch.counts().tolist(), strict=True):
            found[row[VIEW]].append((one, count))
    return found


def gain(runs: list[Losses], others: list[Losses], view: str) -> tuple[float, float]:
    """Nats a token by which rows with their own pictures are likelier, and its standard error over rows; means over seeds."""
    count = sum(n for _, n in runs[0]["own"])
    differences = [
        statistics.mean(b[view][i][0] for b in others) - statistics.mean(a["own"][i][0] for a in runs)
        for i in range(len(runs[0]["own"]))
    ]
    return sum(differences) / count, statistics.stdev(differences) * len(differences) ** 0.5 / count


@pytest.mark.parametrize(
    ("change", "pieces", "epochs", "removed"),
    [pytest.param(named, 150, 20, False, id="names"), pytest.param(of_kind, 400, 25, True, id="names and kinds")],
)
def test_hidden_words_of_emoji_gain_by_the_picture(
    change: Callable[[Row], Row], pieces: int, epochs: int, removed: bool, tmp_path: Path
) -> None:
    """More than two standard errors over 86 held-out rows: against the pictures of other rows in the same model, and against
    models that learned from the pictures of other rows; where kinds are hidden too, also against no picture."""
    words = [*MODEL, *MASKED, f"tokenizer.train={{vocab_size: {pieces}, algorithm: wordpiece}}", f"epochs={epochs}"]
    own = copied(tmp_path / "own", "image_emoji", change)
    others = copied(tmp_path / "others", "image_emoji", change, shuffle=True)
    runs: dict[str, list[Losses]] = {own: [], others: []}
    for seed in range(3):
        for path, found in runs.items():
            folder = tmp_path / f"run{seed}{path == own}"
            train_recipe(folder, "mmlm", path, *words, f"seed={seed}")
            found.append(losses(folder))
    seen = {
        "pictures of other rows": gain(runs[own], runs[own], "shuffled"),
        "learned without": gain(runs[own], runs[others], "own"),
        **({"no picture": gain(runs[own], runs[own], "removed")} if removed else {}),
    }
    assert all(mean > 2 * error for mean, error in seen.values()), seen


def test_digits_are_read_from_their_pictures(tmp_path: Path) -> None:
    """Ten words for ten digits: most held-out ones are found, and with the pictures of other rows about one in ten."""
    path = copied(tmp_path / "rows", "image_digits", lambda row: {**row, "attributes": row["text"].split()[-1:]})
    words = [*MODEL, *MASKED, "tokenizer.train={vocab_size: 60, algorithm: wordpiece}", "epochs=40"]
    train_recipe(tmp_path / "run", "mmlm", path, *words, "objective.unit=word")
    found = losses(tmp_path / "run")
    mean = {view: sum(nll for nll, _ in rows) / sum(n for _, n in rows) for view, rows in found.items()}
    assert mean["own"] < 0.5 * mean["removed"] and mean["own"] < 0.5 * mean["shuffled"]
