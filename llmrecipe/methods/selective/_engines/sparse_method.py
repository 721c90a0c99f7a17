"""What the wrappers on the sparse-delta engine share: which tensors they may select from, attaching, saving, merging."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods.selective._engines.base_weight import Selected, Weight, is_conv1d
from llmrecipe.methods.selective._engines.blocks import block_size
from llmrecipe.methods.selective._engines.sparse_delta import (
    DIRECT_BELOW,
    Mode,
    SelectionWriter,
    SparseDelta,
    SparseGradient,
    SparseTied,
)
from llmrecipe.methods.selective._engines.sparse_kernels import gather_selected
from llmrecipe.models.excluded import excluded
from llmrecipe.models.hooks.hook import all_hooks, hooks_of
from llmrecipe.models.hooks.host import add_hook, remove_hook
from llmrecipe.models.hooks.shared_module import shared_modules
from llmrecipe.models.idle_embedding import idle_embedding
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.site_finder import widths
from llmrecipe.models.stored_tensors import copy_saved
from llmrecipe.models.task_heads import is_head


def base_weights(model: nn.Module, scope: str = "all") -> dict[str, Weight]:
    """Return every tensor of the base a method may select from, by parameter name, in model order.

    Tied tensors appear once, under their first name. Injected modules, new task heads and what the objective excludes are left
    out.

    Raises:
        ModelError: the scope names a part of a fused matrix or single experts.
    """
    inside = {id(p) for _, _, _, hook in all_hooks(model) for p in hook.parameters()}
    inside |= {id(p) for _, shared in shared_modules(model) for p in shared.parameters()}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    idle = idle_embedding(model)
    for module in model.modules():
        for tensor, value in module._parameters.items():
            if value is not None and module is not idle and not excluded(module):
                owners.setdefault(id(value), []).append((module, tensor))
    wanted = _in_scope(model, scope)
    found: dict[str, Weight] = {}
    for name, value in model.named_parameters():
        if id(value) in inside or is_head(model, name) or excluded(value) or (wanted is not None and id(value) not in wanted):
            continue
        users = tuple(owners[id(value)])
        quantized = not value.is_floating_point() or hasattr(value, "quant_state")
        if quantized and not hasattr(users[0][0], "in_features"):
            continue
        shape = tuple(value.shape)
        if quantized:
            columns, rows, _ = widths(users[0][0], 0)
            shape = (rows, columns)
        found[name] = Weight(name, shape, users, quantized)
    return found


def candidates(model: nn.Module, scope: str) -> dict[str, Weight]:
    """Return `base_weights` without those that train entirely (child-tuning's rest): entries of these need no delta.

    Raises:
        ModelError: every tensor of the scope trains already.
    """
    found = {name: weight for name, weight in base_weights(model, scope).items() if not weight.value.requires_grad}
    if not found:
        raise ModelError(f"every tensor of scope '{scope}' already trains whole in this stack; there is nothing left to select")
    return found


def _in_scope(model: nn.Module, scope: str) -> set[int] | None:
    if scope == "all":
        return None

    sites = anatomy(model).at("block" if scope == "blocks" else scope)
    for site in sites:
        if site.rows is not None or site.chosen is not None:
            raise ModelError(
                f"'{scope}' names a part of {site.path}; selection works on whole tensors: name the fused matrix "
                f"(attn.qkv, mlp.gate_up) or all experts"
            )
    return {id(p) for site in sites for name, p in site.module.named_parameters() if site.tensor is None or name == site.tensor}


def attach_chosen(model: nn.Module, owner: str, chosen: Mapping[str, Selected], force_term: bool = False) -> None:
    """Add the hooks that train a selection, one `values` tensor a base tensor.

    Raises:
        ModelError: a tensor no longer exists, or cannot be trained by entries in the way it is stored.
    """
    weights = base_weights(model)
    for name, selection in chosen.items():
        weight = weights.get(name)
        if weight is None:
            raise ModelError(f"stack.{owner}: the selection names '{name}', which this model does not have")
        if selection.idx.numel():
            _attach_one(weight, selection, owner, force_term)


def _attach_one(weight: Weight, selection: Selected, owner: str, force_term: bool) -> None:
    module, tensor = weight.owners[0]
    linear = type(module) is nn.Linear and len(weight.shape) == 2
    if weight.quantized or (force_term and linear):
        mode: Mode = "term"
        if block_size(selection.layout):
            raise ModelError(f"stack.{owner}: {weight.name} is quantized; blocks train in dense weights only")
    else:
        mode = "vector" if len(weight.shape) == 1 else "inplace"
    writer = next((p.writer for p in _sparse_hooks(module) if p.tensor == tensor and p.mode == "inplace"), SelectionWriter())
    hook = SparseDelta(weight, selection, tensor, mode, writer)
    density = hook.values.numel() / weight.numel
    for index, (user, name) in enumerate(weight.owners):
        suffix = "" if name == "weight" else f"__{name}"
        own: SparseDelta | SparseTied = hook if index == 0 else SparseTied(hook, name)
        add_hook(user, owner + suffix, own, owner)
        if mode == "vector":
            continue
        kind = "linear" if mode == "term" else gradient_kind(user, name, hook.layout, density)
        own.kernel = "transient" if kind == "other" else "direct"
        host = weight.value if mode == "inplace" else None
        gradient = SparseGradient(hook, kind, getattr(user, "padding_idx", None), host)
        add_hook(user, f"{owner}{suffix}__grad", gradient, owner)


def gradient_kind(module: nn.Module, tensor: str, layout: str, density: float) -> str:
    """Return which kernel forms the gradient at one user of a tensor (see `SparseGradient.kind`)."""
    if tensor != "weight" or hooks_of(module, "wrap_forward"):
        return "other"
    if type(module) is nn.Embedding and not module.scale_grad_by_freq:
        return "embedding"
    if type(module) is nn.Linear or is_conv1d(module):
        direct = layout != "entries" or density < DIRECT_BELOW
        return ("conv1d" if is_conv1d(module) else "linear") if direct else "other"
    return "other"


def _sparse_hooks(module: nn.Module) -> list[SparseDelta]:
    return [p.pair[0] if isinstance(p, SparseTied) else p for p in hooks_of(module) if isinstance(p, SparseDelta | SparseTied)]


def sparse_hooks(model: nn.Module, owner: str) -> Iterator[tuple[str, nn.Module, SparseDelta]]:
    """Return (module path, host, hook) of every selection a wrapper holds."""
    for path, module, _, hook in all_hooks(model, owner):
        if isinstance(hook, SparseDelta):
            yield path, module, hook


def structure_of(model: nn.Module, owner: str) -> dict[str, Any]:
    """Return how many entries of which tensors, with digests of the base's numbers and of the indices."""
    tensors: dict[str, Any] = {}
    for _, module, hook in sparse_hooks(model, owner):
        fact: dict[str, Any] = {"layout": hook.layout, "count": hook.idx.numel(), "idx": tensor_hash(hook.idx)}
        if hook.mode == "inplace":
            fact["place"] = hook.writer.hooks.index(hook)
        if hook.mode != "term" and hook.values.device.type != "meta":
            fact["base"] = base_digest(module, hook)
        tensors[hook.source] = fact
    return {"tensors": tensors}


def chosen_from(structure: Mapping[str, Any]) -> dict[str, Selected]:
    """Return placeholders with the shapes of a saved selection; `restore` brings the indices."""
    return {
        name: Selected(torch.arange(fact["count"]), fact["layout"], fact.get("base", ""), fact.get("place"))
        for name, fact in structure.get("tensors", {}).items()
    }


def finalize_selections(model: nn.Module) -> None:
    """Write the deltas of active selections into every tensor, before anything is folded into it."""
    for _, module, _, hook in list(all_hooks(model)):
        if isinstance(hook, SparseDelta) and hook.mode == "inplace":
            hook.sync(getattr(module, hook.tensor))


def withdraw(module: nn.Module, hook: SparseDelta) -> None:
    """Write what is below this stack into the tensor: the base and the mounted deltas that the context leaves enabled.

    The next forward pass writes the rest.
    """
    if hook.mode == "inplace":
        hook.sync(getattr(module, hook.tensor), tuple(p.mounted and p.on() for p in hook.writer.hooks))


def base_digest(module: nn.Module, hook: SparseDelta) -> str:
    """Hash the numbers a delta is added to."""
    withdraw(module, hook)
    return tensor_hash(gather_selected(getattr(module, hook.tensor), hook.layout, hook.idx))


def tensor_hash(value: Tensor) -> str:
    """Hash a tensor's bytes with SHA-256, shortened."""
    raw = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


@torch.no_grad()
def restore_chosen(model: nn.Module, owner: str, delta: Mapping[str, Tensor]) -> None:
    """Restore indices and values of a saved delta onto a base that does not hold it.

    Raises:
        ModelError: the base's numbers at the selection are not those the delta was trained on.
        ValueError: its tensors have other shapes than the selection.
    """
    for _, module, hook in sparse_hooks(model, owner):
        withdraw(module, hook)
    copy_saved(model, delta)
    for _, module, hook in sparse_hooks(model, owner):
        if hook.expected and hook.mode != "term" and base_digest(module, hook) != hook.expected:
            raise ModelError(
                f"stack.{owner}: {hook.source} is not the tensor this delta was trained on; use its own base model"
            )


class SparseMethod:
    """The lifecycle of a wrapper whose trained part is a selection; mixed into `Wrapper`s."""

    name: str

    def plan(self, model: nn.Module) -> int:
        """Return how many entries will be selected, while the choice has yet to be made."""
        return 0

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return shapes and digests of the selection."""
        return structure_of(model, self.name)

    def restore(self, model: nn.Module, delta: dict[str, Tensor]) -> None:
        """Load a saved selection back, bit for bit."""
        restore_chosen(model, self.name, delta)

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Refuse a selection without any gradient, or whose tensor changes underneath it: it would not train as declared.

        Raises:
            ModelError: no selected tensor was reached by the backward pass, or one trains whole as well.
        """
        hooks = list(sparse_hooks(model, self.name))
        whole = [p.source for _, m, p in hooks if step == 0 and p.mode == "inplace" and getattr(m, p.tensor).requires_grad]
        if whole:
            raise ModelError(
                f"stack.{self.name}: {whole[0]} trains whole in this stack as well; narrow stack.{self.name}.scope, "
                "or freeze that tensor in the other method"
            )
        if step == 0 and hooks and all(hook.values.grad is None for _, _, hook in hooks):
            raise ModelError(f"stack.{self.name}: none of the selected tensors received a gradient")

    def after_step(self, model: nn.Module, step: int) -> None:
        """Have the changed values written before the next forward pass."""
        for _, _, hook in sparse_hooks(model, self.name):
            hook.writer.written = None

    def merge(self, model: nn.Module) -> None:
        """Set W <- W + delta at every selection; exact in float32, one rounding below."""
        with torch.no_grad():
            for _, module, name, hook in list(all_hooks(model, self.name)):
                hook.merge(module)
                remove_hook(module, name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 20 bytes an entry (index, value, gradient, two moments), and the base values still due."""
        hooks = [hook for _, _, hook in sparse_hooks(model, self.name)]
        count = sum(p.values.numel() for p in hooks) if hooks else self.plan(model)
        index = sum(p.idx.numel() * p.idx.element_size() for p in hooks) if hooks else 4 * count
        due = sum(p.base_due(getattr(module, p.tensor)) for _, module, p in sparse_hooks(model, self.name))
        facts = {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count, "index_bytes": index}
        return {**facts, "base_bytes": due}

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield the selected entries of each tensor."""
        for _, _, hook in sparse_hooks(model, self.name):
            yield f"{hook.source} ({hook.layout})", hook.values.numel()
