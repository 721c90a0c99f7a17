"""What pretraining with pictures is worth on drawings of real emoji: captions, answers to questions, and retrieval.

    python -m tests.benchmarks.picture_chains [--data FOLDER] [--runs FOLDER]

Rows are those of `image_emoji` with thumbnails of 8 x 8 pixels: `a drawing of animals`, the kind an emoji is of (six kinds),
since names are hardly shared between the splits. `recipe=mmlm_caption` and `recipe=mmlm_vqa` learn hidden words next to all 214
pictures, then to write the text, or to answer `What kind of thing is drawn?`, from 64 of them; next to them are fresh weights,
and the same on pictures of other rows (`data.control={image: rows}`). `recipe=clip` looks for the text `animals: lion` of each
of the held-out pictures among all of these, again next to pictures of other rows; a text drawn by chance is among k of n with
k / n. The steps were not tuned. Finished runs in the folder of runs are read, not trained again. Results go to
tests/benchmarks/results/picture_chains.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llmrecipe.evaluation.paired_differences import paired_interval
from llmrecipe.recipe.compose import compose
from llmrecipe.training.train import train
from tests.benchmarks.pretext_leaderboard import finished, interval, table, tokenizer_words
from tests.benchmarks.stamp import RESULTS, line, machine_line, stamp

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
RECALLS = (1, 5, 10)
CONTROL = "start.data.control"
PATCH = "processor.config={size: {height: 8, width: 8}}"
QUIET = "{at_start: false, load_best: false, bootstrap: 0}"
CHAIN = [
    PATCH, "+model.config.initializer_range=0.1", "+model.config.dropout=0.2", "+stages.pretext.objective.patch=8",
    "+stages.pretext.objective.unit=word", "stages.board.plot=false",
    "stages.pretext.epochs=15", "+stages.pretext.eval={at_start: false, bootstrap: 0, every: 7}",
    *(f"+stages.{stage}.eval={QUIET}" for stage in ("pretrained", "fresh")),
    *(f"+stages.{stage}.{word}" for stage in ("pretrained", "fresh") for word in ("objective.patch=8", "data.limit=64")),
]  # fmt: skip
TASKS = {
    "mmlm_caption": ("loss in nats a token", ["steps=40", "+stages.pretext.objective.target_words=any"]),
    "mmlm_vqa": ("accuracy", ["steps=60", "+stages.pretext.objective.prob=1.0"]),
}
"""Recipe -> what its table shows, and its further words."""
CLIP = [
    PATCH, "objective.patch=8", "+model.config.dropout=0.2", "epochs=40", "eval.at_start=false", "eval.load_best=false",
    "eval.bootstrap=0", "log.live=off", "save.end=false",
]  # fmt: skip


def rows_of(folder: Path, out: Path, named: bool) -> str:
    """Write the rows with the kind of each emoji as text, attribute and answer, or with kind and name; return their folder."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / "images", out / "images", dirs_exist_ok=True)
    for split in ("train", "valid", "test"):
        rows = []
        for text in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            kind = row["label"].split()[0].lower()
            asked = {"question": "What kind of thing is drawn?", "answer": kind, "attributes": [kind]}
            said = {"text": f"a drawing of {kind}", **asked}
            if named:
                said = {"text": f"{kind}: {row['text'].removeprefix('a drawing of ')}"}
            rows.append(json.dumps({"image": row["image"], **said}) + "\n")
        (out / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return str(out)


def found_by(path: str, tokenizer: Sequence[str], run: Path, seed: int, control: bool) -> dict[str, float]:
    """Share of the held-out pictures whose text is among the k nearest, after one run."""
    if not (run / "final").is_dir():
        rows = ["data.control={image: rows}"] if control else []
        train(compose("clip", [f"data.path={path}", *tokenizer, *CLIP, *rows, f"seed={seed}", f"run.dir={run}"]))
    return dict(json.loads((run / "final" / "metrics.json").read_text(encoding="utf-8")))


def recall_table(own: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]], count: int) -> list[str]:
    """Rows of Markdown: recall over the seeds, that of chance, and the difference from the control, seed by seed."""
    lines = [
        f"| among {count} texts | recall | by chance | control | minus control, 95 % interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for k in RECALLS:
        first, second = ([found[f"test/recall@{k}"] for found in runs] for runs in (own, other))
        apart = interval(paired_interval(dict(enumerate(first)), dict(enumerate(second))))
        mean, spread = statistics.mean(first), statistics.stdev(first)
        lines.append(f"| first {k} | {mean:.3f} ± {spread:.3f} | {k / count:.3f} | {statistics.mean(second):.3f} | {apart} |")
    return lines


def main(words: list[str] | None = None) -> None:
    """Measure the two chains and the retrieval, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "picture_chains")
    parser.add_argument("--out", type=Path, default=RESULTS / "picture_chains.md")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    emoji = given.data / "image_emoji"
    kinds, names = (rows_of(emoji, given.runs / name, name == "names") for name in ("kinds", "names"))
    tokenizer = tokenizer_words(kinds, 84, "wordpiece", "mmlm")
    lines = ["Pretraining with pictures on `image_emoji`, over three seeds of the task.", ""]
    for recipe, (score, more) in TASKS.items():
        paths = [f"+stages.{stage}.data.path={kinds}" for stage in ("pretext", "pretrained", "fresh")]
        board = finished(recipe, [*tokenizer, *CHAIN, *more, *paths, f"run.dir={given.runs / recipe}"])
        lines += [f"## {recipe}", "", *table(board, score, CONTROL), ""]
    tokenizer = tokenizer_words(names, 400, "bpe", "clip")
    own, other = (
        [found_by(names, tokenizer, given.runs / f"clip-{word}-{seed}", seed, word == "shuffled") for seed in SEEDS]
        for word in ("own", "shuffled")
    )
    count = len((emoji / "test.jsonl").read_text(encoding="utf-8").splitlines())
    lines += ["## clip", "", *recall_table(own, other, count), ""]
    given.out.write_text("\n".join([*lines, machine_line(), line(stamp("picture_chains"))]), encoding="utf-8")


if __name__ == "__main__":
    main()
