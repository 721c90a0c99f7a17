"""Deltas: writing and reading what training changed.

A finished adapter run is self-contained: `final/stack.yaml` names the base model, its fingerprint and a list of layers, oldest
first; each layer is a stack (wrappers, structures) with its tensors in a safetensors file. The last layer is the run's own,
those before it belong to the runs it continues, so a sequence such as sft -> dpo -> ppo needs no merge and no other folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, RunError
from llmrecipe.core.foreign import reading
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._base.stack import Stack, kind_name
from llmrecipe.models import stored_heads, task_heads
from llmrecipe.models.checkpoint_path import DELTA_FILE, STACK_FILE
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.hooks.shared_module import owner_of_name, shared_modules, shared_name
from llmrecipe.models.sharded import whole
from llmrecipe.models.stored_tensors import within_file
from llmrecipe.recipe.yaml_file import load_bounded
from llmrecipe.runs.checksums import verify

SAMPLE = 4096


@dataclass
class Layer:
    """One stack and the tensors it learned."""

    wrappers: dict[str, dict[str, Any]]
    """name -> {kind, options}."""
    structures: dict[str, dict[str, Any]] = field(default_factory=dict)
    file: str = DELTA_FILE
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    source: str = field(default="a stored stack", compare=False)
    """What it was read from, for messages."""


@dataclass
class SavedStack:
    """The content of a `stack.yaml`."""

    base: dict[str, Any]
    """path, fingerprint, and the model section that loads it."""
    layers: list[Layer]
    head: str = "causal"
    labels: list[str] | None = None
    objective: str = ""


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the base weights: name, shape, dtype and a strided sample of bytes of every base parameter."""
    digest = hashlib.sha256()
    added = {id(p) for _, _, _, hook in all_hooks(model) for p in hook.parameters()}
    added |= {id(p) for _, shared in shared_modules(model) for p in shared.parameters()}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if id(parameter) in added or name.split(".")[0].endswith(task_heads.ATTRIBUTE):
            continue
        flat = whole(parameter.detach()).reshape(-1)
        stride = max(1, flat.numel() // SAMPLE)
        data = flat[::stride].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}".encode())
        digest.update(data)
    return digest.hexdigest()[:32]


def wrapper_mapping(wrapper: Wrapper) -> dict[str, Any]:
    """Return the `{kind, options}` mapping that builds the same wrapper again."""
    values = {f.name: vars(wrapper)[f.name] for f in dataclasses.fields(wrapper) if f.name not in ("name", "role")}
    return {"kind": kind_name(wrapper), **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def build_wrapper(name: str, mapping: Mapping[str, Any], source: str = "") -> Wrapper:
    """Build a wrapper from its mapping.

    Args:
        source: the file that stores it, for messages.

    Raises:
        RunError: it names no method, or an option has no value of the method.
    """
    at = f"{source}{': ' if source else ''}stack.{name}"
    with reading(at):
        options = {k: v for k, v in mapping.items() if k != "kind"}
        return registry.load_class("stack", str(mapping["kind"]), at)(name=name, **options)


def write_stack(folder: Path, saved: SavedStack) -> None:
    """Write `stack.yaml` and one safetensors file per layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer in saved.layers:
        save_file({k: v.detach().contiguous().cpu().clone() for k, v in layer.tensors.items()}, str(folder / layer.file))
    content = {
        "format": 1,
        "base": saved.base,
        "head": saved.head,
        "labels": saved.labels,
        "objective": saved.objective,
        "layers": [{"wrappers": x.wrappers, "structures": x.structures, "file": x.file} for x in saved.layers],
    }
    (folder / STACK_FILE).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_stack(folder: Path, tensors: bool = True) -> SavedStack:
    """Read what `write_stack` wrote.

    Args:
        tensors: False leaves the layers' tensors out.

    Raises:
        RunError: a file is missing, unreadable or not what was written.
    """
    verify(folder, lambda name: name == STACK_FILE)
    with reading(f"{folder}: not a finished adapter run: {STACK_FILE}"):
        content = load_bounded((folder / STACK_FILE).read_text(encoding="utf-8"))
        base, listed = dict(content["base"]), [dict(layer) for layer in content["layers"]]
        base["section"] = dict(base.get("section") or {})
        parts = [(_mappings(x["wrappers"]), _mappings(x["structures"]), str(x["file"])) for x in listed]
        head, labels = str(content.get("head", "causal")), content.get("labels")
        labels = None if labels is None else [str(label) for label in list(labels)]
    for _, _, name in parts:
        if Path(name).name != name or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{folder / STACK_FILE}: the layer '{name}' is outside of its folder; only files in it are read")
    files = [name for _, _, name in parts] if tensors else []
    verify(folder, lambda name: name in files)
    layers = []
    for wrappers, structures, name in parts:
        with reading(f"{folder / name}: a tensor file is missing or damaged"):
            found = load_file(str(folder / name)) if tensors else {}
            layers.append(Layer(wrappers, structures, name, found, str(folder / STACK_FILE)))
    return SavedStack(base, layers, head, labels, str(content.get("objective", "")))


def _mappings(value: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(name): dict(inner) for name, inner in dict(value).items()}


def mount_layer(model: nn.Module, layer: Layer, index: int) -> list[Wrapper]:
    """Mount a saved layer below any further stack: attached, restored, frozen, part of the reference.

    Returns:
        The mounted wrappers, renamed `mounted<index>_<name>` so that a new stack may use the same names.

    Raises:
        RunError: the model has no place for it.
    """
    with reading(f"{layer.source}: this stack cannot be put on the model"):
        return _mount(model, layer, index)


def _mount(model: nn.Module, layer: Layer, index: int) -> list[Wrapper]:
    names = {name: f"mounted{index}_{name}" for name in layer.wrappers}
    wrappers = [
        w
        for name, mapping in layer.wrappers.items()
        if (w := build_wrapper(name, mapping, layer.source)).stage in (Stage.INJECT, Stage.SELECT)
    ]
    renamed = [replace(w, name=names[w.name]) for w in wrappers]
    stored_heads.mount_heads(model, layer.tensors)
    stack = Stack(renamed)
    with within_file(model, layer.tensors):
        stack.attach(model, {names[n]: s for n, s in layer.structures.items() if n in names})
    stack.restore(model, {rename_tensor(name, names): value for name, value in stored_heads.split(layer.tensors)[0].items()})
    freeze(model, stack)
    return stack.wrappers


def unmounted(name: str) -> str:
    """Return the name that a wrapper has in its recipe.

    Examples:
        >>> unmounted("mounted0_lora"), unmounted("lora")
        ('lora', 'lora')
    """
    return re.sub(r"^mounted\d+_", "", name)


def without_injected(saved: SavedStack) -> SavedStack:
    """Return the same base with its quantization, without anything that was trained on it."""
    layers = []
    for layer in saved.layers:
        bases = {n: m for n, m in layer.wrappers.items() if build_wrapper(n, m).stage is Stage.BASE}
        layers.append(Layer(bases))
    return replace(saved, layers=layers)


def adjust(layer: Layer, options: Mapping[str, Mapping[str, Any]]) -> Layer:
    """Return the layer with changed values of options that may vary on a finished run, such as the rank of DyLoRA.

    Raises:
        RunError: an option is fixed by what was trained.
    """
    wrappers = dict(layer.wrappers)
    for name, wanted in options.items():
        if name not in wrappers:
            continue
        allowed = registry.load_class("stack", wrappers[name]["kind"]).adjustable
        for option, value in wanted.items():
            if option not in allowed and wrappers[name].get(option) != value:
                free = f"; free to choose: {', '.join(allowed)}" if allowed else ""
                raise RunError(f"stack.{name}.{option}: fixed by the training of this run{free}")
        wrappers[name] = {**wrappers[name], **wanted}
    return replace(layer, wrappers=wrappers)


def freeze(model: nn.Module, stack: Stack) -> None:
    """Freeze a mounted stack; its hooks serve every role, the reference included."""
    for wrapper in stack:
        for _, _, _, hook in all_hooks(model, wrapper.name):
            hook.mounted = True
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def rename_tensor(name: str, names: Mapping[str, str]) -> str:
    """Return a tensor name with the wrapper's name replaced."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        stem, separator, rest = part.partition("__")
        if stem in names:
            parts[i] = names[stem] + separator + rest
        elif (owner := owner_of_name(part)) is not None and owner in names:
            parts[i] = shared_name(names[owner])
    return ".".join(parts)


def differs(model: nn.Module, saved: SavedStack) -> bool:
    """Return whether the base in memory is not, to the bit, the one a saved stack was trained on."""
    wanted = saved.base.get("fingerprint")
    return bool(wanted) and wanted != fingerprint(model)


def check_base(model: nn.Module, saved: SavedStack, where: str, dtype: str = "auto") -> None:
    """Refuse to mount a delta on another base.

    Args:
        dtype: the requested one; rounded weights are another base.

    Raises:
        ModelError: the fingerprints differ; both are shown, or the dtype that made the difference.
    """
    wanted = saved.base.get("fingerprint")
    got = fingerprint(model)
    if wanted and wanted != got:
        trained = saved.base.get("section", {}).get("dtype", "auto")
        if dtype != trained:
            raise ModelError(
                f"model.dtype={dtype}: {where} was trained on its base in dtype {trained}, and rounded weights are another "
                "base; leave model.dtype out, or export the run with --to merged and load that in any dtype"
            )
        raise ModelError(
            f"{where} was trained on another base model: it expects fingerprint {wanted}, {saved.base.get('path')} has {got}"
        )
