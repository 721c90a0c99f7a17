"""64-bit checksums of tensors, formed where the tensors are: which of them an update has changed, without a copy of any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmrecipe.core.device_profile import profile_of

SEED = 0x5EED
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by size in bytes."""


@torch.no_grad()
def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Return one 64-bit checksum per tensor, (n,) int64 on the CPU.

    sum_i w_i x_i mod 2^64 over the 64-bit words x_i of the tensor's memory, with fixed odd random w_i: a single changed word
    always changes it, several changed or exchanged ones do but for one case in 2^64. Nothing larger than one chunk is
    allocated, and each device is synchronised once.
    """
    found: list[Tensor] = []
    weights: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        device = tensor.device
        if device not in weights:
            weights[device] = _weights(profile_of(device).decided.words).to(device)
        found.append(_checksum(integer_view(tensor), weights[device]))
    sums = torch.zeros(len(found), dtype=torch.int64)
    for device in weights:
        places = [i for i, value in enumerate(found) if value.device == device]
        sums[places] = torch.stack([found[i] for i in places]).cpu()
    return sums


def named_checksums(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return name -> (64-bit checksum, sizes)."""
    sums = checksums(tensors.values()).tolist()
    return {name: (value, *tensor.shape) for (name, tensor), value in zip(tensors.items(), sums, strict=True)}


def integer_view(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as a flat view of integers: of 64 bits where size and alignment allow."""
    # A sharded tensor has its own part on each process.
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.detach().as_subclass(Tensor)
    dense = torch.ops.aten.is_non_overlapping_and_dense(flat)
    # A transposed matrix is read in the order of its memory, since a reshape would copy it.
    flat = flat.as_strided((flat.numel(),), (1,)) if dense else flat.reshape(-1).contiguous()
    size = flat.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return flat.view(torch.int64)
    return flat.view(INTEGERS[size]) if size in INTEGERS else flat.view(torch.int32)


def _weights(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


def _checksum(words: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of integers (n,) as a scalar; each chunk is weighted once more by an odd power."""
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    factor = 1
    for part in words.split(weights.numel()):
        one = (part * weights[: part.numel()]).sum()
        total = total.add_(one if factor == 1 else one * factor)
        factor = _wrapped(factor * 0x2545F4914F6CDD1D)
    return total


def _wrapped(value: int) -> int:
    """Return an integer modulo 2^64 as a signed one."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
