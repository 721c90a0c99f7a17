"""What a device would hold under each value of `runtime.shard`, on any number of devices; works on the meta device.

With W bytes of weights, G of gradients, S of the optimizer's state, all of one process, N devices, and what a pass needs
whatever the stage, A (activations, logits, auxiliary models):

    none    W + G + S + A
    zero1   W + G + S / N + A
    zero2   W + (G + S) / N + A
    zero3   (W + G + S) / N + B + A, B the largest block and all that is outside of blocks, gathered for their pass

Source: ZeRO, arXiv 1910.02054, whose table has 2 bytes a weight, 2 a gradient and 12 of state, and no A or B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.training.memory_estimate import Estimate

DEVICES = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
"""Numbers of devices in the table."""
ALWAYS, SAVING = 4, 0.01
"""Rows that every table has; and least part of a device's memory that further devices must save for a row of their own."""
STAGES = ("none", "zero1", "zero2", "zero3")


def device_bytes(memory: Estimate, gathered: int, devices: int) -> dict[str, int]:
    """Return the bytes of one device under each stage.

    Args:
        memory: of one process.
        gathered: the largest group of parameters that is gathered at one time.
    """
    whole, grads, state = memory.weights, memory.gradients, memory.optimizer
    held = memory.activations + memory.logits + memory.temporary + memory.auxiliary
    divided = {
        "none": whole + grads + state,
        "zero1": whole + grads + _part(state, devices),
        "zero2": whole + _part(grads + state, devices),
        "zero3": _part(whole + grads + state, devices) + (gathered if devices > 1 else 0),
    }
    return {stage: size + held for stage, size in divided.items()}


def _part(size: int, devices: int) -> int:
    return -(-size // devices)


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of the largest block, and of all parameters outside of blocks, of a model."""
    try:
        blocks = {id(s.module): s.module for s in anatomy(model).sites if s.role == "block"}
    except ModelError:
        blocks = {}
    inside = {name: {id(p): p for p in block.parameters()} for name, block in blocks.items()}
    known = {place for block in inside.values() for place in block}
    outside = {id(p): p for p in model.parameters() if id(p) not in known}
    return max(map(_size, inside.values()), default=0) + _size(outside)


def _size(parameters: Mapping[int, Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters.values())


def shard_table(memory: Estimate, model: nn.Module) -> list[dict[str, float]]:
    """Return megabytes of a device under each stage, a row for each number of devices up to where more save nothing."""
    gathered = gathered_bytes(model)
    rows: list[dict[str, float]] = []
    before: dict[str, int] = {}
    for devices in DEVICES:
        sizes = device_bytes(memory, gathered, devices)
        if len(rows) >= ALWAYS and all(size > (1 - SAVING) * before[stage] for stage, size in sizes.items()):
            break
        before = sizes
        rows.append({"devices": devices, **{stage: round(size / 2**20, 1) for stage, size in sizes.items()}})
    return rows


def resting(memory: Estimate, devices: int) -> str:
    """Return what `runtime.offload=cpu` moves off a device of several, as a sentence."""
    parts = _part(memory.weights + memory.gradients + memory.optimizer, devices)
    return f"runtime.offload=cpu keeps {parts / 2**20:.1f} MB of each process in the memory of its machine, not on its device"


def saving(memory: Estimate, model: nn.Module, shard: str, devices: int) -> str:
    """Return what a stage saves on some devices, as a sentence."""
    sizes = device_bytes(memory, gathered_bytes(model), devices)
    saved, undivided = sizes["none"] - sizes[shard], sizes["none"]
    text = f"{shard} on {devices} devices saves {saved / 2**20:.1f} MB of {undivided / 2**20:.1f} MB a device"
    if shard in ("zero1", "zero2") and memory.gradients * 10 < memory.weights:
        text += "; most of it is frozen weights, which only zero3 or a quantized base divides or shrinks"
    return text
