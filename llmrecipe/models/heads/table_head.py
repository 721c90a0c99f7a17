"""Values that are kept with a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TableHead(nn.Module):
    """Numbers (V, D) kept with a model, which nothing trains."""

    table: Tensor

    def __init__(self, values: Tensor):
        super().__init__()
        self.register_buffer("table", values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True))
