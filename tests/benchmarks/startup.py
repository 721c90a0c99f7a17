"""How long the command line takes: verbs without torch, the first step, what is imported, `check`, and 100,000 new rows.

    python tests/benchmarks/startup.py [--rounds 5] [--only verbs first_step ...] [--peer]

CPU seconds of whole processes, as the kernel accounts for them, each beside what it is compared with in the same round;
medians over rounds, and the least and greatest. One thread; byte code is written before the first round, as by an installer.

    verbs        verbs that load no model; a Python that does nothing is the floor
    first_step   `train recipe=sft_lora` up to the end of its first step, and a script that imports torch, the classes of
                 Transformers and AdamW and loads the same model and tokenizer
    imports      the modules of this package that are loaded when the first step is made, in a process that has all others
    check        `check recipe=sft_lora`, and a script that imports torch and the model's class
    cold         the same training on 100,000 rows that no cache knows, up to the first step, on two cores; and what the
                 tokenizers library takes for the same texts, one encoding each
    peer         (with --peer) the time to the first step of TRL, 10m shape, and on the 100,000 rows, tiny model

Results go to tests/benchmarks/results/startup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
from stamp import line, machine_line, stamp

ROWS, CORES = 100_000, 2
PROGRAM = "import sys; from llmrecipe.cli.app import main; sys.exit(main())"
TINY = harness.ROOT / "llmrecipe" / "assets" / "tiny"
TRAIN = ["train", "recipe=sft_lora"]
MISTAKE = "llmrecipe check, a key is misspelt"
VERBS = {
    "python alone": ["-c", ""],
    "llmrecipe --help": ["-c", PROGRAM, "--help"],
    "llmrecipe list": ["-c", PROGRAM, "list"],
    "llmrecipe show lora": ["-c", PROGRAM, "show", "lora"],
    MISTAKE: ["-c", PROGRAM, "check", "recipe=sft_lora", "optim.lrr=1"],
}
TARGETS = {"llmrecipe --help": 0.4, "llmrecipe list": 1.0, MISTAKE: 3.0}
CLASSES = "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM; torch.optim.AdamW"
LOADED = f"{CLASSES}; AutoModelForCausalLM.from_pretrained({str(TINY)!r}); AutoTokenizer.from_pretrained({str(TINY)!r})"
LOADED_MODULES = """
import json, os, sys
from llmrecipe.cli import app
from llmrecipe.training.run import Run

report = Run.report_step
def reported(run, *rest):
    report(run, *rest)
    print(json.dumps([n for n in sys.modules if n != "__main__"]), file=sys.stderr, flush=True)
    os._exit(0)
Run.report_step = reported
app.run_command(sys.argv[1:])
"""
OWN_MODULES = """
import gc, importlib, json, sys, time

gc.disable()  # as the program does while it imports
names = json.load(open(sys.argv[1]))
own = [n for n in names if n.partition(".")[0] == "llmrecipe"]
for name in names:
    if name not in own:
        try:
            importlib.import_module(name)
        except ImportError:  # a module that another one makes
            pass
began = time.process_time()
for name in own:
    importlib.import_module(name)
print(time.process_time() - began, len(own))
"""
ENCODED = """
import json, sys, time
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = [json.loads(text) for text in open(sys.argv[2])]
texts = [tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in rows[:10_000]]
began = time.process_time()
for start in range(0, len(texts), 1024):
    tokenizer._tokenizer.encode_batch(texts[start : start + 1024], add_special_tokens=False)
print((time.process_time() - began) * len(rows) / len(texts))
"""
Times = tuple[float, float]
"""Wall and CPU seconds."""


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a measured process; byte code is written."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **harness.ENVIRONMENT, **more}


def once(words: Sequence[str], code: int = 0) -> Times:
    """Run Python with these words to its end, which is to have this exit status."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise SystemExit(f"{words} ended with {process.returncode}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a live process so far, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / harness.TICKS


def until_first_step(words: Sequence[str], place: Path) -> Times:
    """Train in a new folder with a cache of its own until the first step is reported, then end the process.

    What the run prints is in `place/log.txt`.
    """
    shutil.rmtree(place, ignore_errors=True)
    return until_reported(["-c", PROGRAM, *words, f"run.dir={place / 'run'}"], place, place / "run" / "events.jsonl")


def until_reported(words: Sequence[str], place: Path, events: Path) -> Times:
    """Run Python with these words until a step is among the events, then end the process."""
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *words]
    began = time.perf_counter()
    with (place / "log.txt").open("w", encoding="utf-8") as log:
        cache = environment(LLMRECIPE_CACHE=str(place / "cache"))
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=cache)
        try:
            while not harness.read_events(events, "step"):
                if process.poll() is not None:
                    raise SystemExit(f"failed ({process.returncode}):\n{(place / 'log.txt').read_text()[-3000:]}")
                time.sleep(0.005)
            return time.perf_counter() - began, cpu_seconds(process.pid)
        finally:
            process.kill()
            process.wait()


def alternating(sides: dict[str, Callable[[], Times]], rounds: int) -> dict[str, list[Times]]:
    """Measure each side in turn, once without counting it: that fills the file cache and writes byte code."""
    for measure in sides.values():
        measure()
    seen: dict[str, list[Times]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            seen[name].append(measure())
            wall, cpu = seen[name][-1]
            print(f"  round {number + 1} {name}: {cpu:.2f} CPU s, {wall:.1f} s", flush=True)
    return seen


def spread(values: Sequence[float]) -> str:
    """Write a median with its range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def rows_of(seen: dict[str, list[Times]], targets: dict[str, object] | None = None) -> list[str]:
    """Write one line a side, and the paired difference of two sides."""
    lines = [
        f"| {name} | {spread([wall for wall, _ in times])} | {spread([cpu for _, cpu in times])} "
        f"| {(targets or {}).get(name, '')} |"
        for name, times in seen.items()
    ]
    if len(seen) == 2:
        first, second = seen.values()
        apart = [a[1] - b[1] for a, b in zip(first, second, strict=True)]
        lines.append(f"| difference | | **{spread(apart)}** | {(targets or {}).get('difference', '')} |")
    return lines


def verbs(rounds: int, folder: Path) -> list[str]:
    """Measure the verbs that need no torch."""
    sides: dict[str, Callable[[], Times]] = {name: partial(once, words, 2 * (name == MISTAKE)) for name, words in VERBS.items()}
    return rows_of(alternating(sides, rounds), {**TARGETS})


def first_step(rounds: int, folder: Path) -> list[str]:
    """Measure the first step beside a script that imports and loads what it needs."""
    seen = alternating(
        {
            "`train recipe=sft_lora`, first step": lambda: until_first_step(TRAIN, folder / "first"),
            "script: imports, model and tokenizer loaded": lambda: once(["-c", LOADED]),
        },
        rounds,
    )
    return rows_of(seen, {"difference": 1.0})


def imports(rounds: int, folder: Path) -> list[str]:
    """Measure the import of this package's modules."""
    found = subprocess.run(
        [sys.executable, "-c", LOADED_MODULES, *TRAIN, f"run.dir={folder / 'modules'}"],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    names = folder / "modules.json"
    names.write_text(found.stderr.splitlines()[-1], encoding="utf-8")
    times, count = [], 0
    for number in range(-1, rounds):
        own = [sys.executable, "-c", OWN_MODULES, str(names)]
        done = subprocess.run(own, capture_output=True, text=True, check=True, env=environment())
        seconds, modules = done.stdout.split()
        count = int(modules)
        times += [float(seconds)] if number >= 0 else []
    print(f"  {count} modules: {spread(times)} CPU s", flush=True)
    return [f"| own modules at the first step ({count}), all others imported | | {spread(times)} | 0.3 |"]


def check(rounds: int, folder: Path) -> list[str]:
    """Measure `check` beside the import of the model's class, without which no model is built."""
    name = "`check recipe=sft_lora`"
    seen = alternating(
        {
            name: lambda: once(["-c", PROGRAM, "check", "recipe=sft_lora"]),
            "script: imports of torch and the model's class": lambda: once(["-c", CLASSES]),
        },
        rounds,
    )
    return rows_of(seen, {name: 3.0})


def new_rows(folder: Path) -> Path:
    """Write the rows of `cold` to a file."""
    data = folder / "rows.jsonl"
    source = harness.ROOT / "llmrecipe" / "assets" / "data" / "sft" / "train.jsonl"
    rows = [json.loads(text) for text in source.read_text(encoding="utf-8").splitlines()]
    with data.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            row = rows[number % len(rows)]
            turn = {"role": "user", "content": f"{row['prompt'][0]['content']} ({number})"}
            file.write(json.dumps({"prompt": [turn], "completion": row["completion"]}) + "\n")
    return data


def cold(rounds: int, folder: Path) -> list[str]:
    """Measure the first step on rows that have to be read, checked and tokenized."""
    data = new_rows(folder)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:CORES])
    try:
        times = [until_first_step([*TRAIN, f"data.path={data}"], folder / "cold") for _ in range(rounds)]
        encoding = [sys.executable, "-c", ENCODED, str(TINY), str(data)]
        library = [
            float(subprocess.run(encoding, capture_output=True, text=True, check=True, env=environment()).stdout)
            for _ in range(rounds)
        ]
    finally:
        os.sched_setaffinity(0, allowed)
    shown = (folder / "cold" / "log.txt").read_text(encoding="utf-8").count("tokenising ")
    name = f"{ROWS:,} new rows, first step, {min(CORES, len(allowed))} cores; progress shown {shown} times"
    lines = rows_of({name: times}, {name: "5 wall"})
    print("\n".join(lines), flush=True)
    return [*lines, f"| tokenizers library alone, the same texts once | | {spread(library)} | |"]


def peer(rounds: int) -> list[str]:
    """Measure the time to the first step here and in TRL, 10m shape, default settings."""
    folder = Path(tempfile.mkdtemp(prefix="llmrecipe-startup-"))
    harness.build_models(folder, ["10m"])
    lines = ["", "| time to first step | here s | TRL s | ratio | here CPU s | TRL CPU s |", "|---|---|---|---|---|---|"]
    for recipe in ("sft_lora", "dpo_lora"):
        result = harness.run_case(harness.Case(recipe, "10m", "defaults", 2), folder, rounds)
        ours, other = result["sides"]["product"], result["sides"]["peer"]
        ratio = result["ratios"]["first_step"]["median"]
        lines.append(
            f"| {recipe} | {ours['first_step']:.1f} | {other['first_step']:.1f} | {ratio:.2f}x "
            f"| {ours['first_step_cpu']:.1f} | {other['first_step_cpu']:.1f} |"
        )
    return [*lines, cold_peer(rounds, folder)]


def cold_peer(rounds: int, folder: Path) -> str:
    """Measure the first step on the rows of `cold`, here and in TRL in turn; both may use the cores there are."""
    data, place = new_rows(folder), folder / "peer"

    def other() -> Times:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        spec = {
            "task": "sft", "data": str(data), "out": str(place), "model": str(TINY), "events": str(place / "events.jsonl"),
            "r": 8, "alpha": 16, "passes": 1, "batch": 16, "lr": 1e-4, "seed": 0, "beta": None, "setting": "defaults",
        }  # fmt: skip
        (place / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        return until_reported([str(harness.HERE / "peer.py"), str(place / "spec.json")], place, place / "events.jsonl")

    sides = {"here": lambda: until_first_step([*TRAIN, f"data.path={data}"], folder / "cold"), "TRL": other}
    seen = alternating(sides, rounds)
    ours, theirs = ([statistics.median(column) for column in zip(*times, strict=True)] for times in seen.values())
    return (
        f"| sft_lora, tiny model, {ROWS:,} new rows | {ours[0]:.1f} | {theirs[0]:.1f} | {theirs[0] / ours[0]:.2f}x "
        f"| {ours[1]:.1f} | {theirs[1]:.1f} |"
    )


def loads(before: float) -> str:
    """Say how busy the machine was: CPU seconds grow with what others take of its caches, wall seconds with their turns."""
    return f"load average {before:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end"


PARTS: dict[str, Callable[[int, Path], list[str]]] = {
    "verbs": verbs, "first_step": first_step, "imports": imports, "check": check, "cold": cold,
}  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="start-up times of the command line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="measure these parts and write no result file")
    parser.add_argument("--peer", action="store_true", help="also the first step of TRL")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llmrecipe-startup-"))
    lines = ["| process | wall s | CPU s | target s |", "|---|---|---|---|"]
    before = os.getloadavg()[0]
    try:
        for name in options.only or PARTS:
            print(name, flush=True)
            lines += PARTS[name](min(options.rounds, 3) if name == "cold" else options.rounds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.peer:
        lines += peer(min(options.rounds, 3))
    text = "\n".join(lines)
    print(text)
    if not options.only:
        said = f"Medians of {options.rounds} rounds (least-greatest); {loads(before)}."
        report = f"{machine_line()}\n{said}\n\n{text}\n\n{line(stamp('startup'))}"
        (harness.RESULTS / "startup.md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
