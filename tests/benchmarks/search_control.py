"""Does a search find more than chance at equal cost? AutoPEFT's and NOAH's on real data, each against its control.

    python -m tests.benchmarks.search_control --model FOLDER --data FOLDER

`--model` is a small causal model (the result stands for TinyStories' Llama of 260 thousand parameters, 5 layers), `--data` a
folder of labelled rows with train.jsonl, valid.jsonl and test.jsonl. Every search is one or two commands of `llmrecipe` under
`--runs`, in one thread, with its trainings in its own process, since starting one takes longer than it does; what is finished
there is reused. All trainings have one rate, which did best of 3e-2, 1e-2 and 3e-3 for one point of AutoPEFT's space on TREC.

autopeft   `llmrecipe search recipe=autopeft` with the sampler of `--sampler` and with `random`, as many trials each. A search
           is worth the volume under its front: accuracy on the validation rows against numbers left, from accuracy 0 and the
           most numbers of any trial, as a share of the whole. The random start, which both have, is trained once.
noah       A supernet, `step supernet_search` on it, and its own control: as many sub-networks by chance scored, and as many
           trained. A search is worth the mean accuracy of those it trained from the start.

Results go to tests/benchmarks/results/search_control.md and .json; the verdict is that of `directions.verdict` over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrecipe.pipelines.search.costs import hypervolume
from tests.benchmarks.directions import ACCURACY, paired, verdict
from tests.benchmarks.stamp import RESULTS, line, machine, machine_line, stamp

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 5
SIZES = "[1, 2, 3, 4, 5, 6, 10]"
"""Exponents that differ at width 64."""
STEPS, SUPERNET_STEPS = 120, 200
TASK = [
    "data.max_length=16", "data.truncation=keep_start", "optim.lr=3e-3", "batch.size=16", "epochs=null", "eval.at_start=false",
    "eval.bootstrap=0", "runtime.threads=1", "log.live=off",
]  # fmt: skip
AUTOPEFT = [
    *(f"search.space.stack.autopeft.{part}={SIZES}" for part in ("adapter", "parallel_adapter", "prefix_tuning")),
    *(f"search.space.stack.autopeft.layers.{i}=[true, false]" for i in range(LAYERS)),
    "search.start=[]", "stack.autopeft.hidden=64", f"steps={STEPS}",
]  # fmt: skip
SUPERNET = ["stack=[noah]", "stack.noah.lora=[1, 4, 8]", "stack.noah.adapter=[1, 4, 8]", "stack.noah.prompt=[1, 4, 8]",
            f"steps={SUPERNET_STEPS}"]  # fmt: skip
STEP = ["limit=6000", "population=10", "parents=4", "mutation=4", "crossover=4", "generations=3", "val_batches=8", "retrain=2"]


def inside(words: list[str]) -> int:
    """Run one command of the product, and what it starts in this process too; return the exit code."""
    from llmrecipe.cli import app
    from llmrecipe.pipelines import run_stages
    from llmrecipe.pipelines.subprocesses import command_of

    def execute(child: Any, planned: Any, continued: bool, enough: Any = None) -> int:
        return app.run_command(command_of(planned, continued))

    run_stages.execute = execute
    return app.run_command(words)


def run(words: Sequence[str], log: Path) -> None:
    """One command of the product; its lines go to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    start = [
        sys.executable,
        "-c",
        "import sys; from tests.benchmarks import search_control as s; sys.exit(s.inside(sys.argv[1:]))",
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.call([*start, *words], stdout=file, stderr=file, env=environment, cwd=ROOT)
    if code:
        raise SystemExit(f"{' '.join(words[:2])} ended with {code}; its last words are in {log}")


def autopeft(about: argparse.Namespace, sampler: str, seed: int) -> list[dict[str, Any]]:
    """The completed trials of one search."""
    folder, chance = about.runs / f"autopeft-{sampler}-{seed}", about.runs / f"autopeft-random-{seed}"
    for known in chance.glob("[0-9]*-*") if folder != chance else ():
        if not (folder / known.name).exists():
            shutil.copytree(known, folder / known.name)
    given = [f"search.sampler={sampler}", f"search.trials={about.trials}", f"search.seed={seed}", f"seed={seed}"]
    where = [f"model.path={about.model}", f"data.path={about.data}", f"run.dir={folder}"]
    run(["search", "recipe=autopeft", *where, *TASK, *AUTOPEFT, *given], about.runs / f"{folder.name}.log")
    trials = [json.loads(text) for text in (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    return [trial for trial in trials if trial["state"] == "done"]


def noah(about: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Mean accuracy and mean size of what was trained from the start, for evolution and for chance."""
    net, found = about.runs / f"noah-{seed}", about.runs / f"noah-search-{seed}"
    task = [f"model.path={about.model}", f"data.path={about.data}", *TASK]
    log = about.runs / f"noah-{seed}.log"
    if not (net / "final").is_dir():
        run(["train", "recipe=classify", f"seed={seed}", f"run.dir={net}", *task, *SUPERNET], log)
    if not (found / "table.md").is_file():
        words = json.dumps([*task, f"steps={STEPS}"])
        step = [f"model='{net}'", "recipe=classify", f"words={words}", f"seed={seed}", f"run.dir={found}", *STEP]
        run(["step", "supernet_search", *step, "log.live=off"], log)
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", (found / "table.md").read_text(), re.MULTILINE)
    return {
        origin: {
            "accuracy": statistics.fmean(float(score) for own, _, _, score in rows if own == origin),
            "parameters": statistics.fmean(float(count.replace(",", "")) for own, count, _, _ in rows if own == origin),
        }
        for origin in ("evolution", "random")
    }


def volumes(searches: dict[str, list[list[dict[str, Any]]]]) -> dict[str, list[float]]:
    """Sampler -> share of the volume of each seed."""
    most = max(t["costs"]["parameters"] for found in searches.values() for trials in found for t in trials)
    return {
        sampler: [
            hypervolume([(-statistics.fmean(t["values"]), t["costs"]["parameters"] / most) for t in trials], (0.0, 1.0))
            for trials in found
        ]
        for sampler, found in searches.items()
    }


def judged(better: Sequence[float], worse: Sequence[float]) -> str:
    """Mean difference with its standard error, and the verdict."""
    difference, error, _ = paired(
        {("", i): v for i, v in enumerate(better)}, {("", i): v for i, v in enumerate(worse)}, ACCURACY
    )
    said = {"confirmed": "more than chance", "not reproduced": "less than chance"}.get(verdict(difference, error), "undecided")
    return f"{difference:+.4f} (standard error {error or 0:.4f}): {said}"


def cells(values: Sequence[float]) -> str:
    """Values by seed, and their mean."""
    return " | ".join(f"{v:.4f}" for v in (*values, statistics.fmean(values)))


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    peft, net, sampler = report["autopeft"], report["noah"], report["sampler"]
    seeds = range(len(peft["volume"]["random"]))
    head = f"| {' | '.join(f'seed {i}' for i in seeds)} | mean |\n| --- | {'---: | ' * (len(seeds) + 1)}\n"
    lines = [
        "# Searches against chance at equal cost\n",
        f"Written by `python -m tests.benchmarks.search_control`: {report['about']}.\n",
        f"## AutoPEFT\n\n{report['trials']} trials a search, the first 8 random in both. Volume under the front of accuracy "
        "over numbers left, as a share.\n\n| volume " + head.rstrip("\n"),
    ]
    lines += [f"| {name} | {cells(peft['volume'][name])} |" for name in (sampler, "random")]
    lines += ["\n| best accuracy " + head.rstrip("\n")]
    lines += [f"| {name} | {cells(peft['best'][name])} |" for name in (sampler, "random")]
    lines += [
        f"\nVolume, {sampler} less random: {judged(peft['volume'][sampler], peft['volume']['random'])}. Best accuracy: "
        f"{judged(peft['best'][sampler], peft['best']['random'])}.\n",
        f"## NOAH\n\nAccuracy of the {report['retrain']} sub-networks that were trained from the start, mean; evolution and "
        "chance scored as many with the supernet's weights, none above the limit.\n\n| accuracy " + head.rstrip("\n"),
    ]
    lines += [f"| {name} | {cells([found[name]['accuracy'] for found in net])} |" for name in ("evolution", "random")]
    lines += ["\n| numbers left " + head.rstrip("\n")]
    for name in ("evolution", "random"):
        counts = [found[name]["parameters"] for found in net]
        lines.append(f"| {name} | {' | '.join(f'{n:,.0f}' for n in (*counts, statistics.fmean(counts)))} |")
    won = judged(*([found[name]["accuracy"] for found in net] for name in ("evolution", "random")))
    lines += [f"\nAccuracy, evolution less random: {won}.\n", machine_line(report["machine"]), line(report["harness"])]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/search_control"))
    parser.add_argument("--sampler", default="saas_map")
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    about = parser.parse_args()
    about.model, about.data, about.runs = (path.resolve() for path in (about.model, about.data, about.runs))
    searches: dict[str, list[list[dict[str, Any]]]] = {"random": [], about.sampler: []}
    nets = []
    for seed in range(about.seeds):
        nets.append(noah(about, seed))
        for sampler, found in searches.items():
            found.append(autopeft(about, sampler, seed))
            print(f"seed {seed}: {sampler}", flush=True)
    best = {n: [max(statistics.fmean(t["values"]) for t in trials) for trials in found] for n, found in searches.items()}
    task = f"{about.model.name} on {about.data.name}, {about.seeds} seeds"
    report = {
        "about": f"{task}, {STEPS} steps of 16 rows a training, one thread",
        "sampler": about.sampler, "trials": about.trials, "retrain": 2,
        "autopeft": {"volume": volumes(searches), "best": best}, "noah": nets,
        "machine": machine(["torch", "transformers", "optuna"]), "harness": stamp("search_control"),
    }  # fmt: skip
    about.results.mkdir(parents=True, exist_ok=True)
    (about.results / "search_control.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (about.results / "search_control.md").write_text(text(report), encoding="utf-8")


if __name__ == "__main__":
    main()
