"""Patch embedding: X = [c; W vec(P_1) + b; ...; W vec(P_N) + b], the input of a vision transformer.

An image (C, S, S) is cut into N = (S / p)^2 patches P_n of p x p pixels, row by row; vec lists a patch's pixels channel by
channel, W in R^(D, C p p). c in R^D is a learned class token whose last state the classifier reads. The N + 1 places get
positions like tokens do.

Config: kind: vision, image_size (S), patch_size (p), num_channels (C).
Paper: An Image is Worth 16x16 Words (arXiv 2010.11929).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrecipe.models.native.config import NativeConfig


class PatchEmbedding(nn.Module):
    """Images (B, C, S, S) -> (B, 1 + N, D)."""

    def __init__(self, config: NativeConfig):
        super().__init__()
        self.shape = (config.num_channels, config.image_size, config.image_size)
        self.size = config.patch_size
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.class_token = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Cut, project and prepend the class token.

        Raises:
            ValueError: images of another size or number of channels than the config's.
        """
        if tuple(pixel_values.shape[1:]) != self.shape:
            given, wanted = (" x ".join(map(str, shape)) for shape in (tuple(pixel_values.shape[1:]), self.shape))
            raise ValueError(f"pixel_values: images of {given}; this model reads {wanted} (channels x height x width)")
        cut = pixel_values.to(self.projection.weight.dtype).unflatten(2, (-1, self.size)).unflatten(4, (-1, self.size))
        patches = self.projection(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        return torch.cat((self.class_token.to(patches.dtype).expand(len(patches), 1, -1), patches), 1)
