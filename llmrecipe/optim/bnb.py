"""bitsandbytes optimizers: the one place that imports the library, computes the size of its states and handles CPU limits."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RunError

if TYPE_CHECKING:
    import torch

BLOCK = 256
"""Entries that share one scale in an 8-bit state."""
SMALLEST = 4096
"""Tensors with fewer entries keep a 32-bit state: it costs almost nothing, and they suffer most from rounding."""


def library() -> ModuleType:
    """Return bitsandbytes, imported without its advice on stderr.

    Raises:
        RunError: it is not installed (there is no build for this machine).
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            import bitsandbytes
    except ImportError as error:
        raise RunError(
            f"optim: this optimizer is one of bitsandbytes, which cannot be imported here ({error}); use optim.kind=adamw"
        ) from error
    module: ModuleType = bitsandbytes
    return module


def bnb_optimizer(class_name: str, params: list[dict[str, Any]], **options: object) -> torch.optim.Optimizer:
    """Return a bitsandbytes optimizer; for a paged one on CPU, log one line saying that nothing is paged there."""
    optimizer = getattr(library().optim, class_name)(params, min_8bit_size=SMALLEST, **options)
    if getattr(optimizer, "is_paged", False) and all(p.device.type == "cpu" for g in params for p in g["params"]):
        logging.getLogger("llmrecipe").warning("optim: paging needs a GPU; on CPU the optimizer state stays in ordinary memory")
        # The library would say the same again, once per optimizer, through `warnings`.
        optimizer._cpu_paged_warned = True
    return optimizer


def state_bytes(shape: Sequence[int], states: int, bits: int) -> int:
    """Return the bytes of `states` running averages of one parameter.

    In 32 bits, 4 bytes per entry and average; in 8 bits, 1 byte per entry and 4 per block of 256.

    The two code books of an 8-bit optimizer (1 KB each) are shared by all parameters and not counted.
    """
    count = 1
    for size in shape:
        count *= int(size)
    if bits == 32 or count < SMALLEST:
        return 4 * states * count
    return states * (count + 4 * -(-count // BLOCK))
