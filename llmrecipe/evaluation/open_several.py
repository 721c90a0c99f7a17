"""Loading several runs on one shared base, under their recipes and with the overrides that apply to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmrecipe.core import registry
from llmrecipe.core.errors import UserError
from llmrecipe.evaluation.eval_recipe import recipe_of
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.recipe.compose import Composition
from llmrecipe.recipe.overrides import Word, parse_overrides
from llmrecipe.recipe.rights import KEYS, rights_of

if TYPE_CHECKING:
    from llmrecipe.interop.multi_adapter import Adapters

REQUESTED = ("runtime",)
"""Sections of a recipe that matter to a conversation."""
SCORED = ("data", "eval", "objective", "batch", "runtime", "seed")
"""Sections that matter to an evaluation."""


def share(paths: Sequence[str], overrides: Sequence[str], sections: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of each run.

    Values of the sections and rights go to all of them; an option that a method allows to change on a finished run
    (`stack.dylora.rank=2`) goes to the runs that have it.

    Args:
        sections: sections that apply.

    Raises:
        UserError: a word would have no effect: the base is loaded once, and adapters are as they were trained.
    """
    found: dict[str, list[str]] = {path: [] for path in paths}
    for word in parse_overrides(list(overrides)):
        to_all = word.key[0] in sections or word.key in KEYS
        takers = list(paths) if to_all else [path for path in paths if ".".join(map(str, word.key)) in free(path)]
        if not takers:
            raise UserError(_refusal(word, paths, sections))
        for path in takers:
            found[path].append(word.text)
    return found


def open_several(paths: Sequence[str], overrides: Sequence[str], sections: Sequence[str]) -> tuple[Adapters, list[Composition]]:
    """Load the runs' adapters on their shared base, and return them with the recipe of each run.

    Raises:
        UserError: see `share`, or the runs do not share one base.
    """
    from llmrecipe.evaluation.evaluate_model import chosen_again
    from llmrecipe.interop.multi_adapter import open_adapters

    words = share(paths, overrides, sections)
    recipes = [recipe_of(path, words[path]) for path in paths]
    options = {p: chosen_again(recipe) for p, recipe in zip(paths, recipes, strict=True) if run_folder(p) is not None}
    return open_adapters(paths, options=options, rights=rights_of(recipes[0].recipe.model)), recipes


def free(path: str) -> list[str]:
    """Return the keys of a run's own stack that may change after training."""
    stack = recipe_of(path, []).recipe.stack
    return [f"stack.{name}.{o}" for name, m in stack.items() for o in registry.load_class("stack", m["kind"]).adjustable]


def _refusal(word: Word, paths: Sequence[str], sections: Sequence[str]) -> str:
    options = dict.fromkeys(key for path in paths for key in free(path))
    allowed = [*(s if s == "seed" else f"{s}.*" for s in sections), *options]
    return (
        f"'{word.text}': has no effect on several runs side by side, whose base is loaded once and whose adapters are as they "
        f"were trained (what applies: {', '.join(allowed)}); name one run alone for anything else"
    )
