"""How long the command line takes: `--help`, `list`, and the time to the first training step next to TRL's.

    python tests/benchmarks/startup.py [--rounds 5] [--no-train]

Wall and CPU seconds of whole processes, medians, alternating. A Python that does nothing is measured too, as the floor.
Results go to tests/benchmarks/results/startup.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from stamp import line, stamp

VERBS = {
    "python alone": None,
    "llmrecipe --help": ["--help"],
    "llmrecipe list": ["list"],
    "llmrecipe show lora": ["show", "lora"],
}
TARGETS = {"llmrecipe --help": 0.4, "llmrecipe list": 1.0}


def once(arguments: list[str] | None) -> tuple[float, float]:
    """(wall, CPU) seconds of one process."""
    code = "" if arguments is None else "import sys; from llmrecipe.cli.app import main; sys.exit(main())"
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *(arguments or [])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **harness.ENVIRONMENT},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def verbs(rounds: int) -> list[str]:
    """Table lines for the verbs that need no torch."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in VERBS}
    for arguments in VERBS.values():
        once(arguments)  # fills the file cache and writes byte code
    for _ in range(rounds):
        for name, arguments in VERBS.items():
            seen[name].append(once(arguments))
    lines = ["| command | wall s | CPU s | target s |", "|---|---|---|---|"]
    for name, times in seen.items():
        wall, cpu = (statistics.median(t[i] for t in times) for i in (0, 1))
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {TARGETS.get(name, '')} |")
    return lines


def first_step(rounds: int) -> list[str]:
    """Table lines for the time to the first step, 10m shape, default settings."""
    folder = Path(tempfile.mkdtemp(prefix="llmrecipe-startup-"))
    harness.build_models(folder, ["10m"])
    lines = ["", "| time to first step | here s | TRL s | ratio | here CPU s | TRL CPU s |", "|---|---|---|---|---|---|"]
    for recipe in ("sft_lora", "dpo_lora"):
        result = harness.run_case(harness.Case(recipe, "10m", "defaults", 2), folder, rounds)
        ours, peer = result["sides"]["product"], result["sides"]["peer"]
        ratio = result["ratios"]["first_step"]["median"]
        lines.append(
            f"| {recipe} | {ours['first_step']:.1f} | {peer['first_step']:.1f} | {ratio:.2f}x "
            f"| {ours['first_step_cpu']:.1f} | {peer['first_step_cpu']:.1f} |"
        )
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="start-up times of the command line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-train", action="store_true", help="only the verbs that train nothing")
    options = parser.parse_args()
    lines = verbs(options.rounds)
    if not options.no_train:
        lines += first_step(min(options.rounds, 3))
    text = "\n".join(lines)
    harness.RESULTS.mkdir(exist_ok=True)
    (harness.RESULTS / "startup.md").write_text(f"{text}\n\n{line(stamp('startup'))}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
