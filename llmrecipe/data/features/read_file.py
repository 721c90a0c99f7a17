"""Reading one file of features: a picture, or an array of vectors (audio frames, video clips, regions of a picture).

A damaged file, one that would need more memory than allowed, and one of another kind are errors that name the row and the file.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrecipe.core.errors import DataError
from llmrecipe.core.foreign import reason_of

if TYPE_CHECKING:
    from PIL import Image

ARRAYS = (".npy", ".npz", ".safetensors")
"""Endings of files of vectors; every other file is read as a picture."""
NAME, BOXES = "features", "boxes"
"""Arrays of a file: (m, d) vectors; (m, 4) corners x1, y1, x2, y2 of the regions they describe, as shares of the picture."""
GEOMETRY = 7
"""Numbers that a box adds to its vector: x1, y1, x2, y2, width, height, area (UNITER, arXiv 1909.11740)."""


@dataclass(frozen=True)
class FeatureReader:
    """How the files that rows name become arrays."""

    prepare: Callable[[Image.Image], np.ndarray]
    """Picture -> (C, H, W) float32: a model's image processor."""
    fingerprint: str
    """Changes with everything `prepare` depends on."""
    slots: Callable[[tuple[int, ...]], int]
    """Shape of an array -> places of a model's input it takes."""
    save: Callable[[Path], None]
    """Write what other programs need to prepare pictures alike into a folder."""
    mode: str = "RGB"
    """Pillow's name of the colours pictures are converted to; L is grey."""
    max_pixels: int = 1 << 26
    """Most pixels of a picture (`data.max_pixels`)."""
    max_unpacked: int = 1 << 30
    """Most bytes of an array (`data.max_unpacked`)."""

    def read(self, path: Path, where: str) -> np.ndarray:
        """Return the float32 array of a file: (C, H, W) of a picture, (m, d) of vectors.

        Args:
            where: place of the row that names it, for messages.

        Raises:
            DataError: the file is missing, damaged, too large, or of another kind.
        """
        if not path.is_file():
            raise DataError(f"{where}: the file {path} does not exist; put it there, or take the row out")
        if path.suffix.lower() in ARRAYS:
            return self._vectors(path, where)
        return np.ascontiguousarray(self.prepare(self._picture(path, where)), dtype=np.float32)

    def _picture(self, path: Path, where: str) -> Image.Image:
        from PIL import Image, ImageOps

        try:
            Image.init()
            # EPS is a program that another program would have to run.
            known = [name for name in Image.OPEN if name != "EPS"]
            # The size is in the header, which is read before any pixel is unpacked.
            with Image.open(path, formats=known) as opened:
                pixels = opened.width * opened.height
                if pixels > self.max_pixels:
                    raise DataError(
                        f"{where}: {path} is a picture of {opened.width} x {opened.height} pixels, more than data.max_pixels="
                        f"{self.max_pixels}; make it smaller, or allow it"
                    )
                opened.load()
                return ImageOps.exif_transpose(opened).convert(self.mode)
        except DataError:
            raise
        except Exception as error:  # each of Pillow's readers raises its own classes for a damaged file
            raise DataError(
                f"{where}: {path} is damaged or no picture ({reason_of(error)}); replace it, or take the row out. "
                f"Files of vectors end in {', '.join(ARRAYS)}"
            ) from error

    def _vectors(self, path: Path, where: str) -> np.ndarray:
        try:
            found = self._arrays(path, where)
        except DataError:
            raise
        except Exception as error:  # a shape that no memory holds among them, and types that NumPy does not have
            why = reason_of(error)
            raise DataError(f"{where}: {path} is damaged or no file of arrays ({why}); write it again") from error
        values = found.get(NAME) if NAME in found else next(iter(found.values()), None) if len(found) == 1 else None
        if values is None:
            raise DataError(f"{where}: {path} has the arrays {', '.join(found) or 'none'}; name the vectors '{NAME}'")
        if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
            raise DataError(
                f"{where}: {path} holds an array of shape {tuple(values.shape)} and type {values.dtype}; features are numbers "
                "of shape (vectors, width)"
            )
        values = values.astype(np.float32)
        if BOXES in found:
            values = np.concatenate([values, self._geometry(found[BOXES], len(values), path, where)], 1)
        if not np.isfinite(values).all():
            raise DataError(f"{where}: {path} holds values that are not finite")
        return np.ascontiguousarray(values)

    def _geometry(self, boxes: np.ndarray, count: int, path: Path, where: str) -> np.ndarray:
        if boxes.shape != (count, 4) or not np.isfinite(boxes).all() or (boxes < 0).any() or (boxes > 1).any():
            raise DataError(
                f"{where}: {path}: '{BOXES}' must be ({count}, 4) numbers from 0 to 1, the corners x1, y1, x2, y2 of each "
                "region as shares of the picture"
            )
        corners = boxes.astype(np.float32)
        width, height = corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1]
        return np.concatenate([corners, np.stack([width, height, width * height], 1)], 1)

    def _arrays(self, path: Path, where: str) -> dict[str, np.ndarray]:
        """Return the arrays of a file by name; code that a file may carry (pickle) is never run."""
        suffix = path.suffix.lower()
        if suffix == ".safetensors":
            from safetensors.numpy import load_file

            self._check_size(path.stat().st_size, path, where)
            found: dict[str, np.ndarray] = load_file(str(path))
            return found
        if suffix == ".npy":
            mapped: Any = np.load(path, mmap_mode="r", allow_pickle=False)
            self._check_size(mapped.nbytes, path, where)
            return {NAME: np.array(mapped)}
        with zipfile.ZipFile(path) as packed:
            self._check_size(sum(entry.file_size for entry in packed.infolist()), path, where)
        with np.load(path, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}

    def _check_size(self, size: int, path: Path, where: str) -> None:
        if size > self.max_unpacked:
            raise DataError(
                f"{where}: {path} has {size:,} bytes once unpacked, more than data.max_unpacked={self.max_unpacked}; "
                "make it smaller, or allow it"
            )
