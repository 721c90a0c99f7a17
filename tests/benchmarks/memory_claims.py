"""What papers report of SMT and QLoRA, asked of the embedded model on the built-in lists, at an equal number of steps.

    python -m tests.benchmarks.memory_claims [--seeds 3] [--claims smt qlora]

SMT: an equal budget of numbers in blocks of 16 x 16, for attention (queries, keys and values), for parts of it, and for the
feed-forward; the rate is that of the packaged recipe for all. QLoRA: one LoRA, rate and clipping over a base whose weights are
numbers of 16 bits, over the same in NF4 with double quantization and in FP4 with it, all computed in float32. The number is the
loss of the held-out lists, in nats a token, after the last step; nothing is chosen on them. Results go to
tests/benchmarks/results/memory_claims.md and .json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.claims import LOSS, Comparison
from tests.benchmarks.directions import paired, verdict
from tests.benchmarks.stamp import RESULTS, line, machine, machine_line, stamp
from tests.trainings import events, train_recipe

COMMON = ("steps=60", "epochs=null", "eval.at_start=false", "eval.load_best=false", "eval.bootstrap=0", "eval.samples=0")
LAST = ("save.end=false", "optim.clip=0.3")
BLOCKS = ("smt", "save.end=false", "stack.smt.budget=32768", "stack.smt.warmup_steps=10")
"""A budget that the smallest of the targets has room for: the values of four layers are 49,152 numbers."""


@dataclass(frozen=True)
class Claim:
    """What a paper reports, and how it is asked here."""

    text: str
    paper: str
    arms: dict[str, tuple[str, ...]]
    """Name -> recipe and words."""
    comparisons: tuple[Comparison, ...]


CLAIMS = {
    "smt": Claim(
        "blocks of attention are worth more than as many of the feed-forward, and those of the values most", "2405.15525",
        {
            "attention": (*BLOCKS, "stack.smt.target=attn.q|k|v"),
            "values": (*BLOCKS, "stack.smt.target=attn.v"),
            "queries and keys": (*BLOCKS, "stack.smt.target=attn.q|k"),
            "feed-forward": (*BLOCKS, "stack.smt.target=mlp.gate|up|down"),
        },
        (Comparison("attention", "feed-forward", LOSS), Comparison("values", "queries and keys", LOSS)),
    ),
    "qlora": Claim(
        "LoRA over NF4 with double quantization matches LoRA over 16 bits, over FP4 it is slightly worse", "2305.14314",
        {
            "NF4": ("qlora", *LAST, "optim=adamw", "stack.nf4.type=nf4"),
            "16 bits": ("sft_lora", *LAST),
            "FP4": ("qlora", *LAST, "optim=adamw", "stack.nf4.type=fp4"),
        },
        # Training gains about five nats; a hundredth of that is taken for the same.
        (Comparison("NF4", "16 bits", LOSS, margin=0.05), Comparison("NF4", "FP4", LOSS)),
    ),
}  # fmt: skip


def held_out(folder: Path, words: tuple[str, ...], seed: int) -> float:
    """Train an arm and return the loss of the held-out rows."""
    train_recipe(folder, words[0], *COMMON, *words[1:], f"seed={seed}")
    return float(next(e["eval/loss"] for e in reversed(events(folder, "evaluation")) if "eval/loss" in e))


def losses(folder: Path, claim: Claim, seeds: int, arms: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """Return arm -> its loss for each seed."""
    names = arms or tuple(claim.arms)
    return {n: [held_out(folder / n.replace(" ", "-") / str(s), claim.arms[n], s) for s in range(seeds)] for n in names}


def main() -> None:
    """Every arm with every seed, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--claims", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = given.results / "memory_claims.json"
    measured: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))["losses"] if place.is_file() else {}
    for name in given.claims:
        with tempfile.TemporaryDirectory() as folder:
            measured[name] = losses(Path(folder), CLAIMS[name], given.seeds)
        written(measured, given.results)


def written(measured: dict[str, dict[str, list[float]]], folder: Path) -> None:
    """Write what was measured as JSON and as tables."""
    facts = {"losses": measured, "machine": machine(), "harness": stamp("memory_claims")}
    (folder / "memory_claims.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    text = [
        "# What papers report of SMT and QLoRA, on the embedded model\n",
        "Written by `python -m tests.benchmarks.memory_claims`: nats a token on held-out lists after 60 steps, seed by seed,",
        "and by how much the better arm is better (± standard error over seeds); confirmed: with the margin above two standard",
        "errors, not reproduced: below minus two of them.\n",
    ]
    for name, found in measured.items():
        claim = CLAIMS[name]
        text += [f"## {name}: {claim.text} (arXiv {claim.paper})\n"]
        text += ["| arm | words | loss, seed by seed |", "| --- | --- | --- |"]
        for arm, values in found.items():
            words = " ".join(claim.arms[arm]).replace("|", "\\|")
            text.append(f"| {arm} | `{words}` | {', '.join(f'{loss:.4f}' for loss in values)} |")
        text += ["", "| better | worse | by | margin | verdict |", "| --- | --- | --- | --- | --- |"]
        for c in claim.comparisons:
            better, worse = ({("sft", seed): loss for seed, loss in enumerate(found[arm])} for arm in (c.better, c.worse))
            by, error, _ = paired(better, worse, c.metric)
            shown = f"{by:+.4f} ± {error or 0.0:.4f} | {c.margin or ''} | {verdict(by, error, c.margin)}"
            text.append(f"| {c.better} | {c.worse} | {shown} |")
        text.append("")
    text += [machine_line(), line(stamp("memory_claims"))]
    (folder / "memory_claims.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
