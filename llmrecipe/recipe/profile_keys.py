"""The keys of a recipe that override what the device profile decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrecipe.core import device_profile
from llmrecipe.core.device_profile import Profile, decide
from llmrecipe.core.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from llmrecipe.recipe.schema import Recipe

KEYS = {
    "micro_tokens": "batch.tokens",
    "logit_rows": "runtime.logit_rows",
    "packed_attention": "model.packed_attention",
    "compile": "model.compile",
    "kernels": "model.kernels",
    "optimizer": "runtime.optimizer_kernel",
    "decoding": "runtime.decoding",
}
"""Decision of the profile -> the key that overrides it. `batch.micro` cuts micro-batches by rows, so that no number of tokens
does unless `batch.tokens` gives one."""


def choices(recipe: Recipe) -> dict[str, Any]:
    """Return what the keys of a recipe decide, by the name of the decision."""
    found: dict[str, Any] = {}
    if recipe.batch.tokens is not None or recipe.batch.micro is not None:
        found["micro_tokens"] = recipe.batch.tokens
    if recipe.runtime.logit_rows is not None:
        found["logit_rows"] = recipe.runtime.logit_rows
    if recipe.model.packed_attention != "auto":
        found["packed_attention"] = (recipe.model.packed_attention,)
    if recipe.model.compile != "auto":
        found["compile"] = recipe.model.compile
    if recipe.model.kernels != "auto":
        found["kernels"] = recipe.model.kernels
    if recipe.runtime.optimizer_kernel != "auto":
        found["optimizer"] = recipe.runtime.optimizer_kernel
    if recipe.runtime.decoding != "auto":
        found["decoding"] = recipe.runtime.decoding
    return found


def check_device(recipe: Recipe, device: torch.device | str) -> None:
    """Refuse a key that names what a device does not have, before any weight is read.

    Raises:
        RecipeError: it names both.
    """
    kind = str(device).partition(":")[0]
    if recipe.runtime.decoding == "graphs" and kind != "cuda":
        raise RecipeError(
            f"runtime.decoding: graphs needs a CUDA GPU, and the device is {kind}; use auto, continuous or static"
        )


def profile_for(recipe: Recipe, device: torch.device | str, known: Profile | None = None) -> Profile:
    """Return the profile of a recipe on a device.

    Args:
        known: what an earlier start of the run decided; it holds on a device of the same kind and name.
    """
    facts = device_profile.facts_of(device)
    same = known is not None and (known.kind, known.name) == (facts.kind, facts.name)
    decided = known.decided if known is not None and same else decide(facts)
    chosen = choices(recipe)
    if chosen.get("decoding") == "graphs" and facts.kind != "cuda":
        # A training is refused (see `check_device`); what it leaves opens on any machine.
        del chosen["decoding"]
    return Profile(facts.kind, facts.name, decided, chosen)


def profile_line(profile: Profile, recipe: Recipe, vocabulary: int | None, routes: tuple[str, ...]) -> str:
    """Return what was decided in one line; what a key decided is followed by the key.

    Args:
        vocabulary: logits of a position; None of a model of images.
        routes: those of packed rows that this machine has; none where rows are padded.
    """
    rows = f"{recipe.batch.micro:,} rows (batch.micro)" if recipe.batch.micro is not None else ""
    tokens = f"{profile.micro_tokens:,} tokens" if profile.micro_tokens is not None else ""
    parts = {
        "micro_tokens": f"micro-batches of at most {' and '.join(filter(None, (rows, tokens)))}",
        "logit_rows": f"logits of {profile.logit_rows(vocabulary):,} positions at once" if vocabulary else "",
        "packed_attention": f"packed attention by {' or '.join(routes)}" if routes else "",
        "compile": f"compile {profile.compiled}",
        "kernels": f"kernels {profile.kernels}" if profile.kernels != "off" or "kernels" in profile.chosen else "",
        "optimizer": f"{profile.optimizer} optimizer",
        "decoding": f"{profile.decoding} decoding",
    }
    said = [f"{text} ({KEYS[name]})" if profile.chosen.get(name) is not None else text for name, text in parts.items() if text]
    return f"device: {profile.name or profile.kind}; {', '.join(said)}"
