"""Float32 master weights of base tensors that train inside a 16-bit model.

16 bits would lose small updates, so a trained base tensor is stored in float32 under its own name. Where it is used it is cast
to the model's dtype for the duration of the call, in training and in every later evaluation alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook

OWNER = "float32_master"


class DowncastHook(Hook):
    """W -> W in the dtype of the model around it."""

    # Below every other weight hook: they see the tensor as the module computes with it.
    order = -4

    def __init__(self, tensor: str, dtype: torch.dtype):
        super().__init__()
        self.tensor, self.dtype = tensor, dtype
        # Whatever the role or stack, the stored tensor is float32.
        self.mounted = True

    def weight(self, value: Tensor) -> Tensor:
        """Return the master weight cast to the dtype, in its own shape."""
        return value.to(self.dtype)


def raise_to_master(model: nn.Module, parameter: nn.Parameter) -> None:
    """Make a parameter float32 in place, for every module that shares it; wider ones stay as they are."""
    dtype = parameter.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == wide:
        return
    parameter.data = parameter.data.to(wide)
    for module in list(model.modules()):
        for tensor, value in list(module._parameters.items()):
            if value is parameter:
                add_hook(module, f"{OWNER}_{tensor}", DowncastHook(tensor, dtype), OWNER)
