"""Pretraining here, in a plain Transformers Trainer and in a loop written by hand, in turn, each run in a process of its own.

    python tests/benchmarks/pretraining.py                          3 rounds of each shape, then two sizes of corpus
    python tests/benchmarks/pretraining.py --shapes tiny --rounds 1 --steps 6

All sides get the same folder with a Llama's random weights, the same documents laid end to end and cut into the same rows of
one length in the same order, AdamW at a constant rate without decay, gradients clipped at 1, float32 and one thread. This
program makes its rows itself (`recipe=clm data.blocks=true data.packing=off`) and writes its event of every step; the peers
slice the same tokens out of a memory-mapped file of 16-bit integers:

    trainer      transformers.Trainer with the model's own loss, nothing set that costs time
    loop         as nanoGPT trains: forward, cross-entropy over all logits, backward, clip, fused AdamW, and nothing else

Sides alternate in a round, and the side that begins moves on with each round. `rate` is tokens per CPU-second of the process
between the end of step 1 and the end of the last step, so that start-up is left out and waiting for a shared processor is too.
Ratios are medians over rounds of this program's rate by the peer's in the same round: above 1 this program is faster.

The second table trains here for the same steps out of a corpus and out of one sixteen times as large, both in a table of tokens
made by a run before: CPU-seconds a step, what reading rows takes, and peak memory. Results go to tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from harness import (  # noqa: E402
    LEARNING_RATE,
    RESULTS,
    SEED,
    build_models,
    machine,
    product_order,
    read_events,
    watch,
)
from stamp import line, stamp  # noqa: E402
from workload import SHAPES, SPECIAL, Words, write_rows  # noqa: E402

ROWS, LENGTH = 8, 128
STEPS = 16
DOCUMENTS, LARGER = 423, 16
WORDS_EACH = 250
"""423 documents of 251 tokens are 836 whole rows."""
SIDES = ("product", "trainer", "loop")
EOS = SPECIAL.index("</s>")


@dataclass(frozen=True)
class Measurement:
    """One process, seen from outside."""

    side: str
    rate: float
    step_ms: float
    peak_mb: float
    losses: list[float]


def documents(count: int) -> list[dict[str, str]]:
    """Rows of one text each, about as long as a page."""
    draw = Words(SEED)
    return [{"text": draw.text(draw.topic(), WORDS_EACH)} for _ in range(count)]


def write_strip(path: Path, rows: list[dict[str, str]]) -> int:
    """Write the tokens of documents, each with its end token, as 16-bit integers; returns how many rows they make."""
    strip = [t for row in rows for t in (*(int(word[1:]) for word in row["text"].split()), EOS)]
    np.array(strip, dtype=np.uint16).tofile(path)
    count, rest = divmod(len(strip) - 1, LENGTH - 1)
    assert not rest, "the peers stack rows of one length"
    return count


def product_command(model: Path, data: Path, out: Path, steps: int) -> tuple[list[str], Path]:
    """The command line of this program, and its event file."""
    run = out / "run"
    words = [
        "recipe=clm", f"model.path={model}", f"data.path={data}", f"run.dir={run}", f"data.max_length={LENGTH}",
        "data.blocks=true", "data.packing=off", "optim=adamw", f"optim.lr={LEARNING_RATE}", "optim.weight_decay=0.0",
        "schedule=constant", "schedule.warmup=0",
        f"batch.size={ROWS}", f"steps={steps}", f"seed={SEED}", "runtime.threads=1", "eval.at_start=false",
        "save.end=false", "model.dtype=float32",
    ]  # fmt: skip
    start = "import sys; from llmrecipe.cli.app import main; sys.exit(main())"
    return [sys.executable, "-c", start, "train", *words], run / "events.jsonl"


def peer_command(side: str, model: Path, strip: Path, order: list[int], out: Path, steps: int) -> tuple[list[str], Path]:
    """The command that trains in a peer, and its event file."""
    events = out / "events.jsonl"
    spec = {
        "side": side, "model": str(model), "strip": str(strip), "order": order[: steps * ROWS], "out": str(out),
        "events": str(events), "rows": ROWS, "length": LENGTH, "lr": LEARNING_RATE, "seed": SEED, "eos": EOS,
    }  # fmt: skip
    (out / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return [sys.executable, str(HERE / "pretraining_peer.py"), str(out / "spec.json")], events


def measure(side: str, command: list[str], events: Path, out: Path, cache: Path) -> Measurement:
    """One run of one side."""
    marks, _, usage = watch(command, events, out / "log.txt", cache)
    seconds = (marks[-1][1] - marks[0][1]) / (len(marks) - 1)
    losses = [event["loss"] for event in read_events(events, "step")]
    return Measurement(side, ROWS * LENGTH / seconds, 1000 * seconds, usage.ru_maxrss / 1024, losses)


def compare(shape: str, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Alternate the sides on one shape and sum up."""
    rows = documents(DOCUMENTS)
    data, strip = write_rows(folder / "documents.jsonl", rows), folder / "documents.bin"
    order = product_order(write_strip(strip, rows))
    found: list[dict[str, Measurement]] = []
    for number in range(rounds):
        first = number % len(SIDES)
        seen: dict[str, Measurement] = {}
        for side in (*SIDES[first:], *SIDES[:first]):
            out = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=folder))
            own = side == "product"
            command, events = (
                product_command(folder / shape, data, out, steps)
                if own
                else peer_command(side, folder / shape, strip, order, out, steps)
            )
            seen[side] = measure(side, command, events, out, folder / "cache")
            print(
                f"  round {number + 1} {side:8s} {seen[side].rate:7.0f} tok/cpu-s  peak {seen[side].peak_mb:.0f} MB", flush=True
            )
        found.append(seen)
    ratios = {peer: [seen["product"].rate / seen[peer].rate for seen in found] for peer in SIDES[1:]}
    return {
        "shape": shape,
        "steps": steps,
        "sides": {s: {k: statistics.median(getattr(seen[s], k) for seen in found) for k in ("rate", "peak_mb")} for s in SIDES},
        "ratios": {p: {"median": statistics.median(r), "low": min(r), "high": max(r)} for p, r in ratios.items()},
        "last_loss": {s: found[0][s].losses[-1] for s in SIDES},
        "runs": [{side: asdict(one) for side, one in seen.items()} for seen in found],
    }


def corpora(folder: Path, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The same training out of a corpus and out of a larger one, in turn, from tables that exist."""
    sizes = {times: write_rows(folder / f"corpus-{times}.jsonl", documents(DOCUMENTS * times)) for times in (1, LARGER)}
    found: dict[int, list[Measurement]] = {times: [] for times in sizes}
    for number in range(rounds + 1):
        for times, data in sizes.items():
            out = Path(tempfile.mkdtemp(prefix=f"corpus-{times}-", dir=folder))
            one = measure("product", *product_command(folder / "tiny", data, out, steps), out, folder / "cache")
            if number:  # the first round makes the tables
                found[times].append(one)
    return [
        {
            "tokens": DOCUMENTS * times * (WORDS_EACH + 1),
            "step_ms": statistics.median(m.step_ms for m in runs),
            "low": min(m.step_ms for m in runs),
            "high": max(m.step_ms for m in runs),
            "peak_mb": statistics.median(m.peak_mb for m in runs),
        }
        for times, runs in found.items()
    ]


def text_of(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    about = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    lines = [
        f"{about}; one thread; the processor is shared, so times are those of the CPU, not of the wall.",
        "",
        f"Rows of {LENGTH} tokens, {ROWS} a step, float32, AdamW; each side in turn, {report['rounds']} rounds.",
        "",
        "| shape | steps | tok/CPU-s here | Trainer | **ratio** (low-high) | loop | **ratio** (low-high) | peak MB here "
        "| Trainer | loop | last loss here | Trainer | loop |",
        "|" + "---|" * 13,
    ]
    for one in report["results"]:
        side, ratio, loss = one["sides"], one["ratios"], one["last_loss"]
        cells = [one["shape"], str(one["steps"]), f"{side['product']['rate']:.0f}"]
        for peer in SIDES[1:]:
            low, high = ratio[peer]["low"], ratio[peer]["high"]
            cells += [f"{side[peer]['rate']:.0f}", f"**{ratio[peer]['median']:.2f}x** ({low:.2f}-{high:.2f})"]
        cells += [f"{side[s]['peak_mb']:.0f}" for s in SIDES] + [f"{loss[s]:.4f}" for s in SIDES]
        lines.append("| " + " | ".join(cells) + " |")
    if report["corpora"]:
        lines += ["", "| corpus, tokens | CPU ms a step (low-high) | peak MB |", "|---|---|---|"]
        for one in report["corpora"]:
            lines.append(
                f"| {one['tokens']:,} | {one['step_ms']:.1f} ({one['low']:.1f}-{one['high']:.1f}) | {one['peak_mb']:.0f} |"
            )
    return "\n".join([*lines, "", line(report["harness"])])


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "10m"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--no-corpora", action="store_true", help="leave the sizes of corpora out")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llmrecipe-pretraining-"))
    build_models(folder, sorted({*options.shapes, "tiny"}))
    report = {
        "harness": stamp("pretraining"),
        "machine": machine(),
        "rounds": options.rounds,
        "results": [compare(shape, folder, options.rounds, options.steps) for shape in options.shapes],
        "corpora": [] if options.no_corpora else corpora(folder, options.rounds, 4 * options.steps),
    }
    print(text_of(report))
    if not options.dry:
        (RESULTS / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "pretraining.md").write_text(text_of(report), encoding="utf-8")


if __name__ == "__main__":
    main()
