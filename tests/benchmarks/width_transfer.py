"""The best learning rate at several widths, with muP and without: does the one found at the narrowest hold for the others?

    python -m tests.benchmarks.width_transfer [--widths 32 128 256] [--seeds 2] [--steps 100]

Every run is `recipe=clm model=native`, a decoder with Llama's parts (2 blocks, 4 heads, feed-forward twice the width), from
fresh weights over the embedded stories: 8 rows of 64 tokens a step, AdamW without decay, cosine schedule with a tenth of
warm-up. With muP `model.config.mup_base_width` is the narrowest width, at which both are the same. Rates are powers of two, and
a rate is scored by the loss on the validation rows after the last step, the mean over seeds. `moved` is how many powers of two
a width's best rate is away from that of the narrowest, `lost` what its loss is above its own best at the rate that was best for
the narrowest. Source: Tensor Programs V (arXiv 2203.03466), figure 1. Results go to tests/benchmarks/results/width_transfer.*
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from llmrecipe.recipe.compose import compose
from llmrecipe.training.train import train
from tests.benchmarks.stamp import RESULTS, line, stamp

POWERS = range(-10, -3)
WORDS = [
    "model=native", "model.config.num_hidden_layers=2", "model.config.num_key_value_heads=4",
    "model.config.initializer_range=0.1", "data.blocks=true", "data.packing=off", "data.max_length=64", "batch.size=8",
    "optim.weight_decay=0.0", "eval.at_start=false", "eval.test=false", "eval.batches=8", "eval.load_best=false",
    "save.end=false", "log.live=off", "runtime.threads=1",
]  # fmt: skip


def loss_of(folder: Path, width: int, base: int | None, power: int, seed: int, steps: int) -> float:
    """Loss on the validation rows after the last step of one run; infinite where it diverged."""
    scaled = [] if base is None else [f"model.config.mup_base_width={base}"]
    words = [f"model.config.hidden_size={width}", f"model.config.intermediate_size={2 * width}", f"optim.lr={2.0**power}"]
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    train(compose("clm", [*WORDS, *words, *scaled, f"steps={steps}", f"seed={seed}", f"run.dir={run}"]))
    events = [json.loads(text) for text in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = float([e for e in events if e["event"] == "evaluation"][-1]["eval/loss"])
    return loss if math.isfinite(loss) else math.inf


def summary(losses: dict[int, dict[int, float]]) -> list[dict[str, Any]]:
    """For each width its best power of two, how far that moved, and what the rate of the narrowest costs it."""
    narrowest = min(losses, key=int)
    first = min(losses[narrowest], key=losses[narrowest].__getitem__)
    rows = []
    for width, seen in losses.items():
        best = min(seen, key=seen.__getitem__)
        rows.append({"width": width, "best": best, "loss": seen[best], "moved": best - first, "lost": seen[first] - seen[best]})
    return rows


def text_of(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"Loss on validation rows after {report['steps']} steps, mean of {report['seeds']} seeds; rates are powers of two.",
        "",
        "| | width | " + " | ".join(f"2^{power}" for power in POWERS) + " | best | moved | lost at the narrowest's best |",
        "|" + "---|" * (len(POWERS) + 5),
    ]
    for name, losses in report["losses"].items():
        for row in report["summary"][name]:
            seen = losses[str(row["width"])]
            cells = [f"**{seen[str(p)]:.3f}**" if p == row["best"] else f"{seen[str(p)]:.3f}" for p in POWERS]
            tail = [f"2^{row['best']}", str(row["moved"]), f"{row['lost']:.3f}"]
            lines.append("| " + " | ".join([name, str(row["width"]), *cells, *tail]) + " |")
    return "\n".join([*lines, "", line(report["harness"])])


def main() -> None:
    """Train, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    base = min(options.widths)
    found: dict[str, dict[int, dict[int, float]]] = {"standard": {}, "muP": {}}
    with tempfile.TemporaryDirectory(prefix="llmrecipe-width-") as folder:
        for width in sorted(options.widths):
            for name, own in (("standard", None), ("muP", base)):
                # At the base both are one and the same.
                if width == base and name == "muP":
                    found[name][width] = found["standard"][width]
                    continue
                found[name][width] = {
                    power: statistics.mean(
                        loss_of(Path(folder), width, own, power, seed, options.steps) for seed in range(options.seeds)
                    )
                    for power in POWERS
                }
                print(name, width, {p: round(v, 3) for p, v in found[name][width].items()}, flush=True)
    report: dict[str, Any] = {
        "harness": stamp("width_transfer"),
        "steps": options.steps,
        "seeds": options.seeds,
        "losses": {n: {str(w): {str(p): v for p, v in seen.items()} for w, seen in of.items()} for n, of in found.items()},
        "summary": {name: summary(of) for name, of in found.items()},
    }
    print(text_of(report))
    if not options.dry:
        (RESULTS / "width_transfer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "width_transfer.md").write_text(text_of(report), encoding="utf-8")


if __name__ == "__main__":
    main()
