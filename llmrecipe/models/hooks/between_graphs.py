"""Calls that `torch.compile` does not trace: they run between compiled graphs, as everything inside them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

apart: Callable[..., Any] | None = None
"""Calls a function with its arguments untraced; None where nothing is compiled."""


def call_apart(function: Callable[..., T], *args: object) -> T:
    """Call a function between graphs, where there are any."""
    return function(*args) if apart is None else apart(function, *args)
