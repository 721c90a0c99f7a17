"""Fine-tuning a sentence encoder against a logistic regression on its own frozen vectors, on the same rows.

    python -m tests.benchmarks.sentence_vectors MODEL [--data FOLDER] [--runs FOLDER] [--seeds 3] [--sets agnews sst2 trec]

MODEL is a folder of a sentence-transformers encoder with mean pooling. For each set the vectors are the mean of the last states
over the real tokens of a text, cut at the same length, divided by their Euclidean norm; the regression is scikit-learn's on all
training rows, with the inverse strength C of its penalty that is most accurate over five folds of them.
`recipe=classify` trains on 90 % of these rows, and the other 10 % choose the epoch; settings are those of `SETTINGS` for every
set and seed, chosen on such a tenth with another seed (full fine-tuning at 5e-5 and 1e-4, LoRA at 1e-3). Both are scored once
on the test rows. Finished runs in the folder of runs are read, not trained again. Results go to
tests/benchmarks/results/sentence_vectors.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from transformers import AutoModel, AutoTokenizer

from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.recipe.compose import compose
from llmrecipe.training.train import train
from tests.benchmarks.stamp import line, machine_line, stamp

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
SETS = ("agnews", "sst2", "trec")
LENGTH = 128
STRENGTHS = [10.0**k for k in range(-2, 4)]
"""Values of C that are tried."""
SETTINGS = [
    "objective.pooling=mean", "stack=[]", "optim.lr=5e-5", "epochs=5", "data.validation=0.1", f"data.max_length={LENGTH}",
]  # fmt: skip


def rows_of(folder: Path, split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split."""
    rows = [json.loads(text) for text in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [str(row["label"]) for row in rows]


@torch.no_grad()
def frozen_vectors(model: str, texts: list[str]) -> torch.Tensor:
    """The mean of the last states of each text, of norm 1, (R, D), computed without padding."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    found = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
        found.append(encoder(ids, torch.ones_like(ids)).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def fitted(vectors: np.ndarray, labels: list[str]) -> GridSearchCV:
    """The regression with the C that is best over five folds of these rows, fitted to all of them."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return GridSearchCV(LogisticRegression(max_iter=5000), {"C": STRENGTHS}, cv=folds).fit(vectors, labels)


def baseline(model: str, folder: Path) -> tuple[float, float]:
    """Accuracy of the regression on the test rows, and its C."""
    (texts, labels), (test, gold) = rows_of(folder, "train"), rows_of(folder, "test")
    learned = fitted(frozen_vectors(model, texts).numpy(), labels)
    return float(learned.score(frozen_vectors(model, test).numpy(), gold)), float(learned.best_params_["C"])


def tuned(model: str, folder: Path, run: Path, seed: int) -> dict[str, float]:
    """Accuracy of a run on its validation and on the test rows."""
    if not (run / "final").is_dir():
        words = [f"model.path={model}", f"data.path={folder}", *SETTINGS, f"seed={seed}", "eval.test=false", "log.live=off"]
        train(compose("classify", [*words, f"run.dir={run}"]))
    quiet = ["eval.bootstrap=0"]
    return {split: evaluate_path(str(run), quiet, split)["accuracy"] for split in ("validation", "test")}


def report(found: dict[str, dict[str, Any]]) -> str:
    """The table of all sets, as Markdown."""
    lines = [
        "Accuracy on the test rows: `recipe=classify` over seeds, and a logistic regression on frozen vectors of its model.",
        "",
        f"Settings: {' '.join(SETTINGS)}",
        "",
        "| set | test rows | regression | C | runs | mean | standard error | mean - regression, in standard errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        scores = one["test"]
        mean = statistics.mean(scores)
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
        apart = (mean - one["regression"]) / error if error else float("inf")
        lines.append(
            f"| {name} | {one['rows']} | {one['regression']:.4f} | {one['C']:g} | {', '.join(f'{s:.4f}' for s in scores)} | "
            f"{mean:.4f} | {error:.4f} | {apart:+.1f} |"
        )
    return "\n".join([*lines, "", machine_line(), line(stamp("sentence_vectors")), ""])


def main(words: list[str] | None = None) -> None:
    """Measure every set and write the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "sentence_vectors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--out", type=Path, default=RESULTS / "sentence_vectors.md")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name in given.sets:
        folder = given.data / f"classify_{name}"
        score, strength = baseline(given.model, folder)
        one = found[name] = {"regression": score, "C": strength, "rows": len(rows_of(folder, "test")[0]), "test": []}
        for seed in range(given.seeds):
            scores = tuned(given.model, folder, given.runs / f"{name}-{seed}", seed)
            one["test"].append(scores["test"])
            print(name, seed, scores, "regression", one["regression"], flush=True)
            given.out.write_text(report(found), encoding="utf-8")


if __name__ == "__main__":
    main()
