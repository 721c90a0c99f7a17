"""Truncation: leave the row out."""

from __future__ import annotations

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.truncation import Truncation


@register
class Drop(Truncation):
    """The row is left out and counted; too many of them stop the run (data.max_dropped)."""
