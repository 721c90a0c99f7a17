"""Elastic parts: a branch, an adapter, prompts and key/value columns of which the first k are in use.

A part is built at its largest size; a smaller one is the leading slice of the same tensors, and size 0 is no part at all:

    low rank   y + B[:, :k] A[:k] x                                scale 1 at every k
    adapter    y + W_u[:, :k] f(W_d[:k] y + b_d[:k]) + b_u
    prompts    P[:k]                                               behind the first row of a vision transformer's block
    columns    P_K[:k], P_V[:k]                                    before the keys and values of an attention module

Source of the slices: Neural Prompt Search (arXiv 2206.04673).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.methods._engines import low_rank
from llmrecipe.methods.additive._engines import bottleneck, prefix_kv
from llmrecipe.methods.additive.vpt import BlockPrompts

T = TypeVar("T")

Still = Iterator[tuple[nn.Parameter, Tensor]]
"""Parameters with a mask of the entries that are not in use."""


class Elastic:
    """What the parts have in common, so that a search can set and price them."""

    kind: str = ""
    """The kind of part: lora, adapter or prompt."""

    def use(self, sizes: Mapping[int, int]) -> None:
        """Compute with the size of each layer; a layer that is not named has no such part."""
        raise NotImplementedError

    def cost(self, sizes: Mapping[int, int]) -> int:
        """Return how many numbers parts of these sizes leave."""
        raise NotImplementedError

    def still(self) -> Still:
        """Yield its parameters with the entries that are not in use."""
        raise NotImplementedError


class AtLayer(Elastic):
    """A part that belongs to one layer."""

    layer: int = 0

    def use(self, sizes: Mapping[int, int]) -> None:
        """Compute with the size of its layer."""
        self.take(sizes.get(self.layer, 0))

    def cost(self, sizes: Mapping[int, int]) -> int:
        """Return how many numbers it leaves at the size of its layer."""
        return self.numbers(sizes.get(self.layer, 0))

    def take(self, k: int) -> None:
        """Compute with the first k."""
        raise NotImplementedError

    def numbers(self, k: int) -> int:
        """Return how many numbers the first k are."""
        raise NotImplementedError


class ElasticLowRank(AtLayer, low_rank.LowRank):
    """The branch at a linear layer, y + B[:, :k] A[:k] x."""

    def __init__(self, width_in: int, width_out: int, r: int, rows: Tensor | None):
        super().__init__(width_in, width_out, r, 1.0, 0.0, rows)
        self.k = r

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with the change of the first k ranks, (..., out)."""
        if not self.k:
            return y
        return low_rank.branch(x, self.A[: self.k], self.B[:, : self.k], 1.0, y, self.rows)

    def take(self, k: int) -> None:
        """Compute with the first k ranks."""
        self.k = k

    def numbers(self, k: int) -> int:
        """Return k (in + out)."""
        return k * (self.A.shape[1] + self.B.shape[0])

    def still(self) -> Still:
        """Yield what of A and B is not in use."""
        off = torch.arange(self.A.shape[0], device=self.A.device) >= self.k
        yield self.A, off[:, None]
        yield self.B, off


class ElasticAdapter(AtLayer, bottleneck.Behind):
    """The adapter after a sublayer, of width k."""

    def __init__(self, width: int, r: int, shape: bottleneck.BottleneckShape):
        super().__init__(width, width, r, shape)
        self.shape, self.k = shape, r

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output (..., d)."""
        return y + self.network(y) if self.k else y

    def network(self, z: Tensor) -> Tensor:
        """Return W_u[:, :k] f(W_d[:k] z + b_d[:k]) + b_u, (..., d)."""
        assert self.down_bias is not None and self.up_bias is not None
        k, dtype = self.k, z.dtype
        h = bottleneck.ACTIVATIONS[self.activation](F.linear(z, self.down[:k].to(dtype), self.down_bias[:k].to(dtype)))
        return F.linear(h, self.up[:, :k].to(h.dtype), self.up_bias.to(h.dtype))

    def take(self, k: int) -> None:
        """Compute with a bottleneck of width k."""
        self.k = k

    def numbers(self, k: int) -> int:
        """Return (2 d + 1) k + d, and 0 without an adapter."""
        return bottleneck.count(self.down.shape[1], self.up.shape[0], k, self.shape) if k else 0

    def still(self) -> Still:
        """Yield what of both matrices and biases is not in use."""
        assert self.down_bias is not None and self.up_bias is not None
        off = torch.arange(self.down.shape[0], device=self.down.device) >= self.k
        yield self.down, off[:, None]
        yield self.down_bias, off
        yield self.up, off
        yield self.up_bias, torch.full((), not self.k, device=off.device)


class ElasticPrompts(AtLayer, BlockPrompts):
    """Prompts at a block, the first k of them."""

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the block over its rows and k more."""
        return super().wrap_module(call, inputs) if self.count else call(**inputs)

    def take(self, k: int) -> None:
        """Compute with the first k prompts."""
        self.count = k

    def numbers(self, k: int) -> int:
        """Return k d."""
        return k * self.prompts.shape[1]

    def still(self) -> Still:
        """Yield the prompts that are not in use."""
        yield self.prompts, (torch.arange(len(self.prompts), device=self.prompts.device) >= self.count)[:, None]


class ElasticTables(Elastic, prefix_kv.PrefixTables):
    """Key/value columns of a stack of blocks, the first k_l of them at layer l."""

    def follow(self, layers: dict[str, list[int]]) -> None:
        """Set the layer numbers of each role's attention modules, and use all columns."""
        self.layers = layers
        self.in_use = {role: [self.virtual_tokens] * len(own) for role, own in layers.items()}

    def make(self, inputs: dict[str, Any]) -> prefix_kv.Made:
        """Return the columns in use."""
        made = super().make(inputs)
        columns = {
            role: [(keys[:, :, :k], values[:, :, :k]) for (keys, values), k in zip(pairs, self.in_use[role], strict=True)]
            for role, pairs in made.columns.items()
        }
        return dataclasses.replace(made, columns=columns)

    def use(self, sizes: Mapping[int, int]) -> None:
        """Compute with the first columns of each layer; a layer that is not named has none."""
        self.in_use = {role: [sizes.get(layer, 0) for layer in own] for role, own in self.layers.items()}

    def cost(self, sizes: Mapping[int, int]) -> int:
        """Return the sum of k_l G (E + Ev)."""
        return sum(
            sizes.get(layer, 0) * shape.width
            for role, own in self.layers.items()
            for layer, shape in zip(own, self._table(role).shapes, strict=True)
        )

    def still(self) -> Still:
        """Yield each table with the columns that are not in use."""
        for role, own in self.in_use.items():
            table = self._table(role)
            place = torch.arange(self.virtual_tokens, device=table.flat.device)[:, None]
            parts = [(place >= k).expand(-1, shape.width) for k, shape in zip(own, table.shapes, strict=True)]
            yield table.flat, torch.cat(parts, 1)

    def _table(self, role: str) -> prefix_kv.Table:
        table = self.tables[role]
        assert isinstance(table, prefix_kv.Table)
        return table
