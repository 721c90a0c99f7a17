"""The history of a zeroth-order run: a few bytes a step, from which the weights can be made again.

    magic | length of the header | header (JSON) | records
    record: learning rate (float32), samples n (uint16), n projected gradients (float32); NaN marks a step that was skipped

20,000 steps with one sample take 200 KB whatever the size of the model.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RunError
from llmrecipe.methods.memory._engines.zeroth_order import (
    Noise,
    StepEstimate,
    Trained,
    UpdateMoments,
    absorb,
    new_moments,
    shapes_digest,
    update,
    values_digest,
)

MAGIC = b"MEZO1\n"
RECORD = struct.Struct("<fH")
NOT_COMPARED = ("start",)
"""Header keys a resumed run cannot know again: its weights have moved."""


class History:
    """An open history file."""

    def __init__(self, path: Path, header: dict[str, Any], step: int):
        """Start a file at step 0, or continue one at `step`, dropping records of steps that are about to be made again.

        Raises:
            RunError: the run continues at a step the file does not reach, or the file is of other settings.
        """
        self.path = path
        if step == 0:
            body = json.dumps(header, sort_keys=True).encode()
            path.write_bytes(MAGIC + struct.pack("<I", len(body)) + body)
        else:
            self._continue(header, step)

    def _continue(self, header: dict[str, Any], step: int) -> None:
        if not self.path.exists():
            raise RunError(f"{self.path}: the history of the first {step} steps is missing; without it: store_history=false")
        known = read_history_header(self.path)
        other = [k for k in header if k not in NOT_COMPARED and header[k] != known.get(k)]
        if other:
            raise RunError(f"{self.path}: the history was made with other settings: {', '.join(sorted(other))}")
        end = _offset(self.path, step)
        with self.path.open("r+b") as file:
            file.truncate(end)

    def append(self, entry: StepEstimate | None, lr: float = 0.0) -> None:
        """Add one step; None for a step that was skipped because its loss was not finite."""
        g = (math.nan,) if entry is None else entry.g
        data = RECORD.pack(lr if entry is None else entry.lr, len(g)) + struct.pack(f"<{len(g)}f", *g)
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def read_history_header(path: Path) -> dict[str, Any]:
    """Read the header of a history file.

    Raises:
        RunError: not a history file.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise RunError(f"{path} is not a history of zeroth-order updates")
        (size,) = struct.unpack("<I", file.read(4))
        return json.loads(file.read(size))


def _walk(path: Path) -> Iterator[tuple[int, StepEstimate]]:
    """Yield (offset after the record, entry), one a step; a torn last record is left out."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<I", data, len(MAGIC))
    at = len(MAGIC) + 4 + size
    step = 0
    while at + RECORD.size <= len(data):
        lr, n = RECORD.unpack_from(data, at)
        end = at + RECORD.size + 4 * n
        if end > len(data):
            return
        yield end, StepEstimate(step, lr, struct.unpack_from(f"<{n}f", data, at + RECORD.size))
        at, step = end, step + 1


def _offset(path: Path, steps: int) -> int:
    ends = [end for end, _ in _walk(path)]
    if len(ends) < steps:
        raise RunError(f"{path}: holds {len(ends)} steps, but the checkpoint is at step {steps}")
    return ends[steps - 1]


def entries(path: Path) -> list[StepEstimate]:
    """Read every step of a history; skipped ones have g = NaN."""
    read_history_header(path)
    return [entry for _, entry in _walk(path)]


def recall(
    path: Path, trained: list[Trained], noise: Noise, moments: UpdateMoments, step: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Recompute the moments a run had after `step` steps: every estimate is drawn again, the weights stay where they are.

    Raises:
        RunError: the history does not reach that far.
    """
    stored = new_moments(trained)
    known = entries(path)[:step] if path.exists() else []
    if len(known) < step:
        raise RunError(f"{path}: stored moments are rebuilt from the history, which holds {len(known)} of {step} steps")
    for entry in known:
        if not math.isnan(entry.g[0]):
            for item in trained:
                absorb(item, noise, moments, entry, stored)
    return stored


def header_of(trained: list[Trained], noise: Noise, moments: UpdateMoments, window: int | None, eps: float) -> dict[str, Any]:
    """Return what has to be the same for a replay, and a digest of the weights at step 0.

    Args:
        window: how many estimates a recomputed moment reaches back; None where moments are stored.
    """
    return {
        "seed": noise.seed,
        "rng": "cpu" if noise.cpu else trained[0].parameter.device.type,
        "torch": torch.__version__.split("+")[0],
        "eps": eps,
        "optimizer": moments.kind,
        "beta1": moments.beta1,
        "beta2": moments.beta2,
        "adam_eps": moments.eps,
        "weight_decay": moments.weight_decay,
        "window": window,
        "shapes": shapes_digest(trained),
        "decays": sorted(t.name for t in trained if t.decays),
        "lr_scale": {t.name: t.lr_scale for t in trained if t.lr_scale != 1.0},
        "start": values_digest(trained),
    }


@torch.no_grad()
def replay(model: nn.Module, path: Path | str, steps: int | None = None) -> int:
    """Make the updates of a history again, on the weights the run started from.

    Bit-equal to the live run where its perturbations were undone exactly (`perturb: layerwise`); in-place perturbation leaves
    a rounding drift that the history does not hold.

    Args:
        model: the model of step 0 with its stack attached; what requires gradients is what was trained.
        steps: stop after this many.

    Returns:
        Steps replayed.

    Raises:
        ModelError: other trained tensors, or other values at the start, than the run had.
        RunError: the noise would differ on this device or version of torch.
    """
    path = Path(path)
    header = read_history_header(path)
    decays, scale = set(header["decays"]), header["lr_scale"]
    trained = [
        Trained(name, p, name in decays, scale.get(name, 1.0)) for name, p in model.named_parameters() if p.requires_grad
    ]
    if not trained or shapes_digest(trained) != header["shapes"]:
        raise ModelError(f"{path}: this model does not train the tensors the run trained")
    if values_digest(trained) != header["start"]:
        raise ModelError(f"{path}: these are not the weights the run started from")
    noise = Noise(header["seed"], cpu=header["rng"] == "cpu" and trained[0].parameter.device.type != "cpu")
    _check_stream(path, header, trained[0].parameter.device.type)
    moments = UpdateMoments(header["optimizer"], header["beta1"], header["beta2"], header["adam_eps"], header["weight_decay"])
    stored = None if header["window"] is not None else new_moments(trained)
    window: list[StepEstimate] = []
    done = entries(path)[:steps]
    for entry in done:
        if not math.isnan(entry.g[0]):
            window = [*window, entry][-(header["window"] or 1) :]
            update(trained, noise, moments, window, stored)
    return len(done)


def _check_stream(path: Path, header: dict[str, Any], device: str) -> None:
    version = torch.__version__.split("+")[0]
    if header["torch"] != version:
        raise RunError(f"{path}: written with torch {header['torch']}; {version} may draw other noise")
    if header["rng"] not in (device, "cpu"):
        raise RunError(f"{path}: the noise was drawn on {header['rng']}; {device} draws other numbers (rng: cpu is portable)")
