"""`llmrecipe doctor`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmrecipe.cli.arguments import Json
from llmrecipe.core.console import print_json
from llmrecipe.core.paths import ASSETS

if TYPE_CHECKING:
    from types import ModuleType

    from packaging.requirements import Requirement

PANEL = "Tools"
ORDER = 2

TESTED = ASSETS / "tested_versions.txt"
"""The newest versions that the test suite has passed with, `NAME==VERSION` per line."""
MISSING = "missing"
UNKNOWN = "unknown: llmrecipe runs from a folder and is not installed"
EXTRA = re.compile(r"extra == [\"']([\w.-]+)[\"']")
DEV = "dev"
"""The extra for work on llmrecipe itself."""


def verb(as_json: Json = False) -> None:
    """Say what this machine can run: packages, devices, memory, precision, quantization, kernels, extras."""
    facts = {
        "packages": packages() or UNKNOWN,
        "extras": extras() or UNKNOWN,
        **machine(),
        **torch_facts(),
        "quantization": quantization(),
        "kernels": kernels(),
    }
    if as_json:
        print_json(facts)
        return
    from rich.table import Table
    from rich.text import Text

    from llmrecipe.core.console import console

    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, Text(shown))
    console().print(table)


def requirements() -> list[Requirement]:
    """Return what the installed package requires, its extras included; nothing where it runs from a folder of sources."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in requires("llmrecipe") or []]
    except PackageNotFoundError:
        return []


def packages() -> dict[str, str]:
    """Return each required package with its version, and what is wrong with that: missing, too old, newer than was tested."""
    needed = [one for one in requirements() if one.marker is None or one.marker.evaluate({"extra": ""})]
    return {one.name: _state(one) for one in needed}


def extras() -> dict[str, str]:
    """Return each optional extra with the versions of its packages, or what to install."""
    found: dict[str, list[Requirement]] = {}
    for one in requirements():
        for extra in EXTRA.findall(str(one.marker or "")):
            if extra != DEV and one.marker is not None and one.marker.evaluate({"extra": extra}):
                found.setdefault(extra, []).append(one)
    return {extra: _extra_state(extra, needed) for extra, needed in sorted(found.items())}


def _extra_state(extra: str, needed: list[Requirement]) -> str:
    states = {one.name: _state(one) for one in needed}
    if gone := [name for name, state in states.items() if state.startswith(MISSING)]:
        lacks = "not installed" if len(gone) == len(states) else f"without {' and '.join(gone)}"
        return f"{lacks} (pip install 'llmrecipe[{extra}]')"
    return "ready: " + ", ".join(f"{name} {state}" for name, state in states.items())


def _state(needed: Requirement) -> str:
    """Return the version of a package, with what is wrong with it."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.version import Version

    try:
        found = version(needed.name)
    except PackageNotFoundError:
        return MISSING
    if not needed.specifier.contains(found, prereleases=True):
        return f"{found} (too old: needs {needed.specifier})"
    newest = tested_versions().get(needed.name.lower())
    if newest is not None and Version(found).release > Version(newest).release:
        return f"{found} (untested: newer than {newest})"
    return found


def tested_versions() -> dict[str, str]:
    """Return package -> the newest version that the test suite has passed with."""
    lines = TESTED.read_text(encoding="utf-8").split()
    return {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}


def machine() -> dict[str, Any]:
    """Return Python version, cores, memory and disk of this machine."""
    import os
    import platform
    import shutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = getattr(os, "sysconf_names", {})
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "memory_gb": round(total / 2**30, 1) if total else "unknown",
        "free_disk_gb": round(shutil.disk_usage(".").free / 2**30, 1),
    }


def torch_facts() -> dict[str, Any]:
    """Return devices and the precisions they support."""
    try:
        import torch
    except ImportError as error:
        return {"torch": f"cannot be imported: {error}"}
    gpus = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    mps = getattr(torch.backends, "mps", None)
    return {
        "device": "cuda" if gpus else "mps" if mps is not None and mps.is_available() else "cpu",
        "gpus": gpus or "none",
        "bfloat16": "yes" if not gpus or torch.cuda.is_bf16_supported() else "no; use float32 or float16",
        "threads": torch.get_num_threads(),
        "distributed": ", ".join(_backends(torch)) or "none",
    }


def _backends(torch: ModuleType) -> list[str]:
    if not torch.distributed.is_available():
        return []
    found = {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
    return [name for name, there in found.items() if there]


def quantization() -> str:
    """Test whether 4-bit weights work here, by quantizing a small matrix and reading it back."""
    try:
        import torch
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    except (ImportError, RuntimeError, OSError, NotImplementedError, ValueError) as problem:
        return f"nf4 does not work here: {str(problem).splitlines()[0]}"
    return (
        f"nf4 works on {device} (largest error {error:.3f} of 1)"
        if error < 0.2
        else f"nf4 gives wrong numbers on {device} ({error:.3f})"
    )


def kernels() -> str:
    """Test whether the kernels of `model.kernels=liger` run here, by multiplying a small gated activation."""
    try:
        import torch

        from llmrecipe.models.fused_kernels import kernels_lacking, load_kernels

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if why := kernels_lacking(device):
            return f"liger-kernel {why}"
        gate, up = torch.linspace(-4, 4, 512, device=device).reshape(2, 8, 32)
        found = load_kernels()["silu"].forward(gate, up)[2]
        error = (found - torch.nn.functional.silu(gate) * up).abs().max().item()
    except Exception as problem:  # whatever a compiler of kernels raises
        return f"liger-kernel does not work here: {type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
    return f"liger-kernel works on {device}" if error < 1e-4 else f"liger-kernel gives wrong numbers on {device} ({error:.1e})"
