"""Tensors of which each process holds a part (`runtime.shard`): the part, the whole, and writing a whole into the parts.

A divided tensor is one of torch's distributed tensors: its shape and dtype are those of the whole, its memory is the part of
this process. All processes call `whole` for the same tensors in the same order, or none does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds a part of the tensor only."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, without a copy; all of it where it is not divided."""
    divided: Any = tensor
    return divided.to_local() if is_sharded(tensor) else tensor


def first_entry(tensor: Tensor) -> int:
    """Return the place, in the flattened whole, of the first entry of this process's part; parts are runs of rows."""
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    divided: Any = tensor
    _, offset = compute_local_shape_and_global_offset(divided.shape, divided.device_mesh, divided.placements)
    return int(offset[0]) * math.prod(divided.shape[1:])


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from the processes that hold its parts; the parts travel between the devices."""
    divided: Any = tensor
    return divided.to(divided.device_mesh.device_type).full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def write_whole(target: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor; of a divided one each process writes its own part, and nothing is sent."""
    if not is_sharded(target):
        target.copy_(value)
        return
    local(target).copy_(own_part(value.to(local(target).device), target))


def own_part(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole value that is divided as another tensor is."""
    from torch.distributed.tensor import distribute_tensor

    divided: Any = like
    return local(distribute_tensor(value, divided.device_mesh, divided.placements, src_data_rank=None))
