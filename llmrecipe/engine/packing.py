"""How many tokens a micro-batch holds on a device, and whether rows may be packed on the model at hand."""

from __future__ import annotations

import torch
from torch import nn

from llmrecipe.core.device_profile import profile_of
from llmrecipe.core.errors import RecipeError
from llmrecipe.data.collate import Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.models.attention import one_by_one
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.vocabulary import input_embedding


def micro_tokens(device: torch.device) -> int:
    """Return the most tokens of a micro-batch on a device, where the recipe does not say."""
    return profile_of(device).decided.micro_tokens


def packing_for(wanted: str, engine: Engine, device: torch.device) -> bool:
    """Return whether rows are packed: measured on the model at hand, not looked up in a list.

    Where attention in one call does not give the model's states on a GPU, documents are computed one by one, if that does
    (`Engine.one_by_one`).

    Raises:
        RecipeError: packing is `on` and documents of a packed row would see each other.
    """
    if wanted == "off":
        return False
    if isolates(engine, device):
        return True
    if device.type != "cpu" and (name := one_by_one(engine.model)) is not None:
        engine.one_by_one = isolates(engine, device)
        if engine.one_by_one:
            return True
        pretrained(engine.model).set_attn_implementation(name)
    if wanted == "on":
        raise RecipeError("data.packing: this model's attention cannot keep packed documents apart; use packing=auto or off")
    return False


@torch.no_grad()
def isolates(engine: Engine, device: torch.device) -> bool:
    """Return whether two documents packed into one row give the hidden states of rows of their own."""
    embedding = input_embedding(engine.model)
    if engine.is_pair_model or not isinstance(embedding, nn.Embedding):
        return False
    was = engine.training
    engine.eval()
    try:
        vocabulary = embedding.num_embeddings
        first = Sequence([i % vocabulary for i in range(3, 9)], [0] * 6)
        second = Sequence([i % vocabulary for i in range(11, 16)], [0] * 5)
        both = engine.hidden_of(pack([first, second]).to(device))[0].float()
        apart = [engine.hidden_of(pad([s], 0).to(device))[0].float() for s in (first, second)]
        scale = both.abs().max().clamp_min(1e-6)
        tolerance = 1e-4 if both.dtype == torch.float32 and engine.autocast is None else 5e-2
        low = next(engine.model.parameters()).dtype != torch.float32
        return bool(((both - torch.cat(apart)).abs().max() / scale) < (5e-2 if low else tolerance))
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    finally:
        engine.train(was)
