"""A reference that is another model: loaded alone, run once on every row, and freed before the policy is loaded.

Two models are never in memory together. The scores are stored in a file named by the content of that model's weights and of the
rows, so a second run on the same rows finds them there.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrecipe.core.console import lasting
from llmrecipe.core.device_profile import profile_of
from llmrecipe.core.errors import ModelError, RecipeError, did_you_mean
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.packing import packing_for
from llmrecipe.engine.reference_cache import NAMED, ReferenceCache, cache_file, weights_digest
from llmrecipe.engine.reference_policy import PlannedRows, ScoredObjective, row_groups, score_all
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.recipe.content_key import REFERENCE
from llmrecipe.runs.open_model import LoadedModel, is_adapter, open_model, run_folder, tokenizer_of

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import Recipe


def check_path(path: str, allowed: tuple[str, ...]) -> None:
    """Refuse a reference that is neither a named one nor the folder of a model or a finished run.

    Args:
        allowed: the named references the objective knows.

    Raises:
        RecipeError: naming what is allowed, and the nearest spelling.
    """
    # The result of a stage that has not run yet is looked at when it has.
    if path in allowed or REFERENCE.fullmatch(path):
        return
    folder = Path(path)
    if path not in NAMED and folder.is_dir():
        if run_folder(path) is None and not is_adapter(path) and not (folder / "config.json").is_file():
            raise RecipeError(f"objective.reference: {path} holds neither a model (config.json) nor a finished run (final/)")
        return
    raise RecipeError(
        f"objective.reference: must be {', '.join(allowed)}, or the folder of a model or a finished run; "
        f"got {path!r}{did_you_mean(path, allowed)}"
    )


def scored(recipe: Recipe, objective: ScoredObjective, rows: PlannedRows, device: torch.device) -> ReferenceCache:
    """Score every row of a run under the model in the reference's folder; return an empty cache where the reference is named.

    Raises:
        ModelError: the folder's model reads other tokens than the policy writes.
    """
    path = objective.reference_of()
    if path in NAMED:
        return ReferenceCache()
    tokenizer = tokenizer_of(recipe.model, recipe.tokenizer)
    section = recipe.model.model_copy(update={"path": path, "adapters": {}, "continue_": False, "init": "pretrained"})
    # Options of the policy's own tokenizer (a template, added tokens) say nothing about the tokens this model was trained on.
    model = open_model(section, type(recipe.tokenizer)(), head=objective.model_head(), device=device.type)
    if model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"objective.reference: {path} reads other tokens than the policy; take a model of the same vocabulary")
    cache = _score(model, row_groups(objective, rows), recipe, objective, rows.train.key, device)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return cache


def _score(
    model: LoadedModel,
    groups: Iterable[list[dict[str, Any]]],
    recipe: Recipe,
    objective: ScoredObjective,
    rows: str,
    device: torch.device,
) -> ReferenceCache:
    with lasting("hashing the weights of the reference"):
        weights = weights_digest({**dict(model.model.named_parameters()), **dict(model.model.named_buffers())})
    cache = ReferenceCache(cache_file({"model": weights, "data": rows}))
    model.model.to(device)
    engine = Engine(model.model).eval()
    packing = packing_for(recipe.data.packing, engine, device)
    roles = Roles(
        engine, Stack([]), model.tokenizer, device, packing, recipe.batch.micro, profile_of(device).micro_tokens, cache
    )
    score_all(groups, objective, roles)
    return cache
