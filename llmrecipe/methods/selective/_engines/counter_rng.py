"""Random bits by address: a pure function of a text and a position, so masks need no state, no order and no storage.

The same numbers on every process, for any chunking or sharding of a tensor, and again when a block is recomputed.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def random_bits(address: str, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return 32 random bits for each of the positions first .. first + count, as int64 in [0, 2^32).

    Args:
        address: what the numbers belong to: seed, step, tensor name.
    """
    words = hashlib.sha256(address.encode()).digest()
    low, high = int.from_bytes(words[:4], "little"), int.from_bytes(words[4:8], "little")
    index = torch.arange(first, first + count, device=device, dtype=torch.int64)
    x = _mix((index & WORD) ^ low)
    return _mix((x + high + (index >> 32) * 0x9E3779B1) & WORD)


def uniform(address: str, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform numbers strictly between 0 and 1, float64 in steps of 2^-32."""
    return (random_bits(address, first, count, device).double() + 0.5) / 2.0**32


def bernoulli(address: str, first: int, count: int, p: float, device: torch.device | str = "cpu") -> Tensor:
    """Return True with probability p."""
    return random_bits(address, first, count, device) < int(p * 2**32)


def _mix(x: Tensor) -> Tensor:
    """Mix 32 bits held in int64, so that each bit depends on all (the constants of the public-domain hash `lowbias32`)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & WORD
    return x ^ (x >> 16)
