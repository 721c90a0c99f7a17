"""bitsandbytes optimizers: one place that imports the library, says what its states weigh and what a CPU cannot do."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RunError

if TYPE_CHECKING:
    import torch

BLOCK = 256
"""Entries that share one scale in an 8-bit state."""
SMALLEST = 4096
"""Tensors with fewer entries keep a 32-bit state: they weigh nothing and lose most by rounding."""


def library() -> Any:
    """bitsandbytes, imported without its advice on stderr.

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
    return bitsandbytes


def build(class_name: str, params: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """An optimizer of bitsandbytes; a paged one on CPU says in one line that nothing is paged there."""
    optimizer = getattr(library().optim, class_name)(params, min_8bit_size=SMALLEST, **options)
    if getattr(optimizer, "is_paged", False) and all(p.device.type == "cpu" for g in params for p in g["params"]):
        logging.getLogger("llmrecipe").warning("optim: paging needs a GPU; on CPU the optimizer state stays in ordinary memory")
        # The library would say the same again, once per optimizer, through `warnings`.
        optimizer._cpu_paged_warned = True
    return optimizer


def state_bytes(shape: Sequence[int], states: int, bits: int) -> int:
    """Bytes of `states` running averages of one parameter: 4 each in 32 bits; 1 each plus 4 a block of 256 in 8 bits.

    The two code books of an 8-bit optimizer (1 KB each) are shared by all parameters and not counted.
    """
    count = 1
    for size in shape:
        count *= int(size)
    if bits == 32 or count < SMALLEST:
        return 4 * states * count
    return states * (count + 4 * -(-count // BLOCK))
