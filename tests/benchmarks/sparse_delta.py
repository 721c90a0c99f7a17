"""Time and memory of the sparse-delta kernels against the dense gradient, by density.

python -m tests.benchmarks.sparse_delta
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmrecipe.methods.selective._engines.sparse_delta import product_gradient

TOKENS, WIDTH = 2048, {"cpu": 1024, "cuda": 4096}


def seconds(action: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Best of a few runs after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def row(g: Tensor, x: Tensor, density: float) -> dict[str, Any]:
    """Both kernels at one density."""
    device, width = g.device.type, g.shape[1]
    idx = torch.randperm(width * width, device=g.device)[: int(density * width * width)].sort()[0].int()

    def direct() -> Tensor:
        return product_gradient(g, x, idx, "entries", (width, width), torch.float32)

    def transient() -> Tensor:
        return (g.t() @ x).view(-1).index_select(0, idx).float()

    found: dict[str, Any] = {"device": device, "dtype": str(g.dtype).removeprefix("torch."), "density": density}
    for name, kernel in (("direct", direct), ("transient", transient)):
        found[f"{name}_ms"] = round(1e3 * seconds(kernel, device), 3)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kernel()
            found[f"{name}_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    found["worst"] = float((direct() - transient()).abs().max() / transient().abs().max())
    return found


def main() -> None:
    """One JSON line a density and dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        g, x = (torch.randn(TOKENS, WIDTH[device], device=device, dtype=dtype) for _ in range(2))
        for density in (0.0002, 0.001, 0.005, 0.01, 0.02, 0.05):
            print(json.dumps(row(g, x, density)))


if __name__ == "__main__":
    main()
