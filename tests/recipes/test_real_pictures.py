"""Pictures of real sets: what hidden words gain by them.

Word pieces of a small tokenizer trained on the captions, thumbnails of 8 x 8 pixels as one patch, a small encoder from nothing.
"""

from __future__ import annotations

import json
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
MODEL = [
    "tokenizer.path=null", "processor.config={size: {height: 8, width: 8}}", "objective.patch=8", "optim.lr=2e-3",
    "+model.config.initializer_range=0.1", "+model.config.dropout=0.2", "eval.at_start=false", "eval.load_best=false",
]  # fmt: skip
MASKED = ["objective.prob=1.0"]
"""What is hidden is hidden at once, so that nothing but the picture tells it."""


def copied(folder: Path, name: str, change: Callable[[Row], Row]) -> str:
    """`data.path` of a set with other rows."""
    source = shared("data", name)
    shutil.copytree(source / "images", folder / "images")
    for split in SPLITS:
        rows = [change(json.loads(line)) for line in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
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


def test_digits_are_read_from_their_pictures(tmp_path: Path) -> None:
    """Ten words for ten digits: most held-out ones are found, and with the pictures of other rows about one in ten."""
    path = copied(tmp_path / "rows", "image_digits", lambda row: {**row, "attributes": row["text"].split()[-1:]})
    words = [*MODEL, *MASKED, "tokenizer.train={vocab_size: 70, algorithm: wordpiece}", "epochs=40"]
    train_recipe(tmp_path / "run", "mmlm", path, *words, "objective.unit=word")
    found = losses(tmp_path / "run")
    mean = {view: sum(nll for nll, _ in rows) / sum(n for _, n in rows) for view, rows in found.items()}
    assert mean["own"] < 0.5 * mean["removed"] and mean["own"] < 0.5 * mean["shuffled"]


def test_kinds_of_emoji_are_read_from_their_pictures(tmp_path: Path) -> None:
    """The picture of a row beats none, and that of another row, by more than two standard errors of the held-out rows.

    What is hidden is the group of an emoji (animals, travel, ...), one of six words that all splits share. Names cannot show
    it: 83 of the 86 held-out ones have a word that no training row has.
    """

    def change(row: Row) -> Row:
        word = row["label"].split()[0].lower()
        return {**row, "text": f"a drawing of {word}", "attributes": [word]}

    path = copied(tmp_path / "rows", "image_emoji", change)
    words = [*MODEL, *MASKED, "tokenizer.train={vocab_size: 84, algorithm: wordpiece}", "epochs=15"]
    train_recipe(tmp_path / "run", "mmlm", path, *words, "objective.unit=word")
    found = losses(tmp_path / "run")
    for other in ("removed", "shuffled"):
        gains = [a / n - b / m for (a, n), (b, m) in zip(found[other], found["own"], strict=True)]
        assert statistics.mean(gains) > 2 * statistics.stdev(gains) / len(gains) ** 0.5, other
