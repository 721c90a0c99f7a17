"""The same training here and in TRL + PEFT, in turn, each run in a process of its own.

    python tests/benchmarks/harness.py                          every case at 10m, 3 rounds
    python tests/benchmarks/harness.py --shapes 10m 60m --rounds 5
    python tests/benchmarks/harness.py --cases sft_lora --against best_float32 --steps 8

A case is a recipe (`sft_lora`, `dpo_lora`, `grpo`) on a model shape against one setting of the peer:

    defaults        TRL with nothing set that it sets by itself (bfloat16 autocast); this program as well (float32)
    defaults_bfloat16   the same TRL; this program in the precision that TRL chose, with bfloat16 weights
    defaults_recompute  the same on both sides, with activations recomputed here too, as TRL does by default
    best_float32    TRL with packing (SFT) or precomputed reference (DPO), nothing recomputed; both sides in float32. For GRPO
                    nothing else is set: a static cache is as fast on a CPU, Transformers' continuous batching a third as fast,
                    and all 32 answers at once are slower than 8, its default
    best_bfloat16   the same with bfloat16 weights and autocast; this program with bfloat16 weights

Both sides get the same model folder, the same rows in the same order, the same LoRA, learning rate, batch and one thread.
Rounds alternate (peer, product, peer, ...). What is measured, for each process, from outside:

    rate         tokens per CPU-second between the end of step 1 and the end of the last step (CPU time of the process read
                 from the kernel when a step's line appears in its event file); tokens are the rows' own, padding excluded and
                 a prompt counted with each of its answers, so the ratio is one of CPU time for the same rows.
                 Where answers are sampled they are each side's own, of no more than a stated length that a random model
                 seldom falls short of, and the tokens are those of the answers.
                 Where TRL precomputes reference scores both sides make two passes over the rows, and this is the second:
                 every reference score is known
    scored       the same over the first pass, with what scoring the reference costs: inside the steps here, before them in
                 TRL; equal to `rate` where there is one pass
    peak         peak resident memory of the process, as the kernel reports it at exit
    first_step   wall time from process start to the end of step 1; `first_step_cpu` is the CPU time in it
    whole        tokens per CPU-second of the whole process: imports, data, reference pass and saving included

Answers are two fifths of a row, or with `--workload long_answers` two thirds. GRPO samples 8 answers to each prompt at
temperature 1 on both sides, with one Python function as the reward, and TRL's defaults of what decides the loss: no reference
(`--beta` adds one on both sides), the mean over all tokens, one update for each batch. Its mean reward is shown for the loss.

The reported ratio is the median over rounds of the ratios of neighbours. Results go to tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE))

from cases import AGAINST, ANSWERS, BATCH, LEARNING_RATE, SEED, STEPS, Case, peer_command, product_command  # noqa: E402
from stamp import line, machine, machine_line, stamp  # noqa: E402
from workload import ANSWER_SHARE, ROWS, SHAPES, tokens_of, write_rows  # noqa: E402

__all__ = ["LEARNING_RATE", "RESULTS", "SEED", "Case", "build_models", "machine", "product_order", "read_events", "watch"]
PACKAGES = ("torch", "transformers", "trl", "peft")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Measurement:
    """One process, seen from outside."""

    side: str
    rate: float
    scored: float
    whole: float
    peak_mb: float
    first_step: float
    first_step_cpu: float
    wall: float
    losses: list[float] = field(default_factory=list)
    """Of each step; the mean reward where answers are sampled."""
    tokens: int = 0
    """Of one pass."""


def cpu_seconds(pid: int) -> float:
    """User and system time of a live process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def read_events(path: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind written so far; a half-written last line waits for its end."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def watch(command: list[str], events: Path, log: Path, cache: Path) -> tuple[list[tuple[float, float]], float, Any]:
    """Run a command to its end: (wall, CPU) seconds at the end of each step, of the whole, and the kernel's account of it."""
    marks: list[tuple[float, float]] = []
    size, began = -1, time.perf_counter()
    # A cache of its own, or reference scores of an earlier run would be found.
    environment = {**os.environ, **ENVIRONMENT, "LLMRECIPE_CACHE": str(cache)}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            now = events.stat().st_size if events.exists() else -1
            if now != size:
                size = now
                mark = (time.perf_counter() - began, cpu_seconds(process.pid))
                marks += [mark] * (len(read_events(events, "step")) - len(marks))
            time.sleep(0.004)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(marks) < 2:
        raise SystemExit(f"failed ({process.returncode}):\n{' '.join(command)}\n{log.read_text()[-3000:]}")
    return marks, time.perf_counter() - began, usage


def measure(side: str, case: Case, command: list[str], events: Path, tokens: int, out: Path) -> Measurement:
    """One run of one side; `tokens` are those of one pass over the rows."""
    marks, wall, usage = watch(command, events, out / "log.txt", out / "cache")
    steps = read_events(events, "step")
    own = len(steps) // case.passes
    if case.samples:
        counts = [step["response/length"] for step in steps]
        tokens, share = round(sum(counts) * ANSWERS * BATCH[case.task]), 1 - counts[0] / sum(counts)
    else:
        # `tokens` counts from the start, by each side in its own way; the share of the steps after the first is needed.
        share = 1 - steps[0]["tokens"] / steps[own - 1]["tokens"]
    before = sum(event["cpu"] for event in read_events(events, "reference"))
    scored = tokens * share / (marks[own - 1][1] - marks[0][1] + before * share)
    known = scored if case.passes == 1 else tokens / (marks[-1][1] - marks[own - 1][1])
    return Measurement(
        side=side,
        rate=known,
        scored=scored,
        whole=tokens * case.passes / (usage.ru_utime + usage.ru_stime),
        peak_mb=usage.ru_maxrss / 1024,
        first_step=marks[0][0],
        first_step_cpu=marks[0][1],
        wall=wall,
        losses=[s[case.shown] for s in steps],
        tokens=tokens,
    )


def build_models(folder: Path, shapes: list[str]) -> None:
    """Write the model folders, in a process of its own, so that this one never holds torch (see `product_order`)."""
    for shape in shapes:
        code = (
            f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path; import workload; "
            f"workload.build_model(Path({str(folder / shape)!r}), workload.SHAPES[{shape!r}])"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **ENVIRONMENT})


def rows_for(case: Case, folder: Path) -> tuple[Path, Path, int]:
    """(rows for the product, the same rows in the order it takes them for the peer, their tokens)."""
    import numpy as np

    rows = ROWS[case.task](case.steps * BATCH[case.task], SEED, ANSWER_SHARE[case.workload])
    order = product_order(len(rows))
    ours = write_rows(folder / f"{case.task}-{case.workload}-{case.steps}.jsonl", rows)
    peers = write_rows(folder / f"{case.task}-{case.workload}-{case.steps}-ordered.jsonl", [rows[i] for i in np.asarray(order)])
    return ours, peers, sum(map(tokens_of, rows))


def product_order(count: int) -> Any:
    """The order in which the product visits so many rows in its first epoch, asked in a process of its own.

    The harness itself stays small: a child's peak memory as the kernel reports it includes its parent's at the fork.
    """
    code = (
        "import json, sys; from llmrecipe.data import order; "
        "rows = type('Rows', (list,), {'weights': None}); "
        f"print(json.dumps([int(i) for i in order(rows([0] * {count}), {SEED}, 0)]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    return json.loads(answer.stdout.splitlines()[-1])


def run_case(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    """Alternate the two sides and sum up."""
    model = folder / case.shape
    ours, peers, tokens = rows_for(case, folder)
    pairs = []
    for number in range(rounds):
        pair = {}
        for side, command_of, data in (("peer", peer_command, peers), ("product", product_command, ours)):
            out = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=folder))
            command, events = command_of(case, model, data, out)
            pair[side] = measure(side, case, command, events, tokens, out)
            seen = pair[side]
            print(
                f"  round {number + 1} {side:8s} {seen.rate:7.0f} tok/cpu-s ({seen.scored:.0f} scored)  "
                f"peak {seen.peak_mb:6.0f} MB  "
                f"first step {seen.first_step:5.1f} s (cpu {seen.first_step_cpu:.1f})  whole {seen.whole:6.0f}",
                flush=True,
            )
        pairs.append(pair)
    return {
        "case": asdict(case),
        "tokens": tokens,
        **summary(pairs),
        "runs": [{k: asdict(m) for k, m in p.items()} for p in pairs],
    }


def summary(pairs: list[dict[str, Measurement]]) -> dict[str, Any]:
    """Medians of each side, and medians over rounds of the ratios (above 1: this program is the better one)."""
    better_high, better_low = ("rate", "scored", "whole"), ("peak_mb", "first_step", "first_step_cpu")
    ratios: dict[str, Any] = {}
    for name in (*better_high, *better_low):
        each = [getattr(p["product"], name) / getattr(p["peer"], name) for p in pairs]
        ratios[name] = {"median": statistics.median(each), "low": min(each), "high": max(each)}
    sides = {
        side: {name: statistics.median(getattr(p[side], name) for p in pairs) for name in (*better_high, *better_low)}
        for side in ("peer", "product")
    }
    losses = {side: statistics.fmean(pairs[0][side].losses) for side in ("peer", "product")}
    return {"ratios": ratios, "sides": sides, "mean_loss": losses}


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, one line a case."""
    lines = [
        "| case | shape | TRL setting | tok/CPU-s here | TRL | **ratio** (low-high) | with reference scoring "
        "| peak MB here | TRL | ratio "
        "| first step s here | TRL | ratio | in CPU s here | TRL | ratio "
        "| whole run ratio | mean loss (GRPO: reward) here | TRL |",
        "|" + "---|" * 19,
    ]
    for result in results:
        case, ours, peer, ratio = result["case"], result["sides"]["product"], result["sides"]["peer"], result["ratios"]
        cells = [
            Case(**case).name,
            case["shape"],
            case["against"],
            f"{ours['rate']:.0f}",
            f"{peer['rate']:.0f}",
            f"**{ratio['rate']['median']:.2f}x** ({ratio['rate']['low']:.2f}-{ratio['rate']['high']:.2f})",
            f"{ratio['scored']['median']:.2f}x" if case["recipe"].startswith("dpo") else "",
            f"{ours['peak_mb']:.0f}",
            f"{peer['peak_mb']:.0f}",
            f"{ratio['peak_mb']['median']:.2f}x",
            f"{ours['first_step']:.1f}",
            f"{peer['first_step']:.1f}",
            f"{ratio['first_step']['median']:.2f}x",
            f"{ours['first_step_cpu']:.1f}",
            f"{peer['first_step_cpu']:.1f}",
            f"{ratio['first_step_cpu']['median']:.2f}x",
            f"{ratio['whole']['median']:.2f}x",
            f"{result['mean_loss']['product']:.4f}",
            f"{result['mean_loss']['peer']:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, run the cases, write the results."""
    parser = argparse.ArgumentParser(description="tokens per CPU-second, memory and start here and in TRL + PEFT")
    parser.add_argument("--cases", nargs="+", default=["sft_lora", "dpo_lora", "grpo"])
    parser.add_argument("--workload", choices=list(ANSWER_SHARE), default="chat", help="how long answers are")
    parser.add_argument("--beta", type=float, help="weight of the divergence from the reference (default: TRL's)")
    parser.add_argument("--shapes", nargs="+", default=["10m"], choices=list(SHAPES))
    parser.add_argument("--against", nargs="+", default=list(AGAINST), choices=AGAINST)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: by shape)")
    parser.add_argument("--folder", type=Path, help="where models, rows and runs go (default: a temporary folder)")
    parser.add_argument("--name", default="latest", help="stem of the result files")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="llmrecipe-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    build_models(folder, options.shapes)
    results = []
    for shape in options.shapes:
        for recipe in options.cases:
            for against in options.against:
                case = Case(recipe, shape, against, options.steps or STEPS[shape], options.workload, options.beta)
                print(f"{case.name} {shape} against {against}, {case.steps} steps", flush=True)
                results.append(run_case(case, folder, options.rounds))
                write(results, options.name)
    print(table(results))


def write(results: list[dict[str, Any]], name: str) -> None:
    """JSON with every run, and the table."""
    RESULTS.mkdir(exist_ok=True)
    report = {"harness": stamp("harness"), "machine": machine(PACKAGES), "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(
        f"{machine_line(report['machine'])}\n{table(results)}\n\n{line(report['harness'])}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
