"""Groups of base weights that are selected together: tensors, rows, columns, heads, neurons, layers.

A `GroupFamily` is a set of like groups held as index tables, so that a model's millions of rows are no objects of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods.selective._engines.base_weight import Selected, Weight, is_conv1d
from llmrecipe.methods.selective._engines.sparse_kernels import Layout
from llmrecipe.methods.selective._engines.sparse_method import base_weights
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

Kind = Literal["tensor", "row", "column", "head", "neuron", "layer"]


@dataclass(frozen=True)
class Member:
    """The part of one tensor that belongs to each group of a family."""

    weight: Weight
    layout: Layout
    index: Tensor
    """(groups, w): rows, columns or entries of each group."""

    @property
    def size(self) -> int:
        """Return the numbers in one group."""
        axis = self.weight.numel if self.layout == "entries" else self.weight.shape[0 if self.layout == "rows" else -1]
        return self.index.shape[1] * (self.weight.numel // axis)

    def sums(self, flat: Tensor) -> Tensor:
        """Return (groups,) sums of a per-entry score of the tensor."""
        if self.layout == "entries":
            along = flat
        else:
            keep = 0 if self.layout == "rows" else len(self.weight.shape) - 1
            other = [d for d in range(len(self.weight.shape)) if d != keep]
            along = flat.view(self.weight.shape).sum(other, dtype=torch.float64)
        return along.double()[self.index.to(along.device)].sum(1).cpu()


@dataclass(frozen=True)
class GroupFamily:
    """Groups of one shape: the rows of one layer, the heads of one attention, one tensor."""

    name: str
    layer: int
    """-1 outside the blocks."""
    members: tuple[Member, ...]

    @property
    def count(self) -> int:
        """Return how many groups there are."""
        return self.members[0].index.shape[0]

    @property
    def size(self) -> int:
        """Return the numbers in one group."""
        return sum(m.size for m in self.members)


def families(model: nn.Module, kind: Kind, scope: str = "") -> list[GroupFamily]:
    """Return every group of a model.

    Args:
        scope: tensors to look at; default everything for `tensor`, the blocks for `layer`, their projections for the others.

    Raises:
        ModelError: the model has no such groups within the scope.
    """
    weights = base_weights(model)
    names = {id(getattr(*w.owners[0])): name for name, w in weights.items()}
    wanted = base_weights(model, scope) if scope else weights
    if kind in ("tensor", "layer"):
        found = list(_whole(model, kind, wanted))
    else:
        found = [f for f in _featured(model, kind, weights, names) if all(m.weight.name in wanted for m in f.members)]
    if not found:
        raise ModelError(f"there are no groups of kind '{kind}' in this model{f' within {scope!r}' if scope else ''}")
    return found


def _whole(model: nn.Module, kind: Kind, weights: Mapping[str, Weight]) -> Iterator[GroupFamily]:
    blocks = [s for s in anatomy(model).sites if s.role == "block"]
    at = {id(p): (s.path, s.layer) for s in blocks for p in s.module.parameters()}
    layers: dict[str, list[Member]] = {}
    numbers: dict[str, int] = {}
    for name, weight in weights.items():
        path, layer = at.get(id(weight.value), ("", -1))
        layout: Layout = "entries" if len(weight.shape) == 1 else "rows"
        member = Member(weight, layout, torch.arange(weight.shape[0])[None])
        if kind == "tensor":
            yield GroupFamily(name, int(layer or 0) if path else -1, (member,))
        elif path:
            layers.setdefault(path, []).append(member)
            numbers[path] = int(layer or 0)
    for path, members in layers.items():
        yield GroupFamily(path, numbers[path], tuple(members))


def _featured(model: nn.Module, kind: Kind, weights: Mapping[str, Weight], names: Mapping[int, str]) -> Iterator[GroupFamily]:
    """Return groups that are features of projections."""
    parts = anatomy(model)
    sides: dict[tuple[str, int], dict[str, Site]] = {}
    for site in parts.sites:
        if site.layer is not None and site.tensor is None:
            sides.setdefault((site.side, site.layer), {})[site.role] = site

    def of(site: Site, index: Tensor, outputs: bool) -> list[Member]:
        weight = weights[names[id(site.module.weight)]]
        stored_rows = outputs != is_conv1d(site.module)
        members = [Member(weight, "rows" if stored_rows else "columns", index)]
        bias = getattr(site.module, "bias", None)
        if outputs and bias is not None and id(bias) in names:
            members.append(Member(weights[names[id(bias)]], "entries", index))
        return members

    for (side, layer), roles in sides.items():
        if kind in ("row", "column"):
            for site in parts.at(f"{side}.layers.{layer}.all-linear"):
                width = site.width_out if kind == "row" else site.width_in
                yield GroupFamily(site.path, layer, tuple(of(site, torch.arange(width)[:, None], kind == "row")))
        elif kind == "neuron" and "mlp.down" in roles:
            down = roles["mlp.down"]
            members = of(down, torch.arange(down.width_in)[:, None], False)
            for role in ("mlp.gate", "mlp.up"):
                if role in roles:
                    members += of(roles[role], _outputs(roles[role])[:, None], True)
            yield GroupFamily(f"{down.path}: neurons", layer, _joined(members))
        elif kind == "head":
            for block in ("attn", "cross"):
                if all(f"{block}.{part}" in roles for part in "qkvo"):
                    q, k, v, o = (roles[f"{block}.{part}"] for part in "qkvo")
                    groups = parts.kv_heads if k.width_out % parts.kv_heads == 0 else 1
                    members = of(o, torch.arange(o.width_in).view(groups, -1), False)
                    for site in (q, k, v):
                        members += of(site, _outputs(site).view(groups, -1), True)
                    yield GroupFamily(f"{q.path.rpartition('.')[0]}: heads", layer, _joined(members))


def _outputs(site: Site) -> Tensor:
    return torch.tensor(list(site.indices()), dtype=torch.long)


def _joined(members: Sequence[Member]) -> tuple[Member, ...]:
    """Return one member a tensor: parts of a fused tensor are concatenated."""
    found: dict[tuple[str, str], Member] = {}
    for member in members:
        key = (member.weight.name, member.layout)
        known = found.get(key)
        index = member.index if known is None else torch.cat((known.index, member.index), 1)
        found[key] = Member(member.weight, member.layout, index)
    return tuple(found.values())


def pick(found: Sequence[GroupFamily], scores: Sequence[Tensor], budget: int, min_per_layer: int = 0) -> list[Tensor]:
    """Pick groups in the order of their scores while the budget lasts; one that no longer fits is passed over.

    Args:
        scores: (groups,) of each family.
        min_per_layer: this many of the best groups of every layer come first.

    Returns:
        (groups,) bool of each family.
    """
    flat = torch.cat(list(scores))
    sizes = torch.cat([torch.full((f.count,), f.size) for f in found]).tolist()
    layers = torch.cat([torch.full((f.count,), f.layer) for f in found]).tolist()
    # A stable sort: ties go to the earlier group.
    order = flat.argsort(descending=True, stable=True).tolist()
    if min_per_layer:
        seen: dict[int, int] = {}
        first = []
        for at in order:
            seen[layers[at]] = seen.get(layers[at], 0) + 1
            if seen[layers[at]] <= min_per_layer and layers[at] >= 0:
                first.append(at)
        chosen = set(first)
        order = first + [at for at in order if at not in chosen]
    taken = torch.zeros(len(order), dtype=torch.bool)
    left = budget
    for at in order:
        if sizes[at] <= left:
            taken[at] = True
            left -= sizes[at]
    return list(taken.split([f.count for f in found]))


def chosen_of(found: Sequence[GroupFamily], taken: Sequence[Tensor]) -> dict[str, Selected]:
    """Return what the selected groups are of each tensor.

    Raises:
        ModelError: one tensor would be selected in two layouts.
    """
    parts: dict[str, list[Tensor]] = {}
    layouts: dict[str, Layout] = {}
    for family, keep in zip(found, taken, strict=True):
        for member in family.members:
            name = member.weight.name
            if layouts.setdefault(name, member.layout) != member.layout:
                raise ModelError(f"{name} would be selected by rows and by columns at once")
            parts.setdefault(name, []).append(member.index[keep].reshape(-1))
    joined = {name: torch.cat(indices).sort()[0] for name, indices in parts.items()}
    return {name: Selected(idx, layouts[name]) for name, idx in joined.items() if idx.numel()}
