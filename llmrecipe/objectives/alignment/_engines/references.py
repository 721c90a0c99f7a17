"""The reference of a preference objective, and how it may follow the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import RefSync
from llmrecipe.engine.reference_cache import NAMED
from llmrecipe.engine.reference_model import check_path
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.method import Stage

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import Recipe


def check_reference(recipe: Recipe, reference: str, sync: RefSync | None, allowed: tuple[str, ...] = NAMED) -> None:
    """Refuse a reference that does not exist, and one that cannot follow the policy.

    A reference moves in weight space, so the policy must train weights of its own base: where the reference is the base with
    adapters disabled there is nothing to move, and the mean of two adapters' factors is not the mean of their products.

    Raises:
        RecipeError: naming the key and what is allowed.
    """
    check_path(reference, allowed)
    if sync is None:
        return
    if reference != "initial":
        raise RecipeError(f"objective.ref_sync: only reference=initial can follow; got objective.reference={reference}")
    for name, body in recipe.stack.items():
        if registry.load_class("stack", body["kind"], f"stack.{name}").stage is Stage.INJECT:
            raise RecipeError(
                f"objective.ref_sync: with '{name}' the reference is the base without it, which cannot move; train the base's "
                "own weights (stack=[], or a selective method such as bitfit), or drop ref_sync"
            )


def follow(sync: RefSync | None, step: int, roles: Roles) -> None:
    """Set pi_ref <- alpha pi + (1 - alpha) pi_ref when `step` is a multiple of `sync.steps` (TR-DPO, arXiv 2404.09656)."""
    if sync is not None and step % sync.steps == 0:
        roles.stack.mix_reference(roles.model, sync.alpha)
