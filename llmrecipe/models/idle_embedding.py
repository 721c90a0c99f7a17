"""The embedding of an encoder-decoder that is never called."""

from __future__ import annotations

from torch import nn

from llmrecipe.models.pretrained import pretrained


def idle_embedding(model: nn.Module) -> nn.Module | None:
    """Return the embedding that only lends its weight to those of encoder and decoder; None where there is none."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    whole = pretrained(model).get_input_embeddings()
    sides = [pretrained(side).get_input_embeddings() for side in (model.get_encoder(), model.get_decoder())]  # type: ignore[operator]
    lent = all(side is not whole and side.weight is whole.weight for side in sides)
    return whole if lent else None
