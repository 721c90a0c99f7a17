"""A low-rank branch behind a gate of its input: y = W x + g(x) B A x (see `input_gate`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._engines.input_gate import InputGate
from llmrecipe.methods._engines.low_rank import start_pair
from llmrecipe.models.hooks.hook import DELTA, Hook, device_of, row_index
from llmrecipe.models.site import Site


class GatedLowRank(Hook):
    """The gate g stands in the place of alpha / r. A (r, in) starts Kaiming-uniform, B (out, r) at zero."""

    order = DELTA

    rows: Tensor | None

    def __init__(self, width_in: int, width_out: int, r: int, dropout: float, rows: Tensor | None, gate: InputGate, own: bool):
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, width_in))
        self.B = nn.Parameter(torch.empty(width_out, r))
        self.dropout = dropout
        self.rowwise = gate.pool == "token"  # type: ignore[misc]
        self.register_buffer("rows", rows, persistent=False)
        if own:
            self.gate = gate
        # In a list, so that a gate that another branch owns is not registered twice; copies of the model copy the pair.
        self.read = [gate]
        start_pair(self.A, self.B)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + g(x) B A dropout(x), (..., out), at all outputs or at some rows of a fused layer."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        change = F.linear(F.linear(dropped, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.read[0](x)
        return y + change.to(y.dtype) if self.rows is None else y.index_add(-1, self.rows, change.to(y.dtype))


class GateShares:
    """The gates of a wrapper's branches: one a branch, or one for all branches of a layer."""

    def __init__(self, owner: str, pool: str, per_layer: bool):
        self.owner, self.pool, self.per_layer = owner, pool, per_layer
        self.known: dict[tuple[str, int | None], InputGate] = {}

    def hook(self, site: Site, r: int, dropout: float) -> GatedLowRank:
        """Build the branch of a linear layer, or of some rows of a fused one.

        Raises:
            ModelError: the site is no linear layer, or shares a gate with one of another input width.
        """
        if site.tensor is not None or isinstance(site.module, nn.Embedding) or site.role.startswith("norm"):
            raise ModelError(
                f"stack.{self.owner}.gate: it reads the input of a linear layer; leave {site.role} out of the target"
            )
        with torch.device(device_of(site.module)):
            place = (site.side, site.layer)
            gate = self.known.get(place) if self.per_layer else None
            own = gate is None
            if gate is None:
                gate = self.known[place] = InputGate(site.width_in, self.pool, self.owner)
            if gate.weight.shape[1] != site.width_in:
                raise ModelError(
                    f"stack.{self.owner}.gate_share: {site.path} reads {site.width_in} features and the gate of its layer "
                    f"{gate.weight.shape[1]}; use gate_share: per_module"
                )
            return GatedLowRank(site.width_in, site.width_out, r, dropout, row_index(site), gate, own)
