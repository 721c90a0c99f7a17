"""What a run really holds, part by part: counted in its first update, the peak at its end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from llmrecipe.core.lazy import is_installed, load_module
from llmrecipe.methods._engines.quantized import bits_of, quantized
from llmrecipe.models.pretrained import pretrained
from llmrecipe.training.kept_tensors import KeptTensors
from llmrecipe.training.memory_estimate import optimizer_bytes

if TYPE_CHECKING:
    from llmrecipe.methods._base.stack import Stack


class MemoryMeter:
    """The memory of one run: nothing is copied, and all counting is done in its first update.

    The parts are tensors and exact. The peak of a GPU is that of its allocator. The peak of a process on a CPU is what the
    operating system saw from the first update on, above what the process held before besides the model; it includes what the
    C library keeps of freed memory.
    """

    def __init__(self) -> None:
        self.kept: KeptTensors | None = None
        self.parts: dict[str, int] = {}
        """Bytes of each part in the first update; empty before it, and where they are not counted."""
        self.floor: int | None = None
        """Bytes that the process holds besides the model; None where that is not known."""
        self.before = 0
        """Most bytes of the process before the first update."""
        self.gpu: torch.device | None = None
        """Where the run computes, if that is a GPU; a machine that has one may compute on its CPU."""

    def watch(
        self, model: nn.Module, counted: bool, device: torch.device
    ) -> contextlib.AbstractContextManager[KeptTensors | None]:
        """Return a context for the first update.

        Args:
            counted: whether its parts are to be counted; those of a divided or a compiled model are not all there to count.
            device: where the run computes; divided parameters may rest elsewhere.
        """
        self._start_peak(model, device)
        self.kept = KeptTensors([*model.parameters(), *model.buffers()], vocabulary_of(model)) if counted else None
        return self.kept or contextlib.nullcontext()

    def count(self, model: nn.Module, stack: Stack, optimizer: torch.optim.Optimizer | None) -> None:
        """Count the bytes of each part. Call after the first update, while its gradients exist."""
        if self.kept is None:
            return
        if optimizer is not None:
            state = optimizer_bytes(optimizer)
        else:
            state = sum(t.nbytes for t in stack.training_tensors(model).values())
        self.parts = {
            "weights": held_weights(model),
            "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
            "optimizer": state,
            "activations": self.kept.peak - self.kept.peak_logits,
            "logits": self.kept.peak_logits,
        }

    def peak_mb(self) -> float:
        """Return the peak memory of the device, or of the whole process on the CPU, in MB."""
        return round(max(self.before, _peak(self.gpu)) / 2**20, 1)

    def totals(self) -> dict[str, int]:
        """Return the parts and, where it is known, the peak so far."""
        return self.parts if self.floor is None else {**self.parts, "peak": max(0, _peak(self.gpu) - self.floor)}

    def _start_peak(self, model: nn.Module, device: torch.device) -> None:
        """Measure the peak of a CPU process from here on; note what it was so far, and what is held besides the model."""
        if device.type == "cuda":
            self.gpu, self.floor = device, 0
            return
        self.before = _peak(None)
        with contextlib.suppress(OSError, AttributeError, TypeError):  # the last: Windows opens no library without a name
            # What an earlier training in this process has freed would else count as held.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self.floor = pages * os.sysconf("SC_PAGE_SIZE") - held_weights(model)


def _peak(gpu: torch.device | None) -> int:
    if gpu is not None:
        return int(torch.cuda.max_memory_allocated(gpu))
    with contextlib.suppress(OSError):
        # On Linux `ru_maxrss` of a process begins with the peak of the one that started it, and cannot be set back.
        if own := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE):
            return int(own[1]) * 1024
    if not is_installed("resource"):
        held = psutil.Process().memory_info()
        return int(getattr(held, "peak_wset", held.rss))
    system: Any = load_module("resource")
    return int(system.getrusage(system.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def vocabulary_of(model: nn.Module) -> int | None:
    """Return the width of a model's logits of tokens; None where it has none."""
    return getattr(pretrained(model).config.get_text_config(), "vocab_size", None)


def held_weights(model: nn.Module) -> int:
    """Count the bytes of weights and buffers, each storage once, and of the scales and tables of quantized ones."""
    packed = [(module, module.weight) for _, module in quantized(model)]
    scales = sum(sum(t.nbytes for t in _scales(module, weight)) for module, weight in packed)
    held = {t.untyped_storage()._cdata: t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values()) + scales


def _scales(module: nn.Module, weight: object) -> list[Tensor]:
    """Return what a quantized layer keeps besides its codes."""
    if bits_of(module) == 8:
        state: Any = module.state
        found = getattr(weight, "SCB", None)
        return [state.SCB if found is None else found]
    known: Any = getattr(weight, "quant_state", None) or module.quant_state
    inner = known.state2
    return [known.absmax, known.code, *([inner.absmax, inner.code, known.offset] if inner is not None else [])]
