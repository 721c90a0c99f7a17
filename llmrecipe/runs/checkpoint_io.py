"""Crash-safe checkpoints: a folder is written under a temporary name, synced to disk, then renamed; it contains no pickles.

    checkpoints/step-000200/
        delta.safetensors  optimizer.safetensors  ...   tensors
        optimizer.parts/  delta.parts/                  tensors that each process wrote its part of
        progress.json  ...                              everything else
        checksums.json                                  SHA-256 and size of each file, written last

A crash at any moment leaves either no new folder or a complete one. A folder whose checksums do not match is skipped, with a
warning, for the newest one that is intact.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmrecipe.core.errors import RunError
from llmrecipe.core.file_hashes import digest as file_digest
from llmrecipe.core.foreign import parse_json, reading, stored_count
from llmrecipe.runs.checksums import FILE as CHECKSUMS
from llmrecipe.runs.checksums import file_fault, read_checksums
from llmrecipe.runs.durable import ASIDE, REPLACED, clear_leftovers, delete, put_in_place, sync, sync_tree

NAME = re.compile(rf"^({re.escape(REPLACED)})?step-(\d+)$")
PARTS = ".parts"
"""Ending of a folder of tensors of which each process writes its own part."""
DIVIDED = "delta_parts"
"""Document with the dtype and the shape of each tensor in `delta.parts`."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers for an exhausted disk, quota or file size limit."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
"""torch dtype -> its name in a safetensors header."""

logger = logging.getLogger("llmrecipe")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint read back."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """File stem -> tensors, on the CPU."""
    documents: dict[str, Any]
    """File stem -> JSON value."""


def folder_name(step: int) -> str:
    """`step-000200`."""
    return f"step-{step:06d}"


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    write_parts: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path:
    """Write one checkpoint durably and return its folder. Only one process calls it.

    Args:
        root: the `checkpoints` folder of a run.
        tensors: file stem -> tensors by name, any dtype and shape.
        documents: file stem -> JSON value.
        write_parts: folder stem -> what writes files into the folder it is given, together with the other processes.

    Raises:
        RunError: the disk is full; the earlier checkpoints are untouched.
    """
    target, aside = root / folder_name(step), root / f"{ASIDE}{folder_name(step)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # The run's lock guarantees that no other process is writing here.
        clear_leftovers(root)
        aside.mkdir()
        sums = {f"{stem}.safetensors": _write(aside / f"{stem}.safetensors", _safetensors(t)) for stem, t in tensors.items()}
        sums |= {f"{stem}.json": _write(aside / f"{stem}.json", _json(value)) for stem, value in documents.items()}
        for stem, write in (write_parts or {}).items():
            folder = aside / f"{stem}{PARTS}"
            write(folder)
            sync_tree(folder)
            for path in sorted(folder.iterdir()):
                sums[f"{folder.name}/{path.name}"] = {"sha256": file_digest(path, "hashing"), "bytes": path.stat().st_size}
        _write(aside / CHECKSUMS, _json({"step": step, "files": sums}))
        sync(aside)
        put_in_place(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno not in FULL:
            raise
        raise RunError(_disk_full(root, step, error)) from error
    return target


def _disk_full(root: Path, step: int, error: OSError) -> str:
    good = _candidates(root)
    kept = f"the last good checkpoint is {good[0][1]}" if good else "there is no earlier checkpoint"
    free = shutil.disk_usage(root).free // 2**20 if root.exists() else 0
    return (
        f"cannot write the checkpoint of step {step} to {root}: {error.strerror or error} ({free} MB free); {kept}. "
        f"Free some space (or lower save.keep) and continue with resume={root.parent}"
    )


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the pieces of a safetensors file, one tensor in memory at a time."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # Data starts at a multiple of 8, as readers that map the file into memory require.
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def _json(value: object) -> Iterator[bytes]:
    yield (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _write(path: Path, pieces: Iterator[bytes | memoryview] | Iterator[bytes]) -> dict[str, Any]:
    """Write and sync one file; its checksum is computed from the content in memory."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None when every file exists and matches its checksum."""
    try:
        listed = read_checksums(path)
        step = parse_json((path / CHECKSUMS).read_bytes()).get("step")
    except (OSError, ValueError) as error:
        return f"its {CHECKSUMS} cannot be read ({type(error).__name__})"
    match = NAME.match(path.name)
    if match is not None and step != int(match[2]):
        return f"it is the checkpoint of step {step}"
    return next((wrong for name, wanted in listed.items() if (wrong := file_fault(path / name, wanted)) is not None), None)


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder), newest first; of two folders of one step the one with the final name first."""
    found = [(int(m[2]), bool(m[1]), p) for p in (root.iterdir() if root.is_dir() else ()) if (m := NAME.match(p.name))]
    return [(step, path) for step, _, path in sorted(found, key=lambda f: (-f[0], f[1]))]


def steps(root: Path) -> list[int]:
    """Return the steps that have a checkpoint, oldest first; not verified."""
    return sorted({step for step, _ in _candidates(root)})


def checkpoint_of(root: Path, step: int) -> Path | None:
    """Return the intact checkpoint of one step, or None."""
    return next((path for at, path in _candidates(root) if at == step and fault(path) is None), None)


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest intact checkpoint, or None when there is no checkpoint; broken ones are skipped with a warning.

    Raises:
        RunError: there are checkpoints and none is intact.
    """
    faults = []
    for _, path in _candidates(root):
        wrong = fault(path)
        if wrong is None:
            return path
        faults.append(f"{path.name}: {wrong}")
        logger.warning("%s is not usable: %s; trying the one before it", path, wrong)
    if faults:
        raise RunError(f"no checkpoint in {root} is intact ({'; '.join(faults)}); start the recipe again without resume")
    return None


def read_checkpoint(path: Path) -> SavedCheckpoint:
    """Read a checkpoint after checking every file against its checksum.

    Raises:
        RunError: it is not a checkpoint, or a file is missing, cut short or changed.
    """
    match = NAME.match(path.name)
    if match is None or not path.is_dir():
        raise RunError(f"{path} is not a checkpoint folder (expected a name such as {folder_name(200)})")
    wrong = fault(path)
    if wrong is not None:
        raise RunError(f"the checkpoint {path} cannot be used: {wrong}")
    files = read_checksums(path)
    with reading(f"the checkpoint {path} cannot be used"):
        tensors = {Path(f).stem: load_file(path / f) for f in files if f.endswith(".safetensors") and "/" not in f}
        documents = {Path(f).stem: parse_json((path / f).read_bytes()) for f in files if f.endswith(".json")}
        if DIVIDED in documents:
            tensors["delta"] |= _joined(path / f"delta{PARTS}", documents[DIVIDED])
    return SavedCheckpoint(path, int(match[2]), tensors, documents)


def _joined(folder: Path, layout: Mapping[str, tuple[str, list[int]]]) -> dict[str, Tensor]:
    """Return the whole tensors whose parts the processes wrote, by name.

    Raises:
        ValueError: the layout names a length that is none, or more than the parts hold.
        KeyError: it names another dtype than a checkpoint has.
    """
    from llmrecipe.runtime.sharding import read_parts  # noqa: PLC0415 (seconds of imports that few checkpoints need)

    kinds = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    sizes = {name: math.prod(stored_count(n, f"a length of {name}") for n in shape) for name, (_, shape) in layout.items()}
    promised = sum(sizes[name] * kinds[dtype].itemsize for name, (dtype, _) in layout.items())
    held = sum(path.stat().st_size for path in folder.iterdir())
    if promised > held:
        raise ValueError(f"{DIVIDED}.json names tensors of {promised:,} bytes, and {folder.name} holds {held:,}")
    found = {name: torch.empty(shape, dtype=kinds[dtype]) for name, (dtype, shape) in layout.items()}
    read_parts(folder, found)
    return found


def read_document(path: Path, stem: str) -> dict[str, Any]:
    """Return one JSON document of an intact checkpoint."""
    found: dict[str, Any] = parse_json((path / f"{stem}.json").read_bytes())
    return found


def rotate(root: Path, keep: int, best: int | None = None) -> list[int]:
    """Delete all but the `keep` newest checkpoints and the best one; return the deleted steps."""
    known = steps(root)
    return keep_only(root, {*known[-keep:], best})


def keep_only(root: Path, wanted: Container[int | None]) -> list[int]:
    """Delete the checkpoints of all other steps; return the deleted steps."""
    gone = [step for step in steps(root) if step not in wanted]
    for step in gone:
        delete(root / folder_name(step))
    return gone


def best_after_end(root: Path) -> int | None:
    """Return the step whose weights a run that continues from its end would return to, where they are not those of the end."""
    for step, path in _candidates(root)[:1]:
        with contextlib.suppress(OSError, ValueError, KeyError):
            judge = read_document(path, "judge")
            if read_document(path, "events")["end"] and judge["best"] is not None and judge["best_step"] != step:
                return int(judge["best_step"])
    return None


def saved_structures(folder: Path) -> dict[str, Any] | None:
    """Return the structures of the newest intact checkpoint, which the stack needs before its tensors can be restored."""
    path = latest_checkpoint(folder / "checkpoints")
    if path is None:
        return None
    with reading(f"the checkpoint {path} cannot be used"):
        found: dict[str, Any] = read_checkpoint(path).documents["structures"]
        if not isinstance(found, dict):
            raise ValueError("its structures are not those of wrappers")
    return found
