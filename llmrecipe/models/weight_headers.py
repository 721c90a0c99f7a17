"""Headers of safetensors files: names, shapes and dtypes of a checkpoint's tensors, without reading a weight."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.foreign import parse_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_BYTES = 100 * 2**20
"""Largest header that is read; the format itself allows no larger one."""
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor."""

    dtype: str
    """As the format spells it: F32, BF16, I64, ..."""
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of one safetensors file: tensor name -> dtype, shape and offsets.

    Raises:
        ValueError: the file is cut off or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size, MOST_BYTES):
            raise ValueError("the header is cut off")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a table of tensors")
    header.pop("__metadata__", None)
    return header


def headers(folder: Path) -> dict[str, Header]:
    """Return what the safetensors files of a model folder say of every tensor; empty where there are none.

    Raises:
        ValueError, KeyError, TypeError: a file is damaged.
    """
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        shards = set(parse_json((folder / INDEX).read_bytes())["weight_map"].values())
        files = [folder / name for name in sorted(shards) if (folder / name).is_file()]
    else:
        return {}
    entries = {name: entry for file in files for name, entry in read_header(file).items()}
    return {name: Header(str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in entries.items()}


def stored_parameters(folder: Path) -> int | None:
    """Return how many entries the floating-point tensors of a model folder have; None where its files do not say it."""
    try:
        floats = [header.count for header in headers(folder).values() if header.dtype in DTYPES]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(floats) or None


def stored_dtype(config: PreTrainedConfig, folder: Path | None) -> torch.dtype | None:
    """Return the dtype a checkpoint is stored in: what its config says, else that of most of its entries; None if unknown."""
    import torch

    own = getattr(config, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    sizes: Counter[str] = Counter()
    for header in headers(folder).values() if folder is not None else ():
        if header.dtype in DTYPES:
            sizes[header.dtype] += header.count
    return getattr(torch, DTYPES[sizes.most_common(1)[0][0]]) if sizes else None
