"""Memory: an estimate before a run (closed forms, works on the meta device), and tools that measure what is actually kept.

Notation: N tokens of a micro-batch, D width, A query heads x head size, K key heads x head size, I ffn width, e bytes of an
activation, L blocks, V vocabulary.

One pre-norm block that runs under a gradient keeps, in elements per token:

    always           D + D (inputs of the two norms) + 4 A (query, keys, values, output of the attention)
                     + 3 I of a gated ffn (gate, its activation, up), or I of a plain one, 5 I where its activation is spelt
                     out in Python (gelu_new); experts: times the experts a token visits, and D for each of their outputs
    where trained    D each for an RMS norm's scale, D for the shared input of q, k, v, A for that of o, D for that of gate
                     and up, I for that of down: a linear layer keeps its input only if it, or a hook on it, trains
    of a hook        its rank

A frozen base therefore keeps about half of what full training does. With gradient checkpointing a block keeps its input, D,
and one block at a time keeps all of it; in its selective form a block also keeps the results of its linear layers and of
attention, in its form that offloads not even its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.engine.logprob import KEPT_CHUNKS, chunk_rows
from llmrecipe.methods._engines.quantized import quantized
from llmrecipe.models.hooks.hook import hooks_of
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from llmrecipe.methods._base.stack import Stack
    from llmrecipe.models.anatomy import Anatomy
    from llmrecipe.models.site import Site

INPUTS = {
    "attn.q": "attn", "attn.k": "attn", "attn.v": "attn", "attn.qkv": "attn", "attn.kv": "attn",
    "attn.o": "o", "mlp.gate": "ffn", "mlp.up": "ffn", "mlp.gate_up": "ffn", "mlp.down": "down", "experts": "experts",
}  # fmt: skip
"""Role of a linear layer -> which of a block's inputs it reads; sites that read the same one share it."""

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
"""Parts of the memory of a training process."""
SPELT_OUT = ("gelu_new", "gelu_fast", "quick_gelu")
"""Activations that Transformers computes from elementary operations, each of which keeps its own input."""


@dataclass(frozen=True)
class Estimate:
    """Peak bytes of one training process, by cause."""

    weights: int
    """Frozen and trained weights as they are stored."""
    trained: int
    """Trained values."""
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass of one micro-batch."""
    logits: int
    """One chunk of logits with its float32 copy and gradient, and the states of the scored positions; where a pass was followed
    operation by operation, what is kept of the logits."""
    temporary: int = 0
    """What a pass makes and frees, at the peak; 0 where no pass was followed."""
    host: int = 0
    """Inputs of blocks that wait in the memory of the machine, which are not part of the sum; 0 where no pass was followed."""
    auxiliary: int = 0
    """Weights of other models (teacher, reward model, judge), and a copy of what trains as it was at step 0."""
    unpredicted: str = ""
    """Why `activations` and `logits` are rough, by the formulas of this module, and `temporary` unknown; empty where a pass
    was followed operation by operation, so that they are exact."""
    undecided: tuple[str, ...] = ()
    """Wrappers that will open what trains from data or weights, so that `gradients` and `optimizer` lack theirs."""

    @property
    def total(self) -> int:
        """Return the sum of all bytes."""
        parts = self.weights + self.gradients + self.optimizer + self.activations + self.logits
        return parts + self.temporary + self.auxiliary

    def predicted(self) -> dict[str, int]:
        """Return the bytes of the parts that are known, and of the peak, the other models aside, where all of them are."""
        parts = {name: getattr(self, name) for name in PARTS if name not in self.unknown()}
        return parts if self.unknown() else {**parts, "peak": sum(parts.values())}

    def unknown(self) -> set[str]:
        """Return the names of the parts that are not known, or only in part."""
        found = {"activations", "logits", "temporary"} if self.unpredicted else set()
        return found | ({"gradients", "optimizer"} if self.undecided else set())

    def rows(self) -> list[tuple[str, int]]:
        """Return (name, bytes) lines for a table, the total last; what a pass frees and other models where there are some."""
        values = asdict(self)
        names = ["weights", "gradients", "optimizer", "activations", "logits"]
        names += [name for name in ("temporary", "auxiliary") if values[name]]
        return [*((name, values[name]) for name in names), ("total", self.total)]


def estimate_memory(
    model: nn.Module,
    stack: Stack,
    optimizer: Optimizer,
    tokens: int,
    *,
    targets: int | None = None,
    activation_bytes: int = 4,
    checkpointing: bool | str = False,
    device: str = "cpu",
) -> Estimate:
    """Estimate the memory of training a model with its stack attached; the model may be on the meta device.

    Args:
        tokens: tokens of the largest micro-batch.
        targets: scored positions among them; default all.
        activation_bytes: 4 in float32, 2 in bfloat16 and float16.
        checkpointing: `model.gradient_checkpointing`.
        device: kind of the device that it will train on.
    """
    by_rule, stored = stack.rule() is not None, stored_bytes(model, stack, optimizer)
    return Estimate(
        stored["weights"],
        gradients=stored["gradients"],
        optimizer=stored["optimizer"],
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        activations=0 if by_rule else activation_elements(model, tokens, _form(checkpointing, device)) * activation_bytes,
        logits=logit_bytes(model, targets or tokens, activation_bytes, device),
    )


def _form(checkpointing: bool | str, device: str) -> bool | str:
    """Return the form of checkpointing that a device sees: a CPU has nowhere to move its activations to."""
    return True if (checkpointing, device) == ("offload", "cpu") else checkpointing


def stored_bytes(model: nn.Module, stack: Stack, optimizer: Optimizer) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state; the model may be on the meta device.

    An update rule without gradients keeps what it declares itself.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    by_rule = stack.rule() is not None
    return {
        "weights": weight_bytes(model, stack),
        "gradients": 0 if by_rule else sum(p.numel() * p.element_size() for p in trained),
        "optimizer": sum(w.memory(model).get("optimizer_bytes", 0) for w in stack)
        if by_rule
        else sum(optimizer.state_bytes(tuple(p.shape)) for p in trained),
    }


def delta_bytes(model: nn.Module, stack: Stack) -> int:
    """Count the bytes of learned tensors in a checkpoint; the model may be on the meta device.

    A wrapper that chooses its entries from data has none yet: it is counted by its plan, 4 bytes per value plus its indices.
    """
    attached = sum(t.numel() * t.element_size() for t in stack.delta(model).values())
    facts = [w.memory(model) for w in stack]
    planned = sum(4 * f.get("trainable", 0) + f.get("index_bytes", 0) for f in facts)
    return max(attached, planned)


def weight_bytes(model: nn.Module, stack: Stack) -> int:
    """Count the bytes of weights and buffers; wrappers report what they quantize or will set aside (`base_bytes`)."""
    packed = {id(module.weight) for _, module in quantized(model)}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in packed}
    dense = sum(t.numel() * t.element_size() for t in tensors.values())
    facts = [w.memory(model) for w in stack]
    return dense + sum(f.get("base_bytes", 0) for f in facts)


def logit_bytes(model: nn.Module, targets: int, activation_bytes: int, device: str = "cpu") -> int:
    """Count the bytes of three float32 tensors per chunk of logits (values, probabilities, gradient) and of hidden states.

    A model of images has one logit a label; its states are of any width. A head of tokens that trains keeps the probabilities
    of more than one chunk.
    """
    config = pretrained(model).config.get_text_config()
    tokens = getattr(config, "vocab_size", None)
    vocabulary, head = int(tokens or config.num_labels), pretrained(model).get_output_embeddings() if tokens else None
    trained = head is not None and any(p.requires_grad for p in head.parameters(recurse=False))
    rows = chunk_rows(vocabulary, device)
    chunk, kept = min(targets, rows), min(targets, (KEPT_CHUNKS if trained else 1) * rows)
    width = getattr(config, "hidden_size", 0)
    return 4 * (kept + 2 * chunk) * vocabulary + targets * (width if isinstance(width, int) else 0) * activation_bytes


def activation_elements(model: nn.Module, tokens: int, checkpointing: bool | str = False) -> int:
    """Count the elements kept for the backward pass by the formulas of this module; zero below the first trained block.

    A model whose parts cannot be found is counted by its linear layers: inputs and outputs of each.

    Args:
        checkpointing: `model.gradient_checkpointing`; under `offload` one block's input is on the device at a time.
    """
    try:
        parts = anatomy(model)
    except ModelError:
        return tokens * _linear_elements(model)
    blocks = _blocks(parts)
    embedded = any(p.requires_grad for s in parts.sites if s.role.startswith("embed") for p in s.module.parameters())
    kept, reached = [], embedded
    for sites in blocks:
        trains = any(p.requires_grad for s in sites for p in s.module.parameters())
        reached = reached or trains
        if reached:
            kept.append(_block_elements(model, parts, sites))
    if checkpointing and kept:
        inputs = (1 if checkpointing == "offload" else len(kept)) * parts.width
        products = sum(_products(parts, sites) for sites in blocks[-len(kept) :]) if checkpointing == "selective" else 0
        return tokens * (inputs + products + max(kept))
    return tokens * (sum(kept) + (parts.width if kept else 0))


def _linear_elements(model: nn.Module) -> int:
    """Count the elements per token that the linear layers of any model read and write."""
    return sum(sum(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear))


def _blocks(parts: Anatomy) -> list[list[Any]]:
    found: dict[tuple[str, int], list[Any]] = {}
    for site in parts.sites:
        if site.layer is not None:
            found.setdefault((site.side, site.layer), []).append(site)
    return list(found.values())


def _block_elements(model: nn.Module, parts: Anatomy, sites: list[Any]) -> int:
    roles = {s.role for s in sites}
    config = pretrained(model).config.get_text_config()
    visited = int(getattr(config, "num_experts_per_tok", 1) or 1) if any(s.experts for s in sites) else 0
    attention, ffn = parts.heads * parts.head_dim, parts.ffn_width * max(1, visited)
    gated = bool(roles & {"mlp.gate", "mlp.gate_up", "experts"})
    spelt_out = getattr(config, "activation_function", getattr(config, "hidden_act", "")) in SPELT_OUT
    elements = 2 * parts.width + 4 * attention + (3 if gated else 5 if spelt_out else 1) * ffn + visited * parts.width
    widths = {"attn": parts.width, "o": attention, "ffn": parts.width, "down": ffn, "experts": visited * parts.width + ffn}
    elements += sum(widths[name] for name in {INPUTS[s.role] for s in sites if s.role in INPUTS and _trains(s)})
    norms = {id(s.module): s.module for s in sites if s.role in ("norm.attn", "norm.mlp")}
    scaled = [m for m in norms.values() if not isinstance(m, nn.LayerNorm) and any(p.requires_grad for p in m.parameters())]
    elements += len(scaled) * parts.width
    return elements + _ranks(sites)


def _products(parts: Anatomy, sites: list[Any]) -> int:
    """Count the elements a token has in the results of a block's linear layers and of its attention."""
    linear = {id(s.module): s.module for s in sites if s.role in INPUTS and not s.experts}
    widths = [getattr(m, "out_features", getattr(m, "nf", 0)) for m in linear.values()]
    return parts.heads * parts.head_dim + sum(widths)


def _trains(site: Site) -> bool:
    """Whether a linear layer needs its input in the backward pass: its weight, or a hook on it, trains."""
    weight = getattr(site.module, site.tensor or "weight", None)
    if isinstance(weight, Tensor) and weight.requires_grad:
        return True

    return any(p.requires_grad for hook in hooks_of(site.module) if hook.keeps_input for p in hook.parameters())


def _ranks(sites: Iterable[Any]) -> int:
    """Sum what the hooks of a block keep besides their input: the projection on their smallest dimension."""
    modules = {id(s.module): s.module for s in sites if s.role not in ("block", "attn", "mlp")}
    total = 0
    for module in modules.values():
        for hook in hooks_of(module):
            total += max((min(p.shape) for p in hook.parameters() if p.ndim == 2), default=0)
    return total


# --- measurement ----------------------------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> tuple[Tensor, int]:
    """Run a forward pass and count the bytes autograd saves through its hooks, each storage once.

    Args:
        exclude: tensors that exist anyway, such as parameters and buffers.

        Returns:
            What the call returned, and the bytes. Hooks do not see tensors that a custom function stores on its `ctx`; compare
        with `retained_bytes`.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(seen.values())


def retained_bytes(loss: Tensor, exclude: Iterable[Tensor] = ()) -> int:
    """Count the bytes a graph keeps alive, each storage once, by a walk over its nodes that also finds tensors on `ctx`.

    Args:
        loss: (), the end of the graph.
        exclude: tensors that exist anyway, such as parameters and buffers.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    sizes: dict[int, int] = {}
    nodes, visited = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        nodes += [following for following, _ in node.next_functions]
        # A leaf's accumulator holds the parameter itself, which is not memory of the graph.
        if hasattr(node, "variable"):
            continue
        for tensor in _tensors_of(node):
            # torch wraps a Python number, such as the factor of a branch, as a double of its own: that is no activation.
            if tensor.dim() == 0 and tensor.dtype == torch.float64:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors_of(node: torch.autograd.graph.Node) -> list[Tensor]:
    """Collect the tensors of a node of the graph: its saved variables, and tensors in its own attributes."""
    found: list[Tensor] = []
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            _collect(getattr(node, name), found)
    _collect(list(getattr(node, "__dict__", {}).values()), found)
    return found


def _collect(value: object, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, dict):
        _collect(list(value.values()), found)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, found)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of an optimizer's state; code books shared by parameters count once."""
    storages: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                storages[value.data_ptr()] = value.numel() * value.element_size()
    return sum(storages.values())
