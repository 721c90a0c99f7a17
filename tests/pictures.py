"""Pictures and feature files of tests: written into folders, or held by rows without a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 8


@dataclass(frozen=True)
class Held:
    """Features of a row that no file holds."""

    array: np.ndarray
    slots: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def key(self) -> str:
        return self.array.tobytes().hex()[:64]

    def load(self) -> np.ndarray:
        return self.array.copy()


def held_picture(row: int, side: int = SIDE, patch: int = 4) -> Held:
    """A seeded picture of three colours, already prepared; with the class token of a vision model."""
    array = np.random.default_rng(row).normal(size=(3, side, side)).astype(np.float32)
    return Held(array, 1 + (side // patch) ** 2)


def held_vectors(row: int, count: int, width: int) -> Held:
    """Seeded vectors."""
    return Held(np.random.default_rng(row).normal(size=(count, width)).astype(np.float32), count)


def save_picture(path: Path, seed: int, side: int = SIDE, mode: str = "RGB") -> Path:
    """Write a seeded picture."""
    from PIL import Image

    shape = (side, side) if mode == "L" else (side, side, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return path


def save_rows(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
