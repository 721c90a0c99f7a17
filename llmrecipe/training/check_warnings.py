"""What `check` warns of: ranks above their matrix, memory above the machine's, weights that do not fit the model."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from llmrecipe.core.device_profile import machine_bytes
from llmrecipe.methods._engines.quantized import quantized
from llmrecipe.models.checkpoint_path import locate
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.hooks.shared_module import shared_modules
from llmrecipe.models.load import LEGACY, backbone_names
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.resolve_class import NEW_HEADS
from llmrecipe.models.task_heads import ATTRIBUTE
from llmrecipe.models.vocabulary import input_embedding
from llmrecipe.models.weight_headers import headers
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.runs.open_model import resolve_section

SHOWN = 3
"""Names in a warning."""


def rank_warnings(model: nn.Module) -> Iterator[str]:
    """Yield a warning for each method with a low-rank branch whose rank is above the smaller side of its matrix."""
    found: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for path, _, _, hook in all_hooks(model):
        A, B = getattr(hook, "A", None), getattr(hook, "B", None)
        if isinstance(A, Tensor) and isinstance(B, Tensor) and A.dim() == B.dim() == 2:
            rank, smaller = A.shape[0], min(A.shape[1], B.shape[0])
            if rank > smaller:
                found[hook.owner].append((path, rank, smaller))
    for owner, sites in found.items():
        path, rank, smaller = max(sites, key=lambda site: site[1] - site[2])
        yield (
            f"stack.{owner}: rank {rank} at {len(sites)} site{'s' if len(sites) > 1 else ''} is more than the smaller side of "
            f"the matrix, {smaller} at {path}: rank {smaller} reaches every change there is"
        )


def device_memory(device: str) -> int | None:
    """Return the memory of the device, for a CPU that of the machine or of the container it is in; None where unknown."""
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return machine_bytes() if device == "cpu" else None


def memory_warnings(total: int, device: str) -> Iterator[str]:
    """Yield a warning where the estimate is above the memory of the machine."""
    there = device_memory(device)
    if there is not None and total > there:
        yield (
            f"memory: the estimate of {total / 2**30:.1f} GB is more than the {there / 2**30:.1f} GB of this "
            f"{'machine' if device == 'cpu' else 'GPU'}; smaller batch.tokens, model.gradient_checkpointing=true or offload, a "
            "stack with a frozen base (lora) or nf4 need less"
        )


def weight_warnings(section: ModelSection, model: nn.Module, rows_head: str) -> Iterator[str]:
    """Yield what the headers of a checkpoint say of tensors with other shapes, or of tensors that are missing.

    Only folders of safetensors are looked at. A checkpoint that also holds names this model does not have is converted while it
    is loaded, so that missing names prove nothing.

    Args:
        model: on the meta device, hooks or not.
    """
    base, _, _ = resolve_section(section, tensors=False)
    if base.init == "random":
        return
    place, local = locate(base.path)
    stored = {name: header.shape for name, header in headers(Path(place)).items()} if local else {}
    if not stored:
        return
    wanted, whole = base_shapes(model), pretrained(model)
    prefix = f"{whole.base_model_prefix}."
    renamed = backbone_names(type(whole), whole.config)
    stored = {_own_name(name, wanted, prefix, renamed): shape for name, shape in stored.items()}
    ends = (input_embedding(whole), whole.get_output_embeddings())
    vocabulary = {id(m.weight) for m in ends if m is not None and hasattr(m, "weight")}
    skipped = {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in vocabulary}

    def allowed(name: str) -> bool:
        head = rows_head in NEW_HEADS and (not name.startswith(prefix) or ".pooler." in name)
        return head or any(fnmatch.fnmatchcase(name, pattern) for pattern in (*LEGACY, *section.allow_mismatch))

    packed = {f"{path}.weight" for path, _ in quantized(model)}  # a checkpoint has it whole, and either way up

    def fits(name: str) -> bool:
        return stored[name] == wanted[name] or (name in packed and stored[name] == wanted[name][::-1])

    other = [n for n in stored if n in wanted and not fits(n) and n not in skipped and not allowed(n)]
    if other:
        name = other[0]
        yield (
            f"model.path: {len(other)} tensors of {base.path} have another shape than this model: {_listed(other)} "
            f"({name} is {stored[name]}, the model needs {wanted[name]}); loading will stop"
        )
    if stored.keys() - wanted.keys():
        return
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [n for n in wanted if n not in stored and n not in tied and not allowed(n)]
    if missing:
        yield f"model.path: {base.path} lacks {len(missing)} tensors of this model: {_listed(missing)}; loading will stop"


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what a checkpoint of the model holds, without hooks, shared modules and scalar heads."""
    added = {id(t) for _, _, _, hook in all_hooks(model) for t in (*hook.parameters(), *hook.buffers())}
    added |= {id(t) for _, shared in shared_modules(model) for t in (*shared.parameters(), *shared.buffers())}
    state = model.state_dict(keep_vars=True)
    shapes = {n: tuple(t.shape) for n, t in state.items() if id(t) not in added and not n.startswith(f"{ATTRIBUTE}.")}
    for path, layer in quantized(model):
        shapes[f"{path}.weight"] = (int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]
    return shapes


def _own_name(name: str, wanted: dict[str, tuple[int, ...]], prefix: str, renamed: dict[str, str]) -> str:
    """Return a stored name as the model spells it: checkpoints of a backbone lack its prefix, or have one too many.

    Args:
        renamed: name of the backbone in checkpoints -> its name in the model, where they differ.
    """
    if name in wanted:
        return name
    first, _, rest = name.partition(".")
    if first in renamed:
        return f"{renamed[first]}.{rest}"
    return next((other for other in (prefix + name, name.removeprefix(prefix)) if other in wanted), name)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
