"""The device profile: how a device computes what a recipe says, decided in one place and never changing what is computed.

    micro-batch      tokens that go through the model at once, by the memory of the device
    logits           positions whose logits exist at once: on a CPU as many as its last cache holds; on a GPU by free memory,
                     and where that allows as many as keep it busy, because the head's weight is read once for each chunk
    packed rows      routes of attention in the order they are tried (see `models.packed_attention`)
    compile          `blocks` compiles each block of the model; off everywhere until its gain is known net of the time it takes
    kernels          `liger` computes rotary embeddings and gated activations by fused kernels; off everywhere until their gain
                     is known, and where blocks are compiled
    optimizer        torch's implementation of a step: one kernel for all tensors, one a list, or one a tensor
    decoding         how answers are sampled: shapes that follow what is needed, or fixed ones, and those replayed as CUDA
                     graphs; `continuous` everywhere until the gain of the others is known
    entries, words   entries of a tensor, and 64-bit words of a checksum, that are worked on at once

Numbers agree over profiles up to rounding. A run decides once, stores what it decided and uses it again when it is resumed; a
key of the recipe overrides what it names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

TOKEN_BYTES = {"cpu": 12 << 20, "cuda": 5 << 20}
"""Bytes of a device's memory for each token of a micro-batch; a machine holds more than a training."""
MICRO_TOKENS = {"cpu": (512, 1024), "cuda": (1024, 8192)}
"""Fewest and most tokens of a micro-batch where the memory is known. On a CPU 1,024 spare a second sum of gradients and
products of few rows; 2,048 win little more and hold twice the activations."""
CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit of memory is written."""
LOGIT_SHARE, LOGIT_LIMIT = 128, 16
"""Size of one chunk of logits as a part of a GPU's free memory, 1/128; for the rows that keep the device busy up to 1/16."""
LEAST_ROWS = 16


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of a device."""

    kind: str
    """Its type in torch."""
    name: str = ""
    memory: int = 0
    """Bytes; 0 where it is unknown, or decides nothing."""
    free: int = 0
    """Bytes of it that are free."""


@dataclass(frozen=True)
class Decisions:
    """What a device decides where no key does."""

    micro_tokens: int = 8192
    logit_bytes: int = 16 << 20
    """Size of one chunk of float32 logits."""
    logit_rows: int = LEAST_ROWS
    """Rows of a chunk below which the device is not busy."""
    logit_limit: int = 0
    """Bytes that a chunk does not exceed for the sake of them; 0 without a limit."""
    packed_attention: tuple[str, ...] = ("loop",)
    compile: str = "off"
    """`off` or `blocks`."""
    kernels: str = "off"
    """`off` or `liger`."""
    optimizer: str = "foreach"
    decoding: str = "continuous"
    """`continuous`, `static` or `graphs`; see `engine.decoders`."""
    entries: int = 1 << 22
    words: int = 1 << 21


TABLE: Mapping[str, Decisions] = {
    "cpu": Decisions(micro_tokens=512, optimizer="fused", entries=1 << 16, words=1 << 15),
    "cuda": Decisions(logit_rows=1024, packed_attention=("varlen", "flash", "flex", "loop"), optimizer="fused"),
    "mps": Decisions(optimizer="fused"),
}
"""Decisions by the kind of the device, before its memory is looked at; other kinds have the defaults."""


def decide(facts: DeviceFacts) -> Decisions:
    """Return what a device decides."""
    found = TABLE.get(facts.kind, Decisions())
    if facts.memory:
        tokens = 1 << max(0, (facts.memory // TOKEN_BYTES[facts.kind]).bit_length() - 1)
        least, most = MICRO_TOKENS[facts.kind]
        found = replace(found, micro_tokens=min(max(tokens, least), most))
    if facts.free:
        found = replace(found, logit_bytes=facts.free // LOGIT_SHARE, logit_limit=facts.free // LOGIT_LIMIT)
    return found


def facts_of(device: torch.device | str) -> DeviceFacts:
    """Measure a device: name and memory of a GPU, memory of the machine of a CPU."""
    import torch

    place = torch.device(device)
    if place.type == "cpu":
        return DeviceFacts("cpu", memory=machine_bytes() or 0)
    if place.type != "cuda" or not torch.cuda.is_available():
        return DeviceFacts(place.type)
    free, memory = torch.cuda.mem_get_info(place)
    return DeviceFacts("cuda", torch.cuda.get_device_name(place), memory, free)


def machine_bytes() -> int | None:
    """Return the memory of this machine, or of the container this process is in; None where it is unknown."""
    sizes = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CGROUP:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        sizes += [int(text)] if text.isdigit() else []
    return min(sizes) if sizes else None


@dataclass(frozen=True)
class Profile:
    """What a device has decided, and what keys of the recipe set instead."""

    kind: str
    name: str
    decided: Decisions
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Value by the name of a decision (see `recipe.profile_keys`)."""

    @property
    def micro_tokens(self) -> int | None:
        """Return the most tokens of a micro-batch; None where it is cut by rows."""
        return cast("int | None", self._value("micro_tokens"))

    @property
    def packed_attention(self) -> tuple[str, ...]:
        """Return the routes of packed rows that are tried."""
        return cast("tuple[str, ...]", self._value("packed_attention"))

    @property
    def compiled(self) -> str:
        """Return what of the model is compiled: off or blocks; what a key says comes before what the device decides."""
        return "off" if "compile" not in self.chosen and self.chosen.get("kernels") == "liger" else str(self._value("compile"))

    @property
    def compile(self) -> bool:
        """Return whether blocks of the model are compiled."""
        return self.compiled == "blocks"

    @property
    def kernels(self) -> str:
        """Return whose fused kernels compute parts of a block: off, or liger where blocks are not compiled."""
        return "off" if self.compile else str(self._value("kernels"))

    @property
    def optimizer(self) -> str:
        """Return torch's implementation of an optimizer: fused, foreach or single."""
        return str(self._value("optimizer"))

    @property
    def decoding(self) -> str:
        """Return how answers are decoded: continuous, static or graphs."""
        return str(self._value("decoding"))

    def logit_rows(self, vocabulary: int) -> int:
        """Return the number of positions whose float32 logits (V,) are formed at once."""
        if "logit_rows" in self.chosen:
            return int(self.chosen["logit_rows"])
        own, width = self.decided, 4 * max(1, vocabulary)
        rows = max(own.logit_rows, own.logit_bytes // width)
        return max(LEAST_ROWS, min(rows, own.logit_limit // width) if own.logit_limit else rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON."""
        return {"kind": self.kind, "name": self.name, "decided": asdict(self.decided), "chosen": dict(self.chosen)}

    def _value(self, name: str) -> object:
        return self.chosen[name] if name in self.chosen else getattr(self.decided, name)


def profile_from(stored: Mapping[str, Any]) -> Profile:
    """Return the profile that `Profile.to_dict` stored, without what keys had set.

    Raises:
        ValueError: a value is none of its kind. A decision that is not known here is left out, one that is missing is that of
            the table.
    """
    kind, name, known = stored["kind"], stored["name"], stored["decided"]
    if not (isinstance(kind, str) and isinstance(name, str) and isinstance(known, Mapping)):
        raise ValueError("its device has no name")
    table = TABLE.get(kind, Decisions())
    found: dict[str, Any] = {}
    for key, default in asdict(table).items():
        value = known.get(key, default)
        value = tuple(value) if isinstance(value, list) else value
        if key == "compile" and isinstance(value, bool):
            # As versions wrote it that had no other word.
            value = "blocks" if value else "off"
        if type(value) is not type(default) or (type(value) is int and value < 0):
            raise ValueError(f"its device profile has {key}={value!r:.60}")
        found[key] = value
    return Profile(kind, name, Decisions(**found))


_in_use: dict[str, Profile] = {}


def profile_of(device: torch.device | str) -> Profile:
    """Return the profile in use for devices of a kind: that of the run, or what the device decides by itself."""
    kind = device if isinstance(device, str) else device.type
    if kind not in _in_use:
        facts = facts_of(device)
        _in_use[kind] = Profile(kind, facts.name, decide(facts))
    return _in_use[kind]


def use(profile: Profile) -> None:
    """Compute on devices of its kind by a profile from here on (see `kept_profiles`)."""
    _in_use[profile.kind] = profile


@contextlib.contextmanager
def kept_profiles() -> Iterator[None]:
    """Restore, on exit, the profiles in use."""
    known = dict(_in_use)
    try:
        yield
    finally:
        _in_use.clear()
        _in_use.update(known)
