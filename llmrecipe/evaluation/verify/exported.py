"""An exported folder and the run it was made from, tensor by tensor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmrecipe.core.errors import ProofError, RunError
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.core.lazy import is_installed, load_module
from llmrecipe.evaluation.verify.golden_prompt import compare_golden
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable
from llmrecipe.interop.export_options import GGUF_FILE, OPTIONS_FILE, ExportOptions
from llmrecipe.interop.export_run import export_run
from llmrecipe.interop.golden import GOLDEN_FILE, Golden
from llmrecipe.models.checkpoint_path import is_adapter, run_folder

ROUNDING = {"F64": 1e-6, "F32": 1e-6, "BF16": 2.0**-7, "F16": 2.0**-9}
"""Dtype in a safetensors file -> largest difference of a value that passes, as a share of it (see `value_difference`)."""
FLOOR = 1e-6
"""Difference that passes whatever the value, as a share of the tensor's largest value: the rounding of a float32 sum."""
PIPELINE = ("modules.json", "1_Pooling/config.json", "2_Dense/config.json")
"""Files of a sentence-transformers folder that say how the states of a text become a vector."""


def is_export(subject: str) -> bool:
    """Return whether a path is a folder that `export` writes: an adapter, a GGUF file, an encoder, or a model."""
    folder = Path(subject)
    if run_folder(subject) is not None:
        return False
    known = ((folder / name).is_file() for name in (OPTIONS_FILE, GOLDEN_FILE, PIPELINE[0]))
    written = is_adapter(subject) or (folder / GGUF_FILE).is_file()
    return written or ((folder / "config.json").is_file() and any(known))


def compare_export(folder: Path, run: str | None, words: list[str]) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """Yield what is compared of an exported folder, by name: with a new export of its run, and with its golden prompt.

    A folder that keeps its golden prompt needs no run.

    Raises:
        RunError: there is neither a run nor a golden prompt; or words were given, for which an export has no place.
    """
    if words:
        raise RunError(f"'{words[0]}': an exported folder is compared as it is; no overrides count here")
    source, keeps = run or str(folder.resolve().parent), (folder / GOLDEN_FILE).is_file()
    if run is not None or run_folder(source) is not None or not keeps:
        yield from compare_with_run(folder, source)
    else:
        yield "exported_tensors", lambda: _without_run(folder)
    if keeps:
        yield "golden_prompt", lambda: compare_golden(folder)


def _without_run(folder: Path) -> Measured:
    raise NotApplicable(f"{folder.resolve().parent} is not the run it was made from; name it to compare the tensors: --run RUN")


def compare_with_run(folder: Path, source: str) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """Yield what is compared of an exported folder with a new export of its run, by name.

    Raises:
        RunError: what is given is no run.
    """
    if run_folder(source) is None:
        raise RunError(f"{folder} is an exported folder, and {source} is not the run it was made from; name it: --run RUN")
    aside = Path(tempfile.mkdtemp(prefix="llmrecipe-verify-"))
    try:
        export_again(folder, source, aside / "again")
        yield "exported_tensors", lambda: compare_tensors(aside / "again", folder)
        yield "exported_template", lambda: compare_template(aside / "again", folder)
        if (folder / PIPELINE[0]).is_file():
            yield "exported_pooling", lambda: compare_pipeline(aside / "again", folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_again(folder: Path, run: str, out: Path) -> None:
    """Export a run with the options that a folder keeps; without them, in its format and dtype."""
    if (folder / OPTIONS_FILE).is_file():
        options = ExportOptions.read(folder)
    elif (folder / GGUF_FILE).is_file():
        options = ExportOptions("gguf")
    elif is_adapter(str(folder)):
        config = read_json(folder / "adapter_config.json")
        options = ExportOptions("peft" if "peft_type" in config else "adapter_hub")
    else:
        kind = read_json(folder / "config.json").get("dtype") or "auto"
        to = "sentence_transformers" if (folder / PIPELINE[0]).is_file() else "merged"
        options = ExportOptions(to, str(kind).removeprefix("torch."))
    export_run(run, options, out)


def compare_tensors(wanted: Path, found: Path) -> Measured:
    """Compare the tensors of two folders, value by value.

    Raises:
        ProofError: one holds other tensors, or other shapes.
    """
    ours, theirs = dict(tensors_in(wanted)), dict(tensors_in(found))
    text = f"{len(ours)} tensors of the folder = those its run exports"
    if other := sorted(set(ours) ^ set(theirs)):
        side = "the folder lacks" if other[0] in ours else "only the folder has"
        raise ProofError(f"{text}: {side} {other[0]} ({len(other)} names differ); was it exported with other options?")
    worst, culprit, limit = 0.0, "", min(ROUNDING.values())
    for name, (value, kind) in ours.items():
        other_value = theirs[name][0]
        if value.shape != other_value.shape:
            raise ProofError(f"{text}: {name} is {tuple(other_value.shape)} in the folder and {tuple(value.shape)} in its run")
        bound = ROUNDING.get(kind, 0.0)
        share = value_difference(value, other_value, bound)
        if not share <= bound and not share <= worst:
            worst, culprit, limit = share, name, bound
    return Measured(text, worst, limit, culprit)


def value_difference(wanted: Tensor, found: Tensor, rounding: float) -> float:
    """Return max_i |w_i - f_i| / (|w_i| + FLOOR / rounding max_j |w_j|), so that at most `rounding` is what rounding explains.

    A value is compared with itself: that it is small next to the largest of its tensor excuses no other value.
    """
    if not wanted.numel():
        return 0.0
    ours, theirs = wanted.double(), found.double()
    if rounding == 0.0:
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    scale = ours.abs() + FLOOR / rounding * ours.abs().max()
    differences = (ours - theirs).abs()
    # Where all is zero nothing may differ; 0 / 0 is no difference.
    return float(torch.where(differences == 0, 0.0, differences / scale).max())


def tensors_in(folder: Path) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    """Yield (name, (tensor, dtype in the file)) of every safetensors file and of the GGUF file of a folder."""
    if (folder / GGUF_FILE).is_file():
        yield from _tensors_in_gguf(folder / GGUF_FILE)
    for path in sorted(folder.rglob("*.safetensors")):
        inside = path.parent.relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        with reading(str(path), "export the run again"), safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield f"{prefix}{name}", (file.get_tensor(name), str(file.get_slice(name).get_dtype()))


def _tensors_in_gguf(path: Path) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    """Yield the tensors of a GGUF file as float32.

    Raises:
        RunError: the library that reads it is missing, or the file is damaged.
    """
    if not is_installed("gguf"):
        raise RunError(f"{path}: needs gguf to be read: pip install 'llmrecipe[gguf]'")
    gguf: Any = load_module("gguf")
    with reading(str(path), "export the run again"):
        for tensor in gguf.GGUFReader(path).tensors:
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            yield tensor.name, (values, tensor.tensor_type.name)


def compare_template(wanted: Path, found: Path) -> Measured:
    """Compare chat template and token ids of the golden prompt.

    Raises:
        ProofError: they differ.
    """
    text = "prompt and chat template of the folder = those of its run"
    ours, theirs = (Golden.read(f).prompt_ids if (f / GOLDEN_FILE).is_file() else None for f in (wanted, found))
    if None not in (ours, theirs) and ours != theirs:
        raise ProofError(f"{text}: prompt_ids is {theirs} in the folder and {ours} in its run")
    templates = [t.read_text(encoding="utf-8") if (t := f / "chat_template.jinja").is_file() else "" for f in (wanted, found)]
    if templates[0] != templates[1]:
        raise ProofError(f"{text}: the folder's chat template is not the one of its run")
    return Measured(text, 0.0, 0.0)


def compare_pipeline(wanted: Path, found: Path) -> Measured:
    """Compare how two encoders make a vector of the states of a text.

    Raises:
        ProofError: they differ.
    """
    text = "pooling of the folder = that of its run"
    for name in PIPELINE:
        ours, theirs = ((f / name).read_text(encoding="utf-8") if (f / name).is_file() else "" for f in (wanted, found))
        if ours != theirs:
            raise ProofError(f"{text}: {name} is not what the run exports")
    return Measured(text, 0.0, 0.0)
