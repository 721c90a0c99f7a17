"""Which version of which benchmark wrote a result file.

    python -m tests.benchmarks.stamp                 take the sources as they are: what they measure has not changed
    python -m tests.benchmarks.stamp --bump harness  what `harness` measures has changed: its results have to be renewed

`versions.json` declares for each benchmark its version, its sources, a hash over them and the result files it writes. Every
result file carries the version that wrote it: JSON under `harness`, Markdown in its last line. Tests refuse a hash that is not
that of the sources, and a result file of another version unless its stamp says why it is out of date.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
VERSIONS = HERE / "versions.json"
LINE = re.compile(
    r"Harness (?P<name>\w+), version (?P<version>\d+), commit (?P<commit>\S+?)(?:; outdated: (?P<outdated>.+))?\."
)


def declared(path: Path = VERSIONS) -> dict[str, dict[str, Any]]:
    """Benchmark -> version, sources, hash, results."""
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def source_hash(sources: list[str], folder: Path = HERE) -> str:
    """Hash over names and contents of source files."""
    found = hashlib.sha256()
    for name in sorted(sources):
        found.update(f"{name}\n".encode() + (folder / name).read_bytes() + b"\n")
    return found.hexdigest()[:16]


def commit() -> str:
    """The checkout's commit, with `+` where tracked files of the package differ from it; `unknown` outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", "llmrecipe", "recipes") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()


def stamp(name: str) -> dict[str, Any]:
    """What a result file written by this checkout says under `harness`."""
    return {"name": name, "version": declared()[name]["version"], "commit": commit()}


def machine(packages: Sequence[str] = ("torch", "transformers")) -> dict[str, str]:
    """Processor and versions."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((text.split(":")[1].strip() for text in info.splitlines() if text.startswith("model name")), "")
    versions = {name: version(name) for name in packages}
    return {"cpu": f"{model} x{os.cpu_count()}", "python": platform.python_version(), **versions}


def machine_line(facts: Mapping[str, str] | None = None) -> str:
    """The same as a line of a Markdown file."""
    return ", ".join(f"{key} {value}" for key, value in (facts or machine()).items()) + "; one thread\n"


def line(found: dict[str, Any]) -> str:
    """The same as the last line of a Markdown file."""
    outdated = f"; outdated: {found['outdated']}" if found.get("outdated") else ""
    return f"Harness {found['name']}, version {found['version']}, commit {found['commit']}{outdated}.\n"


def read(path: Path) -> dict[str, Any] | None:
    """The stamp of a result file; None where it has none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        report = json.loads(text)
        return report.get("harness") if isinstance(report, dict) else None
    match = LINE.fullmatch((text.rstrip().splitlines() or [""])[-1])
    if match is None:
        return None
    return {k: int(v) if k == "version" else v for k, v in match.groupdict().items() if v is not None}


def writer_of(path: Path, benchmarks: dict[str, dict[str, Any]]) -> str | None:
    """The benchmark that writes a result file of this name."""
    return next((n for n, b in benchmarks.items() if any(fnmatch.fnmatchcase(path.stem, p) for p in b["results"])), None)


def judge(path: Path, benchmarks: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with a result file's stamp; None where nothing is."""
    name, found = writer_of(path, benchmarks), read(path)
    if name is None or found is None or found["name"] != name:
        return f"{path.name} does not carry the version of the benchmark that wrote it ({name})"
    version = benchmarks[name]["version"]
    if found["version"] > version or (found["version"] < version and not found.get("outdated")):
        older = f"{path.name} is of version {found['version']} of {name}, which is at {version}"
        return f"{older}: measure again, or say in it why not"
    return None


def main() -> None:
    """Take the sources as they are, and count a version up where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bump", nargs="+", default=[], choices=list(declared()), help="benchmarks that measure something else"
    )
    bumped = parser.parse_args().bump
    benchmarks = declared()
    for name, benchmark in benchmarks.items():
        benchmark["version"] += name in bumped
        benchmark["hash"] = source_hash(benchmark["sources"])
    VERSIONS.write_text(json.dumps(benchmarks, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
