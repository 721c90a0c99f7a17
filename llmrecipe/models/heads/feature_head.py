"""From features to inputs of a text model: patches of pictures, regions with their boxes, frames of sound or video.

Letters: M features, W width of a feature, D hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.models.sinusoids import sinusoids

FORMS = ("patch", "region", "frame")
GEOMETRY = 7
"""Numbers of a box, behind the vector of its region."""


class FeatureHead(nn.Module):
    """Features (M, W) and their places (M, 2) -> inputs (M, D), in float32 at least.

    - patch: W f + b + S [s(row); s(column)], s the sinusoids of a place, S and W trained, b what tells pictures from text;
    - frame: W f + b + S s(number);
    - region: LN(LN(W f + b) + LN(W' p + b') + t), p the seven numbers of its box (UNITER, arXiv 1909.11740).
    """

    def __init__(self, form: str, width: int, hidden: int, seed: int = 0, std: float = 0.02):
        super().__init__()
        self.form, self.width, self.hidden = form, width, hidden
        own = width - GEOMETRY if form == "region" else width
        self.add_module(form, nn.Linear(own, hidden))
        if form == "region":
            self.box = nn.Linear(GEOMETRY, hidden)
            self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
            self.kind = nn.Parameter(torch.zeros(hidden))
        else:
            self.position = nn.Linear(hidden, hidden, bias=False)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0.0, std, generator=draws)
                    if layer.bias is not None:
                        layer.bias.zero_()

    @property
    def projection(self) -> nn.Linear:
        """Return the layer that reads the vectors."""
        found = self.get_submodule(self.form)
        assert isinstance(found, nn.Linear)
        return found

    def forward(self, values: Tensor, places: Tensor) -> Tensor:
        """Return the inputs (M, D)."""
        with torch.autocast(values.device.type, enabled=False):
            values = values.to(torch.promote_types(self.projection.weight.dtype, torch.float32))
            if self.form == "region":
                found, boxes = values.split([self.width - GEOMETRY, GEOMETRY], -1)
                first, second, last = self.norms
                return last(first(self.projection(found)) + second(self.box(boxes)) + self.kind)
            return self.projection(values) + self.position(self._waves(places).to(values.dtype))

    def _waves(self, places: Tensor) -> Tensor:
        """Return the sinusoids (M, D) of places: half of them for the row and half for the column of a patch."""
        if self.form == "frame":
            return sinusoids(places[:, 0], self.hidden)
        half = 2 * (self.hidden // 4)
        row, column = (sinusoids(places[:, axis], half) for axis in (0, 1))
        return F.pad(torch.cat((row, column), -1), (0, self.hidden - 2 * half))
