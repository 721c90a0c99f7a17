"""Random bits by address are those of lowbias32 in plain integers, at any position and for any chunk."""

from __future__ import annotations

import hashlib

import pytest
import torch

from llmrecipe.methods.selective._engines.counter_rng import bernoulli, random_bits, uniform

WORD = 2**32 - 1


def mixed(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def bits(address: str, at: int) -> int:
    words = hashlib.sha256(address.encode()).digest()
    low, high = int.from_bytes(words[:4], "little"), int.from_bytes(words[4:8], "little")
    return mixed(mixed(at & WORD ^ low) + high + (at >> 32) * 0x9E3779B1 & WORD)


@pytest.mark.parametrize("first", [0, 2**31 - 3, 2**32 - 3, 5 * 2**32 + 7])
def test_words_are_those_of_the_hash(first: int) -> None:
    """Positions where a signed number, and the lower half of a position, begin anew are among them."""
    wanted = [bits("7:2:w", at) for at in range(first, first + 40)]
    assert max(wanted) >= 2**31 > min(wanted)
    found = random_bits("7:2:w", first, 40)
    assert found.dtype == torch.int64 and found.tolist() == wanted
    assert uniform("7:2:w", first, 40).tolist() == [(word + 0.5) / 2.0**32 for word in wanted]
    assert bernoulli("7:2:w", first, 40, 0.25).tolist() == [word < 2**30 for word in wanted]
    assert torch.equal(torch.cat([random_bits("7:2:w", first, 5), random_bits("7:2:w", first + 5, 35)]), found)
    assert random_bits("7:2:w", first, 0).tolist() == []
