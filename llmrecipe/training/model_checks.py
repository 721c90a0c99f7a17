"""What a run requires of its model's forward pass, tried on a few made-up tokens before the first step.

Nothing of it can be seen in a loss: a model that sees the token it is to predict learns very well.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import activate
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.row_reading import SHORT, same_states
from llmrecipe.models.vocabulary import input_embedding
from llmrecipe.recipe.sharding_rules import PLAIN

if TYPE_CHECKING:
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.schema import Recipe


def check_forward_pass(recipe: Recipe, objective: Objective, roles: Roles) -> None:
    """Refuse a model whose forward pass is not what the objective takes it for.

    Raises:
        ModelError: it is to predict the next token and sees it; or its own scores differ from those that would be trained.
        RecipeError: rows of different lengths need passes of their own, and the processes must all make the same passes.
    """
    engine = roles.engine
    family = engine.model.config.model_type
    reading = engine.reading
    if objective.model_head() == "causal" and not engine.is_pair_model and not reading.causal:
        encoder = getattr(engine.model.config, "is_decoder", True) is False
        remedy = "set model.config.is_decoder=true, or" if encoder else "take a decoder, or"
        raise ModelError(
            f"model.path: in '{family}' a token sees those that follow it, so a run that predicts the next token would be "
            f"shown it; {remedy} train it with an objective for encoders such as mlm or contrastive"
        )
    if reading.apart and recipe.runtime.shard != PLAIN:
        raise RecipeError(
            f"runtime.shard={recipe.runtime.shard}: the states of '{family}' depend on the padding of a batch, so rows of "
            "different lengths are read in passes of their own, whose number differs between processes; use runtime.shard=none"
        )
    if objective.model_head() in ("causal", "masked") and not engine.is_pair_model:
        check_scores(roles)


@torch.no_grad()
def check_scores(roles: Roles) -> None:
    """Refuse a model whose own log-probabilities are not finite, or not those of the engine: other positions, head or scale.

    Raises:
        ModelError: it says by how much.
    """
    engine, model = roles.engine, roles.model
    embedding = input_embedding(model)
    if not isinstance(embedding, nn.Embedding):
        return
    ids = [i % embedding.num_embeddings for i in range(3, 3 + SHORT)]
    batch = pad([Sequence(ids, [0] + [1] * (SHORT - 1))], roles.pad_id).to(roles.device)
    cast = torch.autocast(roles.device.type, dtype=engine.autocast or torch.bfloat16, enabled=engine.autocast is not None)
    plain: Any = model
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        with roles.evaluating():
            own = engine(batch)["logprobs"]
            with activate(batch.context()), cast:
                logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more).logits[0]
    except Exception:  # families raise whatever their own code leads to; an inspection stops no run
        return
    stock = logits.float().log_softmax(-1)[: SHORT - 1].gather(-1, batch.target[:, None]).squeeze(-1)
    if not bool(stock.isfinite().all()):
        raise ModelError(
            f"model.path: '{model.config.model_type}' gives a few probe tokens log-probabilities that are not finite, before "
            "anything is trained: weights of the checkpoint are damaged, or its numbers overflow in "
            f"{engine.autocast or next(model.parameters()).dtype}"
        )
    if not same_states(model, own, stock, coarse=engine.autocast is not None):
        apart = float((own.float() - stock).abs().max())
        raise ModelError(
            f"model.path: '{model.config.model_type}' scores a few probe tokens with log-probabilities that differ by up to "
            f"{apart:.3g} from those this run would train: the family counts positions or scales its scores in a way that is "
            "not known here; nothing was trained"
        )
