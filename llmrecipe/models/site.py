"""One place of a model where a method may act."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Site:
    """One place where a method may act."""

    path: str
    """Module path in the model, such as `model.layers.0.self_attn.q_proj`."""
    role: str
    """What it is, in the words of the target grammar."""
    layer: int | None
    """Index of its block on its side, or None outside the blocks."""
    module: nn.Module
    side: str
    """`decoder` or `encoder`."""
    width_in: int
    width_out: int
    """Input and output features of this site alone: of its rows in a fused module, of one expert for expert tensors."""
    transposed: bool = False
    """The weight is stored (in, out), as Conv1D and embeddings store it."""
    rows: tuple[int, ...] | slice | None = None
    """Output features of a fused module that belong to this site; None where all do."""
    tensor: str | None = None
    """Name of the 3-D expert tensor inside the module."""
    experts: int = 0
    """Number of experts in the tensor."""
    chosen: tuple[int, ...] | None = None
    """Experts the target named; None means all."""

    def name(self, owner: str) -> str:
        """Return the child name of a hook of `owner` here: suffixed by the part where one module has several sites."""
        if self.tensor is not None:
            return f"{owner}__{self.tensor.removesuffix('_proj')}"
        return owner if self.rows is None else f"{owner}__{self.role.rsplit('.', 1)[-1]}"

    def indices(self) -> range | tuple[int, ...]:
        """Return the output features of the module that belong to this site, in order."""
        if isinstance(self.rows, tuple):
            return self.rows
        return range(self.width_out) if self.rows is None else range(self.rows.start, self.rows.stop)

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what identifies the place: equal for two sites at the same place."""
        return self.path, str(self.rows), str(self.tensor)
