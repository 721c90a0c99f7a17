"""How long, how fast and what a fitted recipe trains: its stack, rate, epochs and evaluations, by rows and model size.

The rates follow the size of the model: those that large models are usually fine-tuned with, above them those that smaller
ones need and can bear. A LoRA takes about ten times the rate of full fine-tuning.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrecipe.cli.fitted import Fitted
    from llmrecipe.recipe.schema import Recipe

SMALL, LARGE = 20_000_000, 500_000_000
"""Parameters: below the first a model learns rows by heart and has no room for branches next to its weights."""
BRANCHES = {"lora", "dora"}
"""Methods whose rate is known to follow that of full fine-tuning."""
RATES = {"whole": (5e-5, 1e-5), "branches": (5e-4, 2e-4), "preferences": (1e-4, 5e-5)}
"""What trains -> its rate below and above LARGE."""
BY_HEART = (50, 500_000)
"""Epochs after which a small model knows rows by heart, and tokens that all of them may have (two minutes of one core)."""
UPDATES = 100
"""Fewest optimizer steps that change a model noticeably."""
MOST_EPOCHS = {"dialogue": 10, "text": 10, "labelled": 20, "scored": 20, "tagged": 20, "passages": 10, "choices": 10}
"""Row type -> epochs that few rows are read at most; others keep the epochs of the recipe they extend."""
PREFERENCES = ("preference", "unpaired", "prompt")
"""Row types whose answers move a model that has been fine-tuned already."""


def fit_training(found: Fitted, parent: Recipe, parameters: int | None, lengths: list[int]) -> None:
    """Set what trains, at which rate, for how many epochs, and when it is evaluated, each with a remark.

    Args:
        parent: the recipe that is extended, with what has been chosen so far.
        parameters: of the model; None where its files do not say it, and it is then taken for a large one.
        lengths: tokens of each row that was counted.
    """
    if parent.model.init == "random" or parent.epochs is None:
        return
    rows = found.reading.rows
    small = parameters is not None and parameters < SMALL
    of_size = _of_size(parameters)
    held_out = float(found.settings["data"].get("validation", 0.0))
    size = found.settings.get("batch", {}).get("size", parent.batch.size)
    each = max(1, math.ceil(int(found.rows * (1 - held_out)) / size))
    if small and rows == "dialogue" and found.objective == "sft":
        _by_heart(found, parent, of_size, each, lengths, held_out)
        return
    if not small:
        _rate(found, parent, parameters, of_size)
    wanted = max(math.ceil(parent.epochs), math.ceil(UPDATES / each))
    epochs = min(wanted, max(MOST_EPOCHS.get(rows, 0), math.ceil(parent.epochs)))
    if rows in PREFERENCES and not small:
        epochs = 1 if found.rows >= 1000 else min(epochs, 3)
    if epochs != parent.epochs:
        found.settings["epochs"] = epochs
        found.remarks.append(f"epochs       {epochs}, not {parent.epochs:g}: {epochs * each} steps in all, {each} an epoch")
    if epochs > 1 and "validation" in found.settings["data"]:
        found.settings["eval"] = {**found.settings.get("eval", {}), "every": each}
        found.remarks.append("evaluation   after every epoch; the run ends with the weights of the best one")


def _by_heart(found: Fitted, parent: Recipe, of_size: str, each: int, lengths: list[int], held_out: float) -> None:
    """Let a small model learn every row by heart."""
    if "stack" not in found.choices:
        found.parent = "sft"
        found.settings["optim"] = {"lr": 2e-3}
        found.remarks += [
            f"trained      every weight: next to the weights of a model {of_size} a LoRA has too little room for facts",
            "rate         2e-3, which so small a model bears; a large one would forget all it knows",
        ]
    most, tokens = BY_HEART
    an_epoch = sum(lengths) / max(len(lengths), 1) * found.rows * (1 - held_out)
    epochs = max(math.ceil(parent.epochs or 1), min(most, int(tokens / max(an_epoch, 1))))
    found.settings["epochs"] = epochs
    found.remarks.append(f"epochs       {epochs} ({epochs * each} steps): so often until so small a model knows rows by heart")
    if held_out:
        found.settings["eval"] = {"load_best": False}
        found.remarks += [
            "evaluation   the last weights are kept, not those with the best loss of held-out rows: that loss rises while",
            "             rows are learned by heart. Answers that stand in held-out rows alone are not learned:",
            "             data.validation=null trains on all rows",
        ]


def _rate(found: Fitted, parent: Recipe, parameters: int | None, of_size: str) -> None:
    """Set the learning rate by the size of the model, where the methods are those it is known for."""
    methods = set(parent.stack)
    if methods and not methods & BRANCHES:
        return
    kind = "preferences" if found.reading.rows in PREFERENCES and methods else "branches" if methods else "whole"
    below, above = RATES[kind]
    rate = below if parameters is not None and parameters < LARGE else above
    found.settings["optim"] = {"lr": rate}
    what = f"{' and '.join(sorted(methods & BRANCHES))} on" if methods else "every weight of"
    before = f"the recipe it extends has {parent.optim['lr']:g}"
    found.remarks.append(f"rate         {rate:g}, usual for {what} a model {of_size}; {before}")


def _of_size(parameters: int | None) -> str:
    if parameters is None:
        return "of unknown size"
    return f"of {parameters / 1e6:,.{0 if parameters > 1e7 else 1}f} million parameters"
