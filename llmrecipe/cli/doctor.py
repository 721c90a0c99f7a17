"""`llmrecipe doctor`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from llmrecipe.cli.arguments import Json
from llmrecipe.core.console import print_json

PANEL = "Tools"
ORDER = 2

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "hydra-core",
    "pydantic",
)
EXTRAS = {
    "deepspeed": ("deepspeed",),
    "search": ("optuna", "botorch"),
    "track": ("tensorboard", "trackio", "wandb", "mlflow"),
    "plots": ("matplotlib",),
    "kernels": ("liger-kernel",),
    "eval": ("lm-eval",),
    "metrics": ("sacrebleu",),
    "gguf": ("gguf",),
    "serve": ("starlette", "uvicorn"),
}


def verb(as_json: Json = False) -> None:
    """Say what this machine can run: packages, devices, memory, precision, quantization, extras."""
    facts = {"packages": packages(), "extras": extras(), **machine(), **torch_facts(), "quantization": quantization()}
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


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages() -> dict[str, str]:
    """Return package -> version, or `missing`."""
    return {package: _version(package) or "missing" for package in PACKAGES}


def extras() -> dict[str, str]:
    """Return optional extra -> `ready`, or what to install."""
    missing = {extra: [p for p in names if _version(p) is None] for extra, names in EXTRAS.items()}
    return {
        extra: "ready" if not gone else f"not installed (pip install 'llmrecipe[{extra}]')" for extra, gone in missing.items()
    }


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
