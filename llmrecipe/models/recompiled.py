"""Functions under `torch.compile` that may have many graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

KINDS = 64
"""Graphs of one piece of code, over kinds of calls and shapes; after that many it runs uncompiled. torch's own limit is 8."""


def recompiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:  # noqa: ANN401 - torch's options
    """Return a compiled function that is compiled again for up to `KINDS` kinds of calls."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = KINDS
    else:
        # Older versions of torch know one limit, for all.
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, KINDS)
    compiled: Callable[..., Any] = torch.compile(function, **options)
    return compiled
