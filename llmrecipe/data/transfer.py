"""Copies between the host and a device, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device, copied after what the device has been given to do and without waiting for it.

    From pageable memory CUDA would wait until the device is idle, so the tensor goes through pinned memory.
    """
    place = torch.device(device)
    if tensor.device.type != "cpu" or place.type == "cpu":
        return tensor.to(place)
    pinned = tensor.pin_memory() if place.type == "cuda" else tensor
    return pinned.to(place, non_blocking=True)


def exact_float(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type of a device: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Arriving:
    """Scalars on their way from a device to the host, in one copy.

    Args:
        scalars: numbers, tensors of the host with one entry, and such tensors of one device.
    """

    def __init__(self, scalars: Sequence[Tensor | float]):
        self.known: list[Any] = list(scalars)
        self.groups: list[tuple[list[int], Tensor]] = []
        self.events: list[torch.cuda.Event] = []
        places: dict[torch.device, list[int]] = {}
        for i, value in enumerate(scalars):
            if isinstance(value, Tensor):
                places.setdefault(value.device, []).append(i)
        for device, own in places.items():
            wide = exact_float(device)
            joined = torch.stack([self.known[i].detach().reshape(()).to(wide) for i in own])
            if device.type == "cuda":
                self.groups.append((own, joined.to("cpu", non_blocking=True)))
                event = torch.cuda.Event()
                # That of the copy; without a stream, it would be one of the device that is current.
                event.record(torch.cuda.current_stream(device))
                self.events.append(event)
            else:
                # Other backends do not say when a copy that they do not wait for has arrived.
                self.groups.append((own, joined.cpu()))

    def values(self) -> list[float]:
        """Return the numbers in their order; wait until they are here."""
        for event in self.events:
            event.synchronize()
        for places, values in self.groups:
            for place, value in zip(places, values.tolist(), strict=True):
                self.known[place] = value
        self.groups, self.events = [], []
        return self.known
