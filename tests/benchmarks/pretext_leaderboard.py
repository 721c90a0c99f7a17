"""What the objectives of pretraining are worth to a task, on real sets: `recipe=pretraining_leaderboard` on two of them.

    python -m tests.benchmarks.pretext_leaderboard [--data FOLDER] [--runs FOLDER]

`e2e_nlg`: every objective of texts learns from the descriptions of restaurants in the training rows; the task is to mark the
span of a description that answers a question (`What is it near?`), made of the rows' own meaning representations: of each row
one whose value is in the description word for word. `pairs_stsb`: three routes to the vector of a sentence learn from the
sentences of the training pairs; the task is to find the second sentence of the pairs scored 4 or more, and its score how the
cosine of all pairs follows theirs (Spearman). The tokenizer is made of the texts. Rows of a table have the same shape, steps
and rows. A pretext has 1,000 steps: there the loss of hidden words falls slowly on validation rows of `e2e_nlg`; the steps of
the tasks were not tuned. Finished runs in the folder of runs are read, not trained again. Results go to
tests/benchmarks/results/pretext_leaderboard.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmrecipe.cli import app
from llmrecipe.evaluation.paired_differences import paired_interval
from llmrecipe.models.tokenizer_training import trained_tokenizer
from llmrecipe.pipelines.run_stages import state_of
from llmrecipe.pipelines.subprocesses import command_of
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan
from tests.benchmarks.stamp import RESULTS, line, machine_line, stamp

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "pretraining_leaderboard"
SHAPE = [
    "model.config.hidden_size=96", "+model.config.intermediate_size=192", "stages.pretext.steps=1000",
    "stages.board.plot=false",
]  # fmt: skip
QUESTIONS = {
    "name": "What is it called?", "near": "What is it near?", "food": "What food is there?", "area": "Where is it?",
    "price": "What does it cost?", "customer rating": "How is it rated?",
}  # fmt: skip
"""Slot of a meaning representation -> the question whose answer is its value."""
METRICS = {"e2e_nlg": "exact match", "pairs_stsb": "Spearman"}
E2E = ["steps=40"]
STSB = [
    "steps=20", "stages.pretext.batch.size=32", "stages.pretext.data.max_length=48", "stages.board.metric=test/spearman",
    "~stages.fresh.matrix.shape.decoder",
    *(f"~stages.pretext.matrix.pretext.{name}" for name in ("nsp", "dae", "clm")),
    "stages.task.matrix.pretext=[mlm,contrastive,tsdae]", "+stages.pretext.matrix.pretext.contrastive.objective.pool=avg",
    *(f"{plus}stages.{stage}.{word}" for stage in ("task", "fresh") for plus, word in (
        ("", "recipe=contrastive"), ("+", "objective.min_score=4"))),
    "+stages.task.model.init=pretrained", "+stages.task.tokenizer.path=null", "+stages.task.with=['model.config={}']",
]  # fmt: skip


def tokenizer_words(path: str, size: int, algorithm: str = "bpe", recipe: str = "mlm") -> list[str]:
    """Make a tokenizer of the texts of a set; return the words of a recipe that read it and shape a new model after it."""
    words = [f"data.path={path}", "tokenizer.path=null", f"tokenizer.train={{vocab_size: {size}, algorithm: {algorithm}}}"]
    recipe_made = compose(recipe, words).recipe
    assert recipe_made.tokenizer.train is not None
    ids = {key: recipe_made.model.config[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    folder = trained_tokenizer(recipe_made.tokenizer.train)
    return [f"tokenizer.path={folder}", *(f"+model.config.{key}={value}" for key, value in ids.items())]


def finished(recipe: str, words: Sequence[str]) -> dict[str, Any]:
    """Run the stages of a pipeline one after the other inside this process; return its leaderboard."""
    made = plan(compose(recipe, list(words)))
    for stage in made.stages:
        state = state_of(stage)
        if state != "done" and app.run_command(command_of(stage, state != "new")) != 0:
            raise SystemExit(f"{stage.name} has not finished")
        print(stage.name, "done", flush=True)
    return dict(json.loads((Path(made.stages[-1].dir) / "leaderboard.json").read_text(encoding="utf-8")))


def sentences(folder: Path, out: Path) -> str:
    """Write each sentence of a set of pairs once, as rows of text; return their folder."""
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        rows = [json.loads(text) for text in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        texts = dict.fromkeys(row[key] for row in rows for key in ("sentence1", "sentence2"))
        (out / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(out)


def questions(folder: Path, out: Path) -> tuple[str, str]:
    """Write the descriptions of a set as rows of text, and a question about each with its span; return both folders."""
    for split in ("train", "valid", "test"):
        texts, asked = [], []
        for index, text in enumerate((folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()):
            row = json.loads(text)
            context = row["completion"]
            texts.append({"text": context})
            slots = dict(part.split(" : ", 1) for part in row["prompt"].split(" | "))
            told = [slot for slot in QUESTIONS if slot in slots and context.count(slots[slot]) == 1]
            if told:
                slot = told[index % len(told)]
                answer = {"text": [slots[slot]], "answer_start": [context.index(slots[slot])]}
                asked.append({"context": context, "question": QUESTIONS[slot], "answers": answer})
        for name, rows in (("texts", texts), ("questions", asked)):
            (out / name).mkdir(parents=True, exist_ok=True)
            (out / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(out / "texts"), str(out / "questions")


def interval(found: tuple[float, float | None] | None) -> str:
    """A difference with its interval."""
    if found is None:
        return "-"
    mean, half = found
    return f"{mean:+.3f}" if half is None else f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def table(board: Mapping[str, Any], metric: str, control: str) -> list[str]:
    """Rows of Markdown: each objective against fresh weights of its shape, and against its control.

    Args:
        board: what a leaderboard step left.
        metric: the heading of the score.
        control: part of the label of a control.
    """
    scores: dict[str, dict[int, float]] = {}
    for run in board["runs"]:
        scores.setdefault(run["method"], {})[run["seed"]] = run["score"]
    lines = [
        f"| pretext | {metric} | against fresh, 95 % interval | control | pretext minus control, 95 % interval | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in board["rows"]:
        name, mean, spread = row["method"], row["mean"], row["spread"].get("score")
        if control in name:
            continue
        start, _, rest = name.partition(" (")
        options = [part for part in rest.removesuffix(")").split(", ") if part]
        other = next((n for n in scores if control in n and n != name and _same(n, start, options)), None)
        half = None if "difference/high" not in mean else mean["difference/high"] - mean["difference"]
        apart = interval((mean["difference"], half)) if "difference" in mean else ""
        kept = f"{sum(scores[other].values()) / len(scores[other]):.3f}" if other else ""
        against = interval(paired_interval(scores[name], scores[other])) if other else ""
        shown = f"{mean['score']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
        lines.append(f"| {name} | {shown} | {apart} | {kept} | {against} | {len(row['seeds'])} |")
    return lines


def _same(label: str, start: str, options: Sequence[str]) -> bool:
    """Whether a control is that of a row: the same objective below, with the same options."""
    name, _, rest = label.partition(" (")
    return name == start and all(option in rest for option in options)


def main(words: list[str] | None = None) -> None:
    """Measure both sets and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "pretext_leaderboard")
    parser.add_argument("--sets", nargs="+", default=list(METRICS), choices=METRICS)
    parser.add_argument("--out", type=Path, default=RESULTS / "pretext_leaderboard.md")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    texts, pairs = sentences(given.data / "pairs_stsb", given.runs / "sentences"), given.data / "pairs_stsb"
    described, asked = questions(given.data / "e2e_nlg", given.runs / "e2e")

    def paths(pretext: object, task: object) -> list[str]:
        return [f"stages.pretext.data.path={pretext}", *(f"stages.{stage}.data.path={task}" for stage in ("task", "fresh"))]

    sets = {
        "e2e_nlg": [*tokenizer_words(described, 1000), *SHAPE, *E2E, *paths(described, asked)],
        "pairs_stsb": [*tokenizer_words(texts, 1500), *SHAPE, *STSB, *paths(texts, pairs)],
    }
    lines = ["Objectives of pretraining on real sets: `recipe=pretraining_leaderboard` over three seeds of the task.", ""]
    for name in given.sets:
        board = finished(RECIPE, [*sets[name], f"run.dir={given.runs / name}"])
        lines += [f"## {name}", "", *table(board, METRICS[name], "start.data.control"), ""]
    given.out.write_text("\n".join([*lines, machine_line(), line(stamp("pretext_leaderboard"))]), encoding="utf-8")


if __name__ == "__main__":
    main()
