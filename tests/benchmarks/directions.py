"""Which of two methods is better, as the papers report it: asked of a pretrained encoder on real data.

    python -m tests.benchmarks.directions --model FOLDER --data FOLDER          every claim, in order
    python -m tests.benchmarks.directions ... --claims child_tuning dora        some of them
    python -m tests.benchmarks.directions ... --until 23:30                     start nothing after that time of the day
    python -m tests.benchmarks.directions ... --steps 2 --seeds 1 --results T   is every arm legal?

`--model` is a BERT-like folder (the results stand for MiniLM, 6 layers, 22.7 million parameters), `--data` holds a folder for
each data set named in `claims.py`, with train.jsonl, valid.jsonl and test.jsonl. Every run is `llmrecipe train` in a process of
its own under `--runs`; what is finished there is reused, and arms that claims share run once. Nothing is chosen on held-out
rows: a run ends at its last step, so valid and test are one set of about 500 rows to measure on.

An arm's score for a seed is a metric of its run (or the spread of a loss over several runs). A comparison is paired: mean over
seeds and data sets of (better - worse), its standard error s / sqrt(n), and the verdict of `verdict`.
Results go to tests/benchmarks/results/directions.md and .json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.claims import ACCURACY, ARMS, CLAIMS, LOSS, SMALLER, SPREAD, Arm, Claim
from tests.benchmarks.stamp import line, stamp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
COMMON = (
    "objective=classification", "data.max_length=64", "data.truncation=keep_start", "batch.size=16",
    "schedule.warmup=0.1", "eval.at_start=false",
)  # fmt: skip

Key = tuple[str, int]
"""(data set, seed): what two arms are paired by."""


def verdict(difference: float, error: float | None, margin: float = 0.0) -> str:
    """confirmed: difference + margin > 2 standard errors; not reproduced: < -2 of them; undecided: between, or one pair."""
    if error is None:
        return "undecided"
    if difference + margin > 2 * error:
        return "confirmed"
    return "not reproduced" if difference + margin < -2 * error else "undecided"


def paired(better: Mapping[Key, float], worse: Mapping[Key, float], metric: str) -> tuple[float, float | None, int]:
    """(mean difference in favour of `better`, its standard error, pairs); no error for a single pair."""
    sign = -1 if metric in SMALLER else 1
    found = [sign * (better[key] - worse[key]) for key in better if key in worse]
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return statistics.fmean(found), error, len(found)


def score(runs: Sequence[Mapping[str, float]], metric: str) -> float:
    """An arm's number for one seed: the mean over its runs, or the spread of their losses."""
    if metric == SPREAD:
        losses = [run[LOSS] for run in runs]
        return statistics.stdev(losses) / statistics.fmean(losses)
    return statistics.fmean(run[metric] for run in runs)


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """Where runs are kept, and how many more may start."""

    model: str
    data: Path
    runs: Path
    more: Callable[[], bool]
    words: tuple[str, ...] = ()

    def rows(self, name: str) -> Path:
        """A data set whose valid and test rows are one test file."""
        source, folder = self.data / name, self.runs / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        for target, parts in (("train.jsonl", ("train",)), ("test.jsonl", ("valid", "test"))):
            (folder / target).write_bytes(b"".join((source / f"{part}.jsonl").read_bytes() for part in parts))
        return folder

    def run(self, name: str, words: Sequence[str], data: str, seed: int) -> dict[str, float] | None:
        """Metrics of one run, trained where it is not there yet; None where nothing more may start."""
        given = [word.replace("{seed}", str(seed)) for word in (*COMMON, *words, *self.words)]
        key = hashlib.sha256(json.dumps([*given, self.model, str(self.data / data)]).encode()).hexdigest()[:8]
        folder = self.runs / f"{data}-{re.sub('[^A-Za-z0-9]+', '_', name)}-{seed}-{key}"
        if not _done(folder):
            if not self.more():
                return None
            shutil.rmtree(folder, ignore_errors=True)
            where = [f"model.path={self.model}", f"data.path={self.rows(data)}", f"seed={seed}", f"run.dir={folder}"]
            began = time.perf_counter()
            command = [sys.executable, "-m", "llmrecipe", "train", *given, *where]
            with open(f"{folder}.log", "a", encoding="utf-8") as log:
                code = subprocess.call(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)
            if code:
                raise SystemExit(f"{folder} ended with {code}; its last words are in {folder}.log")
            print(f"{time.strftime('%H:%M:%S')} {folder.name} {time.perf_counter() - began:.0f} s", flush=True)
        metrics = json.loads((folder / "final" / "metrics.json").read_text(encoding="utf-8"))
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return {m: metrics[m] for m in (ACCURACY, LOSS)} | {"trained": report["trained"]["parameters"]}

    def seed(self, name: str, arm: Arm, claim: Claim, key: Key) -> list[dict[str, float]] | None:
        """Every run of an arm for one seed; None unless all are there."""
        made = []
        for number, more in enumerate(arm.each):
            label = f"{name}-{number}" if more else name
            run = self.run(label, [*arm.words.split(), *more.split(), *claim.words.split()], *key)
            if run is None:
                return None
            made.append(run)
        return made


def _done(folder: Path) -> bool:
    status = folder / "status.json"
    return status.is_file() and json.loads(status.read_text(encoding="utf-8"))["status"] == "done"


Runs = dict[str, dict[Key, list[dict[str, float]]]]
"""Arm -> pair key -> its runs."""


def ask(study: Study, arms: Mapping[str, Arm], claim: Claim, seeds: int | None = None) -> Runs:
    """The runs of a claim, seed by seed, so that what is there when time is up can be paired."""
    found: Runs = {name: {} for name in claim.arms()}
    for seed in range(min(claim.seeds, seeds or claim.seeds)):
        for data in claim.data:
            for name in found:
                runs = study.seed(name, arms[name], claim, (data, seed))
                if runs is not None:
                    found[name][data, seed] = runs
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def judged(claim: Claim, runs: Runs) -> list[dict[str, Any]]:
    """One mapping a comparison that has pairs: difference, error, pairs, verdict."""
    found = []
    for c in claim.comparisons:
        sides = [{key: score(made, c.metric) for key, made in runs[name].items()} for name in (c.better, c.worse)]
        if not sides[0].keys() & sides[1].keys():
            continue
        difference, error, pairs = paired(*sides, c.metric)
        facts = {"better": c.better, "worse": c.worse, "metric": c.metric, "margin": c.margin, "difference": difference}
        found.append({**facts, "error": error, "pairs": pairs, "verdict": verdict(difference, error, c.margin)})
    return found


def markdown(model: str, arms: Mapping[str, Arm], claims: Mapping[str, Claim], runs: Mapping[str, Runs]) -> str:
    """The page: verdicts of all claims, then the arms of each."""
    lines = [
        "# Directions the papers report", "",
        "Written by `tests/benchmarks/directions.py` from `claims.py`, which says how rates were chosen. A difference is",
        "positive where it speaks for the claim; losses and spreads count the other way round. Confirmed: difference +",
        "margin > 2 s.e.; not reproduced: < -2 s.e.; else undecided. Equal arms pass one of these bounds in one case of three",
        "with two pairs, of five with three, of nine with five. The s.e. is over seeds and data sets, on one set of",
        "held-out rows.", "",
        f"Model: {model}. Every run: `{' '.join(COMMON)}`.", "",
        "| claim | better | worse | metric | difference ± s.e. | margin | pairs | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    missing = []
    for name, claim in claims.items():
        rows = judged(claim, runs.get(name, {arm: {} for arm in claim.arms()}))
        for r in rows:
            error = "?" if r["error"] is None else _number(r["error"])
            lines.append(
                f"| {name} | {r['better']} | {r['worse']} | {r['metric']} | {_number(r['difference'], '+')} ± {error} "
                f"| {_number(r['margin']) if r['margin'] else ''} | {r['pairs']} | {r['verdict']} |"
            )
        asked = {(r["better"], r["worse"], r["metric"]) for r in rows}
        left = [f"{c.better} / {c.worse}" for c in claim.comparisons if (c.better, c.worse, c.metric) not in asked]
        missing += [f"{name} ({', '.join(dict.fromkeys(left))})"] if left else []
    lines += ["", "Not run: " + ("; ".join(missing) or "nothing") + "."]
    for name, claim in claims.items():
        if any(runs.get(name, {}).values()):
            lines += _section(name, claim, arms, runs[name])
    return "\n".join(lines) + "\n"


def _section(name: str, claim: Claim, arms: Mapping[str, Arm], runs: Runs) -> list[str]:
    spread = any(c.metric == SPREAD for c in claim.comparisons)
    lines = ["", f"## {name}", "", f"{claim.text} (arXiv {claim.paper}). {', '.join(claim.data)}; `{claim.words}`.", ""]
    lines += [f"| arm | words | accuracy % | loss |{' spread of loss |' if spread else ''} trained | pairs |"]
    lines += ["| --- " * (7 if spread else 6) + "|"]
    for arm, made in runs.items():
        if made:
            cells = [_mean([score(r, m) for r in made.values()], f) for m, f in ((ACCURACY, 100), (LOSS, 1))]
            cells += [_mean([score(r, SPREAD) for r in made.values()], 1)] if spread else []
            each = "".join(f" [{' / '.join(arms[arm].each)}]" if arms[arm].each != ("",) else "")
            words = f"{arms[arm].words}{each}".replace("|", "\\|")
            trained = ", ".join(f"{n:,}" for n in sorted({int(r[0]["trained"]) for r in made.values()}))
            lines += [f"| {arm} | `{words}` | {' | '.join(cells)} | {trained} | {len(made)} |"]
    return lines


def _mean(values: Sequence[float], factor: float) -> str:
    """mean ± standard deviation."""
    text = _number(factor * statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ± {_number(factor * statistics.stdev(values))}"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 1 else f"{value:{sign}.2f}"


def write(folder: Path, model: str, arms: Mapping[str, Arm], claims: Mapping[str, Claim], runs: Mapping[str, Runs]) -> None:
    """directions.md and directions.json."""
    folder.mkdir(parents=True, exist_ok=True)
    made = stamp("directions")
    page = f"{markdown(model, arms, claims, runs)}\n{line(made)}"
    (folder / "directions.md").write_text(page, encoding="utf-8")
    facts = {
        name: {
            "text": claims[name].text,
            "paper": claims[name].paper,
            "comparisons": judged(claims[name], made),
            "runs": [{"arm": a, "data": d, "seed": s, "runs": r} for a, keys in made.items() for (d, s), r in keys.items()],
        }
        for name, made in runs.items()
    }
    report = {"harness": made, "model": model, "claims": facts}
    (folder / "directions.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Ask the claims and write what came out."""
    parser = argparse.ArgumentParser(description="which of two methods is better, on a pretrained encoder")
    parser.add_argument("--model", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each data set")
    parser.add_argument("--runs", type=Path, default=Path("runs/directions"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--claims", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--seeds", type=int, help="at most so many for each claim")
    parser.add_argument("--steps", type=int, help="steps of every run, for a look whether it starts")
    parser.add_argument("--until", help="HH:MM after which no run starts")
    options = parser.parse_args()
    end = _end(options.until) if options.until else math.inf
    steps = () if options.steps is None else (f"steps={options.steps}",)
    study = Study(
        str(options.model.resolve()), options.data.resolve(), options.runs.resolve(), lambda: time.time() < end, steps
    )
    asked: dict[str, Runs] = {}
    for name in options.claims:
        asked[name] = ask(study, ARMS, CLAIMS[name], options.seeds)
        write(options.results, options.model.name, ARMS, CLAIMS, asked)


def _end(clock: str) -> float:
    """The next time that a clock shows HH:MM."""
    now = time.localtime()
    hours, minutes = map(int, clock.split(":"))
    wait = ((hours - now.tm_hour) * 60 + minutes - now.tm_min) % (24 * 60)
    return time.time() + 60 * wait - now.tm_sec


if __name__ == "__main__":
    main()
