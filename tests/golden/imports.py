"""Which packages a command imports: what is imported by accident costs every start."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train"
COMMANDS: dict[str, list[str]] = {
    "help": ["--help"],
    "list": ["list"],
    "show": ["show", "lora"],
    "show a section": ["show", "data"],
    "explain": ["explain", "recipe=dpo_lora"],
    "schema": ["schema"],
    "train help": ["train", "--help"],
    TRAIN: ["train", "recipe=sft_lora", "steps=1", "eval.batches=1", "data.cache=false", "log.live=off"],
}
"""Name -> words of the command line. `TRAIN` is looked at when its first step is made."""
LOOK = """
import json, sys
from llmrecipe.cli import app

words = json.loads(sys.argv[1])
first = []


def packages():
    names = {name.partition(".")[0] for name in sys.modules}
    return sorted(n for n in names - set(sys.stdlib_module_names) if not n.startswith("_"))


if "recipe=sft_lora" in words:
    from llmrecipe.training.run import Run

    report = Run.report_step
    Run.report_step = lambda run, *rest: (report(run, *rest), first.append(packages()))
code = app.run_command(words)
assert code == 0, code
print(json.dumps(first[0] if first else packages()), file=sys.stderr)
"""


def imported(name: str) -> list[str]:
    """Run a command in a process of its own; returns the top-level packages it imported, without Python's own.

    Raises:
        RuntimeError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [*COMMANDS[name], *([f"run.dir={folder}/run"] if name == TRAIN else [])]
        look = [sys.executable, "-c", LOOK, json.dumps(words)]
        done = subprocess.run(look, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stderr.splitlines()[-1])
