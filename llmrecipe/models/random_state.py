"""Random draws that leave no trace in the run's own streams."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def random_state_kept(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context on whose exit the generators of the CPU and of a device are what they were before.

    torch's own, without a list of devices, goes through all GPUs of the machine and warns where there are several.
    """
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
