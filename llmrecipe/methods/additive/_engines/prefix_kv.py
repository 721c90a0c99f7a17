"""Trained key/value columns that attention reads before its own: what prefix tuning, P-tuning v2 and APT share.

Letters: P virtual tokens, L layers of one table, G key/value heads, E and Ev key and value head sizes, R rows, S segments, T
columns.

A stack of blocks (the backbone, or each side of an encoder-decoder) carries one `PrefixTables` hook. It makes the columns of
all its layers once a forward pass and hands them to the attention modules inside through the context, so that activation
checkpointing replays a block with the very same tensors. The columns are inserted after rotary positions and key norms and
never enter a key/value cache: every step of a generation prepends them again.

    table    M (P, sum_l G (E + Ev)), layer-major [K_0, V_0, K_1, V_1, ...]: as PEFT and the P-tuning v2 code lay it out
    flat     M is the parameter
    mlp      M = W_2 tanh(W_1 X + b_1) + b_2 with X (P, d_p); `drop_mlp` keeps M alone, exactly
    sizes    layers have P_l columns of their own: a flat table is then one vector, layer after layer, an MLP's is cut to size
    closed   the columns have their own softmax and join as out + g softmax(q K^T) V with g = 0 at the start

Papers: Prefix-Tuning (arXiv 2101.00190), P-Tuning v2 (arXiv 2110.07602); the closed start: LLaMA-Adapter (arXiv 2303.16199).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import activate, current
from llmrecipe.methods._engines.document_tokens import host_of, stack_input
from llmrecipe.methods._engines.handed_down import handed_down
from llmrecipe.models.attention_calls import Prefix
from llmrecipe.models.hooks.hook import Hook, all_hooks
from llmrecipe.models.hooks.host import add_hook, refuse_unrouted
from llmrecipe.models.kv_cache import cached
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.site import Site
from llmrecipe.models.vocabulary import position_offset

T = TypeVar("T")


HEAD_SIZES = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim")
"""What families call the size of a key in their attention modules."""


@dataclass(frozen=True)
class ColumnPlan:
    """What a wrapper requires of its columns."""

    target: str
    virtual_tokens: int
    reparam: str = "flat"
    hidden: int = 512
    width: int | None = None
    dropout: float = 0.0
    init: str = "random"
    shift: bool = False
    closed: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Virtual tokens by layer number; 0 leaves a layer out."""

    def size(self, site: Site) -> int:
        """Return the virtual tokens of an attention module."""
        return self.sizes.get(str(site.layer), self.virtual_tokens)


@dataclass(frozen=True)
class KeyValueShape:
    """Key and value shape of one attention module."""

    heads: int
    key: int
    value: int
    virtual_tokens: int

    @property
    def width(self) -> int:
        """Return the numbers a virtual token needs here."""
        return self.heads * (self.key + self.value)


Columns = list[tuple[Tensor, Tensor]]
"""Keys (1 | R | S, G, P, E) and values (.., Ev) of each layer."""


class Table(nn.Module):
    """The columns of L attention modules; float32, whatever the base."""

    def __init__(self, plan: ColumnPlan, shapes: list[KeyValueShape], reparam: str):
        super().__init__()
        self.shapes, self.rate = shapes, plan.dropout
        self.virtual_tokens, self.uneven = max(s.virtual_tokens for s in shapes), bool(plan.sizes)
        width = sum(s.width for s in shapes)
        if reparam == "flat":
            form = (self.kept,) if self.uneven else (self.virtual_tokens, width)
            self.flat = nn.Parameter(torch.zeros(form) if plan.init == "zero" else torch.randn(form))
        else:
            small = plan.width or shapes[0].heads * shapes[0].key
            self.small = nn.Parameter(torch.randn(self.virtual_tokens, small))
            self.inner = nn.Linear(small, plan.hidden)
            self.outer = nn.Linear(plan.hidden, width)
        if plan.closed:
            self.gate = nn.Parameter(torch.zeros(len(shapes)))

    @property
    def kept(self) -> int:
        """Return the numbers of all columns."""
        return sum(s.virtual_tokens * s.width for s in self.shapes)

    def table(self) -> Tensor:
        """Return M (P, W), or the columns of uneven layers one after the other, (sum_l P_l W_l)."""
        return self.flat if hasattr(self, "flat") else self.outer(torch.tanh(self.inner(self.small)))

    def forward(self) -> Columns:
        """Return M cut into layers, dropped out as one tensor while training."""
        return self.cut(F.dropout(self.table(), self.rate, self.training))

    def cut(self, table: Tensor) -> Columns:
        """Cut M into keys (1, G, P, E) and values (1, G, P, Ev) of each layer."""
        sizes = [n for s in self.shapes for n in (s.heads * s.key, s.heads * s.value)]
        rows = [s.virtual_tokens for s in self.shapes for _ in range(2)]
        heads = [s.heads for s in self.shapes for _ in range(2)]
        if table.dim() == 1:
            halves = table.split([p * n for p, n in zip(rows, sizes, strict=True)])
        else:
            halves = [h[:p] for h, p in zip(table.split(sizes, 1), rows, strict=True)] if self.uneven else table.split(sizes, 1)
        parts = [h.view(p, g, -1).transpose(0, 1)[None] for h, p, g in zip(halves, rows, heads, strict=True)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def join(self, columns: Columns) -> Tensor:
        """Invert `cut`."""
        parts = [part[0].transpose(0, 1).flatten(1) for pair in columns for part in pair]
        return torch.cat([part.flatten() for part in parts]) if self.uneven else torch.cat(parts, 1)

    @torch.no_grad()
    def drop_mlp(self) -> None:
        """Keep M and drop the MLP that made it."""
        if not hasattr(self, "flat"):
            flat = self.table().detach()
            flat = (self.join(self.cut(flat)) if self.uneven else flat).clone()
            del self.small, self.inner, self.outer
            self.flat = nn.Parameter(flat)


@dataclass(frozen=True)
class Made:
    """What the attention modules of one forward pass read."""

    columns: dict[str, Columns]
    gates: dict[str, Tensor]
    factor: Tensor | None = None
    """(1 | R | S, P) multiplies the keys and values of the layer that runs."""
    scale: Tensor | None = None
    """(R, 1, T, 1) multiplies them as each query of the layer that runs sees them."""
    facts: Any = None
    """What a method with input-dependent columns worked out for the whole pass."""


class PrefixTables(Hook):
    """The tables of one stack of blocks, at the module that runs the stack."""

    def __init__(self, tables: dict[str, Table], virtual_tokens: int, shift: bool, offset: int = 0):
        super().__init__()
        self.tables = nn.ModuleDict(tables)
        self.virtual_tokens, self.shift, self.offset = virtual_tokens, shift, offset

    def make(self, inputs: dict[str, Any]) -> Made:
        """Return the columns of a forward pass."""
        gates: dict[str, Any] = {role: table.gate for role, table in self.tables.items() if hasattr(table, "gate")}
        return Made({role: table() for role, table in self.tables.items()}, gates)

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the host's forward with its columns in the context."""
        context = current()
        made = self.make(inputs)
        if self.shift:
            inputs = {**inputs, "position_ids": positions(inputs, self.offset) + self.virtual_tokens}
        with activate(dataclasses.replace(context, shared={**context.shared, self.owner: made})):
            return call(**inputs)


class PrefixColumns(Hook):
    """Prepends one layer's columns to its keys and values; without tensors of its own."""

    def __init__(self, role: str, index: int):
        super().__init__()
        self.role, self.index = role, index

    def attention(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute attention (R, H, T, Ev) over the columns and everything else."""
        made: Made = handed_down(self.owner)
        keys, values = made.columns[self.role][self.index]
        if not keys.shape[2]:
            return attend(q, k, v)
        if made.factor is not None:
            factor = made.factor[:, None, :, None]
            keys, values = keys * factor, values * factor
        gate = made.gates[self.role][self.index] if self.role in made.gates else None
        return attend(q, k, v, Prefix(keys, values, gate=gate, scale=made.scale))


# --- positions and caches --------------------------------------------------------------------------------------------


def positions(inputs: dict[str, Any], offset: int = 0) -> Tensor:
    """Return position ids (R | 1, T) of a call: those given, else counted from the mask as Transformers' generation does."""
    given = inputs.get("position_ids")
    if given is not None:
        return given
    tokens = stack_input(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :] + offset
    return torch.arange(tokens.shape[1], device=tokens.device)[None] + cached(inputs) + offset


def takes_positions(host: nn.Module) -> bool:
    """Return whether a stack takes position ids; relative biases count columns instead."""
    return "position_ids" in inspect.signature(type(host).forward).parameters


# --- building --------------------------------------------------------------------------------------------------------


def shape_of(site: Site, model: nn.Module, virtual_tokens: int) -> KeyValueShape:
    """Return the key and value shape of an attention module, from its own attributes or the model's.

    Raises:
        ModelError: nothing tells its values from its keys.
    """
    parts = anatomy(model)
    module: Any = site.module
    at = (site.side, site.layer, f"{site.role}.v")
    value = next((s for s in parts.sites if (s.side, s.layer, s.role) == at), None)
    if value is None:
        raise ModelError(
            f"{site.path}: which of its weights make values does not follow from their names; name the module that does in the "
            f"recipe (model.anatomy.{site.role}.v)\n{parts.describe()}"
        )
    size = next((n for name in HEAD_SIZES if (n := getattr(module, name, None))), None)
    key = int(size or parts.head_dim)
    value_size = int(getattr(module, "v_head_dim", None) or key)
    return KeyValueShape(value.width_out // value_size, key, value_size, virtual_tokens)


def attention_sites(model: nn.Module, target: str, name: str) -> dict[str, dict[str, list[Site]]]:
    """Return side -> role (`attn`, `cross`) -> the attention modules a target names.

    Raises:
        RecipeError: the target names something that is no attention module.
        ModelError: a module it names would never call its hook.
    """
    found: dict[str, dict[str, list[Site]]] = {}
    for site in anatomy(model).at(target):
        if site.role not in ("attn", "cross"):
            raise RecipeError(
                f"stack.{name}.target: a prefix belongs to an attention module, 'attn' or 'cross', not to '{site.role}'"
            )
        refuse_unrouted(site.module, name)
        found.setdefault(site.side, {}).setdefault(site.role, []).append(site)
    return found


def attach_prefix(
    model: nn.Module,
    name: str,
    plan: ColumnPlan,
    structure: dict[str, Any] | None = None,
    tables_hook: type[PrefixTables] = PrefixTables,
) -> list[tuple[PrefixTables, dict[str, list[Site]]]]:
    """Add the tables at each stack of blocks, and a hook without tensors at each attention module.

    Returns:
        Each new tables hook with its attention modules by role.

    Raises:
        RecipeError: options that exclude each other, or `positions: shift` on a model that counts columns.
    """
    reparam = (structure or {}).get("reparam", plan.reparam)
    if plan.reparam == "mlp" and plan.init != "random":
        raise RecipeError(f"stack.{name}.init: '{plan.init}' needs reparam: flat; nothing inverts the MLP")
    if plan.sizes and (plan.shift or plan.init == "text"):
        option = "positions: shift" if plan.shift else "init: text"
        raise RecipeError(f"stack.{name}.sizes: {option} needs as many virtual tokens in every layer; leave sizes out")
    made: list[tuple[PrefixTables, dict[str, list[Site]]]] = []
    for side, every in attention_sites(model, plan.target, name).items():
        roles = {role: chosen for role, sites in every.items() if (chosen := [s for s in sites if plan.size(s)])}
        if not roles:
            continue
        host = host_of(model, side)
        if plan.shift and not takes_positions(host):
            raise RecipeError(
                f"stack.{name}.positions: {type(host).__name__} counts columns and takes no position ids; use positions: free"
            )
        tables = {
            role: Table(plan, [shape_of(s, model, plan.size(s)) for s in sites], reparam) for role, sites in roles.items()
        }
        hook = tables_hook(tables, plan.virtual_tokens, plan.shift, position_offset(host))
        add_hook(host, name, hook.to(next(model.parameters()).device), name)
        for role, sites in roles.items():
            for index, site in enumerate(sites):
                add_hook(site.module, name, PrefixColumns(role, index), name)
        made.append((hook, roles))
    if not made:
        raise RecipeError(f"stack.{name}.sizes: every layer of '{plan.target}' has size 0, so there is no prefix")
    return made


def tables_of(model: nn.Module, name: str) -> list[PrefixTables]:
    """Return the tables hooks of a wrapper."""
    return [hook for _, _, _, hook in all_hooks(model, name) if isinstance(hook, PrefixTables)]


def structure(model: nn.Module, name: str) -> dict[str, Any]:
    """Return whether the MLP has been dropped."""
    flat = all(hasattr(t, "flat") for hook in tables_of(model, name) for t in hook.tables.values())
    return {"reparam": "flat" if flat else "mlp"}


def drop_mlp(model: nn.Module, name: str) -> None:
    """Replace every MLP by the table it makes."""
    for hook in tables_of(model, name):
        for table in hook.tables.values():
            table.drop_mlp()  # type: ignore[operator]


def memory(model: nn.Module, name: str) -> dict[str, int]:
    """Return trained numbers, AdamW's bytes for them, and the numbers kept after training."""
    parameters = [p for hook in tables_of(model, name) for p in hook.parameters()]
    count = sum(p.numel() for p in parameters)
    kept = sum(t.kept for hook in tables_of(model, name) for t in hook.tables.values())  # type: ignore[misc]
    return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count, "kept": kept}
