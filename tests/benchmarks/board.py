"""Keep the leaderboard of a packaged recipe as a result file, with the verdicts on what papers claim of its rows.

    python -m tests.benchmarks.board hybrid_leaderboard FOLDER [--note TEXT]
    python -m tests.benchmarks.board hybrid_leaderboard FOLDER --name hybrid_minilm_trec --metric test/accuracy --title TEXT
    python -m tests.benchmarks.board survey_leaderboard FOLDER
    python -m tests.benchmarks.board pretraining_leaderboard FOLDER

FOLDER is the one that the stage of the board wrote: its table, plot and JSON go to tests/benchmarks/results under the name of
the recipe, or under `--name` where the recipe was run with another model or other rows. A claim compares two rows seed by seed:
the mean difference, its standard error over the seeds, and the verdict of `directions.verdict`, each row at its own best rate
of those that all rows were tried with. Claims about rows that were not run are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrecipe.core.console import number
from tests.benchmarks.directions import paired, verdict
from tests.benchmarks.stamp import RESULTS, line, machine_line, stamp


@dataclass(frozen=True)
class Order:
    """A claim: one row is better than another."""

    better: str
    worse: str
    paper: str


S4, REVERSED = "s4 (stack.s4.assign=s4)", "s4 (stack.s4.assign.G1"
UNIPELT, MAM, DESIGN, LLM_ADAPTERS = "arXiv 2110.07577", "arXiv 2110.04366", "arXiv 2301.01821", "arXiv 2304.01933"
CLAIMS = {
    "hybrid_leaderboard": [
        *(Order("unipelt", part, UNIPELT) for part in ("lora", "adapter", "prefix_tuning", "bitfit")),
        *(Order("mam", part, MAM) for part in ("lora", "parallel_adapter", "prefix_tuning", "adapter")),
        Order("parallel_adapter", "adapter", MAM),
        *(Order(S4, other, DESIGN) for other in (REVERSED, "lora", "adapter", "prefix_tuning", "bitfit")),
        *(Order("llm_adapters", other, LLM_ADAPTERS) for other in ("adapter", "parallel_adapter", "prefix_tuning")),
    ],
    "survey_leaderboard": [],
    "pretraining_leaderboard": [],
}
"""Recipe -> claims about its rows, each named by how its label begins."""


def scores(runs: Sequence[dict[str, Any]], label: str) -> dict[tuple[str, int], float]:
    """(row, seed) -> score of the one row whose label begins so."""
    names = {run["method"] for run in runs}
    found = label if label in names else next(name for name in names if name.startswith(label))
    return {("", run["seed"]): run["score"] for run in runs if run["method"] == found}


def verdicts(claims: Sequence[Order], runs: Sequence[dict[str, Any]], metric: str) -> str:
    """The claims as a table."""
    lines = ["| better | worse | paper | difference ± s.e. | seeds | verdict |", "| --- | --- | --- | --- | --- | --- |"]
    for claim in claims:
        difference, error, count = paired(scores(runs, claim.better), scores(runs, claim.worse), metric)
        difference = round(difference, 12)  # What rounding leaves of a difference of 0 is no number to show.
        shown = number(difference) if error is None else f"{number(difference)} ± {number(error)}"
        names = f"{claim.better.partition(' (')[0]} | {'s4 reversed' if claim.worse == REVERSED else claim.worse}"
        lines.append(f"| {names} | {claim.paper} | {shown} | {count} | {verdict(difference, error)} |")
    return "\n".join(lines)


def page(recipe: str, folder: Path, note: str, metric: str = "test/loss", title: str = "") -> str:
    """The result file of a board."""
    head = f"# `recipe={recipe}`{title and ': '}{title}"
    parts = [head, note, (folder / "leaderboard.md").read_text(encoding="utf-8").strip()]
    runs = json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))["runs"]
    names = {run["method"] for run in runs}
    claims = [c for c in CLAIMS[recipe] if all(any(n.startswith(row) for n in names) for row in (c.better, c.worse))]
    if claims:
        parts += [
            f"What papers say of these rows. A difference of {metric} is positive where it speaks for the claim. Confirmed:\n"
            "more than two standard errors above 0; not reproduced: more than two below; else undecided. The standard error\n"
            "is over seeds, on one set of test rows.",
            verdicts(claims, runs, metric),
        ]
    return "\n\n".join(filter(None, parts)) + "\n\n" + machine_line() + "\n" + line(stamp("board"))


def main() -> None:
    """Write the result files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", choices=sorted(CLAIMS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--note", default="", help="a paragraph about the run: budget, what ran beside it")
    parser.add_argument("--name", help="of the result files, where they are not the recipe's own")
    parser.add_argument("--metric", default="test/loss", help="what the board was scored by")
    parser.add_argument("--title", default="", help="model and rows, where they are not the recipe's own")
    options = parser.parse_args()
    out = RESULTS / (options.name or options.recipe)
    text = page(options.recipe, options.folder, options.note, options.metric, options.title)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    out.with_suffix(".png").write_bytes((options.folder / "leaderboard.png").read_bytes())
    board = json.loads((options.folder / "leaderboard.json").read_text(encoding="utf-8"))
    text = json.dumps({"harness": stamp("board"), **board}, indent=1)
    out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
