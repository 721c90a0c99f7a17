"""Random bits by address: a pure function of a text and a position, so masks need no state, no order and no storage.

The same numbers on every process, for any chunking or sharding of a tensor, and again when a block is recomputed.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
"""Shifts and factors of the public-domain hash `lowbias32`."""


def random_bits(address: str, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return 32 random bits for each of the positions first .. first + count, as int64 in [0, 2^32).

    Args:
        address: what the numbers belong to: seed, step, tensor name.
    """
    return _words(address, first, count, device).long().bitwise_and_(WORD)


def uniform(address: str, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform numbers strictly between 0 and 1, float64 in steps of 2^-32."""
    # With its first bit turned, a word read as a signed number is 2^31 below what it is without a sign.
    signed = _words(address, first, count, device).bitwise_xor_(-(2**31))
    return signed.double().add_(2.0**31 + 0.5).mul_(2.0**-32)


def bernoulli(address: str, first: int, count: int, p: float, device: torch.device | str = "cpu") -> Tensor:
    """Return True with probability p."""
    return random_bits(address, first, count, device) < int(p * 2**32)


def _words(address: str, first: int, count: int, device: torch.device | str) -> Tensor:
    """Return the bits as int32, whose products wrap: half the memory of int64, and processors multiply many at once."""
    words = hashlib.sha256(address.encode()).digest()
    low, high = int.from_bytes(words[:4], "little"), int.from_bytes(words[4:8], "little")
    form = _host_part if torch.device(device).type == "cpu" else _device_part
    parts = []
    while count:
        # The upper half of a position is the same for 2^32 of them.
        size = min(count, (first | WORD) + 1 - first)
        parts.append(form(first & WORD, size, low, high + (first >> 32) * 0x9E3779B1 & WORD, device))
        first, count = first + size, count - size
    return parts[0] if len(parts) == 1 else torch.cat(parts or [torch.empty(0, device=device, dtype=torch.int32)])


def _host_part(first: int, size: int, low: int, high: int, device: torch.device | str) -> Tensor:
    """Return the bits of some positions in NumPy's unsigned numbers, whose shifts need no masks."""
    x = np.arange(first, first + size, dtype=np.uint32)
    x ^= np.uint32(low)
    _mix_unsigned(x)
    x += np.uint32(high)
    _mix_unsigned(x)
    return torch.from_numpy(x.view(np.int32))


def _mix_unsigned(x: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
    shifted = np.empty_like(x)
    for right, factor in ROUNDS:
        np.right_shift(x, np.uint32(right), out=shifted)
        x ^= shifted
        if factor != 1:
            x *= np.uint32(factor)


def _device_part(first: int, size: int, low: int, high: int, device: torch.device | str) -> Tensor:
    """Return the same bits, formed on a device."""
    x = torch.arange(size, device=device, dtype=torch.int32).add_(_signed(first)).bitwise_xor_(_signed(low))
    return _mix(_mix(x).add_(_signed(high)))


def _signed(word: int) -> int:
    """Return the signed number with the last 32 bits of a number."""
    return (word + 2**31 & WORD) - 2**31


def _mix(x: Tensor) -> Tensor:
    """Mix int32 in place, so that each bit depends on all."""
    shifted = torch.empty_like(x)
    for right, factor in ROUNDS:
        # A shift of signed numbers brings copies of the first bit, which are masked away.
        torch.bitwise_right_shift(x, right, out=shifted).bitwise_and_(WORD >> right)
        x.bitwise_xor_(shifted)
        if factor != 1:
            x.mul_(_signed(factor))
    return x
