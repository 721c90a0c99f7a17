"""llmrecipe: a recipe in, a trained model out.

    from llmrecipe import compose, check, train, load

    recipe = compose("dpo_lora", ["optim.lr=1e-4"])
    run = train(recipe)
    model, tokenizer = load(run.dir)

The four functions are imported when they are first used, so `import llmrecipe` costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrecipe.interop.load_run import load
    from llmrecipe.recipe.compose import compose
    from llmrecipe.training.dry_run import check
    from llmrecipe.training.train import train

# bitsandbytes, which Transformers imports along with any model, warns about an optional kernel whether or not it is used.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["check", "compose", "load", "train"]

_HOMES = {
    "compose": "llmrecipe.recipe.compose",
    "check": "llmrecipe.training.dry_run",
    "train": "llmrecipe.training.train",
    "load": "llmrecipe.interop.load_run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmrecipe' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
