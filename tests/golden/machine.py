"""What equality of bits rests on: the versions that compute, and the processor they compute on."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

INSTRUCTIONS = ("amx", "asimd", "avx", "bmi", "f16c", "fma", "sse", "sve")
"""Beginnings of the processor flags that decide which kernels are chosen."""


def versions() -> dict[str, str]:
    """Return the versions that decide which operations run."""
    return {name: version(name) for name in ("torch", "transformers")}


def fingerprint() -> dict[str, str]:
    """Return what has to be equal for two runs to be equal bit for bit."""
    import torch

    model, flags = _processor()
    return {
        **versions(),
        **{name: version(name) for name in ("tokenizers", "numpy", "accelerate")},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": model,
        "instructions": hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16],
    }


def _processor() -> tuple[str, list[str]]:
    """Return the processor's name and its instruction sets, as Linux tells them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = (facts.get("flags") or facts.get("Features", "")).split()
    return facts.get("model name", platform.machine()), sorted(f for f in flags if f.startswith(INSTRUCTIONS))


def unlike(kept: dict[str, str], here: dict[str, str]) -> str:
    """Name what differs between two fingerprints; empty where nothing does."""
    names = sorted(set(kept) | set(here))
    return ", ".join(f"{n} {kept.get(n)} there, {here.get(n)} here" for n in names if kept.get(n) != here.get(n))
