"""Figures drawn into a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmrecipe.core.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, missing: str = "") -> Figure:
    """Return an empty figure; neither the backend nor the open figures of the calling process are touched.

    Args:
        width: inches.
        height: inches.
        missing: what to do without matplotlib, the end of the message.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError(f"a plot needs matplotlib: pip install 'llmrecipe[plots]'{missing and '; ' + missing}") from error
    return Figure(figsize=(width, height), layout="constrained")
