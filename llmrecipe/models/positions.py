"""How long a sequence a model can read: models that add a learned vector to each position have a fixed number of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.vocabulary import position_offset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stated_positions(config: PreTrainedConfig) -> int | None:
    """Return the positions a config states; None where it states none. Only a learned table makes them a limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def learned(model: nn.Module) -> int | None:
    """Return the rows of the learned table of positions that a sequence can use; None where positions are computed."""
    try:
        tables = [site.module for site in anatomy(model).sites if site.role == "embed.position"]
    except ModelError:
        return None
    sizes = [table.num_embeddings - _skipped(table, model) for table in tables if isinstance(table, nn.Embedding)]
    return min(sizes, default=None)


def _skipped(table: nn.Embedding, model: nn.Module) -> int:
    """Return the rows before that of the first position: OPT and BART state them, RoBERTa counts from its padding."""
    own = getattr(table, "offset", None)
    return own if isinstance(own, int) else position_offset(model)
