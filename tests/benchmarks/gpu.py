"""What a GPU makes of this program, beside Transformers + PEFT and TRL: one command for a machine that has one.

    python -m tests.benchmarks.gpu --minutes 60              everything, the most valuable cells first, as far as time goes
    python -m tests.benchmarks.gpu --minutes 5 --dry-run     every kind of cell at tiny sizes on a CPU
    python -m tests.benchmarks.gpu --minutes 20 --only llama-3.1-8b sft

Models have random weights of a stated shape and rows are words that are tokens, so nothing is downloaded. Each cell runs in a
process of its own, one that fails or runs out of time is recorded and the next one starts, and both result files are written
after every cell. Single kernels, graphs and what follows a failed capture are tested by pytest where there is a GPU:

    python -m pytest tests/models/test_packed_attention.py tests/engine/test_captured_step.py -k gpu

What is measured:

    equal      losses of a tiny model on the CPU and on the device, step by step, also by each route of packed attention and
               under 8-bit weights and optimizer states; of the device and itself where only deterministic kernels are
               allowed; answers of two ways of decoding
    speed      tokens a second (padding excluded, a prompt counted with each answer) over the steps after the first two; share
               of the device's peak by the convention of `gpu_flops`, for devices whose peak is known; most memory of
               tensors; seconds from the process's start to the end of step 1
    profile    which kernels take the time of one step

Rows are full (every one as long as the longest), long (eight times as long, one a step) or of real lengths (log-normal). For
sampled answers tokens are those of prompts and of answers at full length, and no share of the peak is given; where nothing but
answers is timed (generate), those of the answers as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import gpu_decoding  # noqa: E402
from tests.benchmarks.gpu_flops import utilisation  # noqa: E402
from tests.benchmarks.gpu_peer import ROUTE, missing  # noqa: E402
from tests.benchmarks.gpu_work import DETERMINISTIC, Cell, write_json  # noqa: E402
from tests.benchmarks.stamp import RESULTS, line, stamp  # noqa: E402

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "flash-attn", "llmrecipe")
FORMS = ("true", "selective", "offload")
"""Of gradient checkpointing."""
ROUTES = {"varlen": "bfloat16", "flash": "bfloat16", "flex": "float32"}
"""Route of packed attention -> the dtype that it is compared in."""
LOW = {"lora": "stack=[int8,lora]", "full": "optim=adamw_8bit"}
"""Method -> what it is compared with in 8 bits: weights, or states of the optimizer."""
COMPILED = "model.compile=blocks"
KERNELS = "model.kernels=liger"
LEAST = 20.0
"""Seconds that must be left for another cell to start."""
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def cells(dry: bool = False) -> list[Cell]:
    """Every cell, the most valuable first; a dry run has each kind of cell once."""
    big, middle, small = ("tiny", "tiny", "tiny-qwen3") if dry else ("llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b")
    equal = [("sft", "lora", "float32"), ("dpo", "lora", "float32"), ("sft", "lora", "bfloat16")]
    more = [("sft", "full", "float32"), ("sft", "qlora", "bfloat16")]
    found = [Cell("product", t, m, "tiny", "real", "equal", d) for t, m, d in equal]
    found += _sides("sft", "lora", big, "full")
    found += [Cell("product", "sft", "lora", big, "full", "profile")]
    found += _sides("sft", "lora", big, "real")
    found += _sides("dpo", "lora", big, "real")
    found += _sides("sft", "qlora", big, "full")
    found += _sides("grpo", "lora", middle, "prompts")
    found += gpu_decoding.cells(("tiny", "tiny-qwen3"), (middle, big))
    found += [Cell("product", "grpo", "lora", middle, "prompts", words=gpu_decoding.words(w)) for w in gpu_decoding.WAYS[1:]]
    found += _sides("sft", "full", middle, "full")
    found += [Cell("product", t, m, "tiny", "real", "equal", d) for t, m, d in more]
    found += [
        Cell("product", "sft", "lora", "tiny-wide", "real", "equal", dtype, f"{ROUTE}={route}")
        for route, dtype in ROUTES.items()
    ]
    found += [Cell("product", "sft", "qlora", "tiny-wide", "real", "equal")]
    found += [Cell("product", "sft", m, "tiny-wide", "real", "equal", words=words) for m, words in LOW.items()]
    found += [
        Cell("product", t, "lora", "tiny-wide", lengths, "equal", dtype, DETERMINISTIC)
        for t, lengths, dtype in (("sft", "real", "bfloat16"), ("dpo", "real", "float32"), ("grpo", "prompts", "float32"))
    ]
    found += [Cell("product", "dpo", "lora", big, "real", "profile"), Cell("trl", "sft", "lora", big, "full", "profile")]
    for task, method, shape, lengths in (
        ("sft", "lora", small, "full"), ("sft", "full", small, "real"), ("dpo", "full", small, "real"),
        ("dpo", "qlora", middle, "real"), ("grpo", "qlora", middle, "prompts"), ("grpo", "full", small, "prompts"),
        ("sft", "lora", middle, "full"), ("sft", "lora", middle, "real"), ("dpo", "lora", middle, "full"),
    ):  # fmt: skip
        found += _sides(task, method, shape, lengths)
    found += [Cell("product", "grpo", "lora", middle, "prompts", "profile")]
    found += [_form("tiny", "real", form, "equal", "float32") for form in FORMS]
    found += [_form(big, "full", form) for form in FORMS]
    found += [_form(big, "long", form) for form in ("true", "offload")]
    compiled = [("sft", "lora", "tiny"), ("dpo", "lora", "tiny"), ("sft", "full", "tiny")]
    found += [Cell("product", t, m, s, "real", "equal", "float32", COMPILED) for t, m, s in compiled]
    found += [
        Cell("product", "sft", "lora", shape, lengths, words=COMPILED)
        for shape in (big, middle)
        for lengths in ("full", "real")
    ]
    found += [Cell("product", "sft", "full", middle, "full", words=COMPILED)]
    found += [Cell("product", t, m, s, "real", "equal", "float32", KERNELS) for t, m, s in compiled]
    found += [Cell("product", "sft", "lora", "tiny", "real", "equal", "bfloat16", KERNELS)]
    found += [
        Cell("product", "sft", "lora", shape, lengths, words=KERNELS) for shape in (big, middle) for lengths in ("full", "real")
    ]
    found += [Cell("product", "sft", "full", middle, "full", words=KERNELS)]
    return list(dict.fromkeys(found))


def _form(shape: str, lengths: str, form: str, kind: str = "speed", dtype: str = "bfloat16") -> Cell:
    return Cell("product", "sft", "lora", shape, lengths, kind, dtype, f"model.gradient_checkpointing={form}")


def _sides(task: str, method: str, shape: str, lengths: str) -> list[Cell]:
    sides = ("product", "trl", "trl_best", "transformers") if task == "sft" else ("product", "trl", "trl_best")
    return [Cell(side, task, method, shape, lengths) for side in sides]


# --- running ----------------------------------------------------------------------------------------------------------


class Bench:
    """Cells in order until time is up; results are on disk after each."""

    def __init__(self, device: str, end: float, folder: Path, out: Path, dry: bool):
        self.device, self.end, self.folder, self.out, self.dry = device, end, folder, out, dry
        self.facts = facts(device, dry)
        self.results: list[dict[str, Any]] = []

    def run(self, wanted: list[Cell]) -> None:
        """Measure the cells."""
        for number, cell in enumerate(wanted):
            began = time.time()
            if self.end - began < LEAST:
                self.results += [{"cell": asdict(c), "status": "skipped", "error": "no time left"} for c in wanted[number:]]
                break
            print(f"{time.strftime('%H:%M:%S')} {cell.name}", flush=True)
            found = self.one(cell, number)
            self.results.append({"cell": asdict(cell), "seconds": time.time() - began, **found})
            print(f"  {found['status']} {said(self.results[-1])}", flush=True)
            write(self.out, self.facts, self.results)
        write(self.out, self.facts, self.results)

    def one(self, cell: Cell, number: int) -> dict[str, Any]:
        """A cell's result, or why there is none."""
        if (reason := missing(cell, self.device)) is not None:
            return {"status": "skipped", "error": reason}
        place = self.folder / f"{number}"
        model = self.folder / f"{cell.shape}-{cell.dtype}"
        spec = {"device": self.device, "model": str(model), "dtype": cell.dtype}
        try:
            if not (model / "whole").exists():
                self.call({**spec, "build": cell.shape}, place / "build")
            # Full rows of the tiny model are short; what is compared there is not how fast it is.
            size = "dry" if self.dry or cell.kind == "equal" else "whole"
            words = {"cell": asdict(cell), "size": size, "data": str(place / "rows.jsonl"), "out": str(place / "out")}
            found = self.call({**spec, **words}, place)
        except Exception as error:
            return {"status": "failed", "error": f"{type(error).__name__}: {error}"[-1500:]}
        if "tflops_per_s" in found:
            found["mfu"] = utilisation(found["tflops_per_s"] * 1e12, self.facts["device"])
        return {"status": "ok", **found}

    def call(self, spec: dict[str, Any], place: Path) -> dict[str, Any]:
        """Run a spec in a process of its own, or in this one in a dry run.

        Raises:
            RuntimeError: it failed; the end of what it said.
            TimeoutError: it ran until the time was up.
        """
        place.mkdir(parents=True, exist_ok=True)
        path = place / "spec.json"
        write_json(path, {**spec, "began": time.time()})
        if self.dry:
            from tests.benchmarks import gpu_cell

            gpu_cell.main(path)
        else:
            self.start(path, place / "log.txt")
        return json.loads((place / "found.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def start(self, path: Path, log: Path) -> None:
        """A process for a spec, which may take the time that is left."""
        environment = {**os.environ, **ENVIRONMENT, "LLMRECIPE_CACHE": str(path.parent / "cache")}
        command = [sys.executable, "-m", "tests.benchmarks.gpu_cell", str(path)]
        with log.open("w", encoding="utf-8") as output:
            try:
                subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, check=True,
                    timeout=max(1.0, self.end - time.time()),
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise TimeoutError("time was up while it ran") from None
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"exit {error.returncode}: {log.read_text(encoding='utf-8')[-1200:]}") from None


def facts(device: str, dry: bool) -> dict[str, Any]:
    """Device, versions and the stamp."""
    import torch

    found: dict[str, Any] = {"harness": stamp("gpu"), "dry_run": dry, "device": platform.processor() or platform.machine()}
    if device == "cuda":
        free = torch.cuda.get_device_properties(0)
        found |= {"device": free.name, "memory_gb": round(free.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return {**found, "python": platform.python_version()}


# --- the report -------------------------------------------------------------------------------------------------------


def said(result: dict[str, Any]) -> str:
    """A result in one line."""
    if result["status"] != "ok":
        return str(result["error"]).strip().splitlines()[-1][:200]
    if "equal" in result:
        return f"largest difference {result['difference']:.1e} (tolerance {result['tolerance']:.0e})"
    return f"{result['tokens_per_s']:.0f} tok/s, MFU {share(result.get('mfu'))}, {result['peak_mb']:.0f} MB"


def share(value: float | None) -> str:
    """Per cent, or a dash where it is not known."""
    return "-" if value is None else f"{100 * value:.1f} %"


def write(out: Path, found: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """JSON with everything, and Markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {**found, "results": results})
    aside = out.with_suffix(".md.part")
    aside.write_text(page(found, results), encoding="utf-8")
    aside.replace(out.with_suffix(".md"))


def page(found: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The report in Markdown."""
    done = [r for r in results if r["status"] == "ok"]
    words = ", ".join(f"{k} {v}" for k, v in found.items() if k not in ("harness", "dry_run"))
    lines = [f"# {'Dry run' if found['dry_run'] else found['device']}", "", f"{words}.", ""]
    lines += ["| task | method | model | rows | side | tokens/s | of the peak | step s | peak MB | first step s |"]
    lines += ["|" + " --- |" * 10]
    for r in (r for r in done if r["cell"]["kind"] == "speed"):
        c = r["cell"]
        cells_ = [c["task"], c["method"], c["shape"], c["lengths"], side(r)]
        cells_ += [f"{r['tokens_per_s']:.0f}", share(r.get("mfu")), f"{r['step_s']:.3f}", f"{r['peak_mb']:.0f}"]
        lines.append("| " + " | ".join([*cells_, f"{r['first_step_s']:.1f}"]) + " |")
    lines += ["", "## Losses on the CPU and on the device, and answers of two ways of decoding", ""]
    lines += ["| task | method | dtype | with | largest difference | tolerance | |", "|" + " --- |" * 7]
    for r in (r for r in done if r["cell"]["kind"] == "equal"):
        c, verdict = r["cell"], "equal" if r["equal"] else "**not equal**"
        lines.append(
            f"| {c['task']} | {c['method']} | {c['dtype']} | {c.get('words', '')} | {r['difference']:.1e} | "
            f"{r['tolerance']:.0e} | {verdict} |"
        )
    lines += ["", "## Answers by other ways of decoding", "", *(gpu_decoding.gains(done) or ["Not measured."])]
    lines += ["", "## Steps after which compiled blocks and fused kernels pay", "", *(payback(done) or ["Not measured."])]
    for r in (r for r in done if r["cell"]["kind"] == "profile"):
        lines += ["", f"## Where a step goes: {Cell(**r['cell']).name}", "", *profile_lines(r["kernels"])]
    left = [f"- {Cell(**r['cell']).name}: {r['status']}: {said(r)}" for r in results if r["status"] != "ok"]
    lines += ["", "## Not measured", "", *(left or ["Nothing."]), ""]
    return "\n".join(lines) + "\n" + line(found["harness"])


def payback(done: list[dict[str, Any]]) -> list[str]:
    """One line for each cell with compiled blocks or fused kernels beside the same without: what a step gains, and when that is
    more than was spent before the rates begin."""
    plain = {Cell(**r["cell"]): r for r in done if r["cell"]["kind"] == "speed" and r["cell"]["side"] == "product"}
    lines = []
    for cell, own in plain.items():
        other = plain.get(replace(cell, words=""))
        if cell.words not in (COMPILED, KERNELS) or other is None:
            continue
        gained, spent = other["step_s"] - own["step_s"], max(0.0, own["warm_s"] - other["warm_s"])
        after = f"after {math.ceil(spent / gained)} steps" if gained > 0 else "never"
        lines.append(
            f"- {replace(cell, words='').name} ({cell.words}): {gained / other['step_s']:+.1%} of a step, {spent:.1f} s more "
            f"before: {after}"
        )
    return lines


def side(result: dict[str, Any]) -> str:
    """A side, and what it was run with."""
    words = result["cell"].get("words", "")
    more = [*result["settings"].get("with", []), *([words] if words else [])]
    return result["cell"]["side"] + (f" ({', '.join(more)})" if more else "")


def profile_lines(kernels: list[dict[str, Any]], most: int = 15) -> list[str]:
    """Groups, then the largest kernels."""
    groups: dict[str, float] = {}
    for k in kernels:
        groups[k["group"]] = groups.get(k["group"], 0.0) + k["share"]
    ordered = sorted(groups.items(), key=lambda entry: -entry[1])
    lines = [", ".join(f"{name} {share(value)}" for name, value in ordered) + ".", "", "| kernel | share | ms | calls |"]
    lines += ["| --- | --- | --- | --- |"]
    return lines + [
        f"| `{k['kernel'][:100].replace('|', '/')}` | {share(k['share'])} | {k['ms']:.2f} | {k['calls']} |"
        for k in kernels[:most]
    ]


def main(words: list[str] | None = None) -> None:
    """Parse arguments and run the cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="when to stop, counted from the start")
    parser.add_argument("--dry-run", action="store_true", help="every kind of cell at tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", default=[], help="cells whose name has all of these words")
    parser.add_argument("--folder", type=Path, help="where models, rows and runs go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="stem of the result files (default: by device, among the results)")
    options = parser.parse_args(words)
    end = time.time() + 60 * options.minutes
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use here; --dry-run shows on a CPU that everything runs")
    device = "cpu" if options.dry_run else "cuda"
    folder = options.folder or Path(tempfile.mkdtemp(prefix="llmrecipe-gpu-"))
    wanted = [c for c in cells(options.dry_run) if set(options.only) <= set(c.name.split())]
    if not wanted:
        parser.error(f"--only: no cell has all of {options.only}; for example: {cells(options.dry_run)[3].name}")
    name = facts(device, options.dry_run)["device"]
    stem = "gpu-" + re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    bench = Bench(device, end, folder, options.out or (folder / "dry" if options.dry_run else RESULTS / stem), options.dry_run)
    bench.run(wanted)
    print(page(bench.facts, bench.results))


if __name__ == "__main__":
    main()
