"""Several adapters of one base as one: the weighted merger of their changes (`interop.merge_methods`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llmrecipe.core.errors import ModelError
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merge_options import MergeConfig
from llmrecipe.interop.peft.exporter import branches_of, head_tensors, saved_from, trained_biases
from llmrecipe.interop.peft.importer import layer_of
from llmrecipe.interop.peft.layout import Branch, concatenate_branches
from llmrecipe.interop.run_plugins import open_plugins_of
from llmrecipe.models.checkpoint_path import is_adapter, run_folder
from llmrecipe.recipe.schema import TokenizerSection
from llmrecipe.runs import delta
from llmrecipe.runs.open_model import LoadedModel, open_saved


def open_combination(
    parts: Sequence[tuple[str, float]], config: MergeConfig = MergeConfig(), rights: Mapping[str, bool] | None = None
) -> LoadedModel:
    """Load the base of the first run or PEFT folder with the combination of all of them mounted on it.

    Args:
        parts: (run directory or PEFT adapter folder, weight).
        rights: see `open_run`.

    Raises:
        UserError: `config` does not fit together.
        ModelError: the bases differ, or one of them is more than a low-rank change of weights.
    """
    for path, _ in parts:
        open_plugins_of(path)
    config.check()

    first = open_run(parts[0][0], rights=rights)
    everything: list[tuple[Branch, float]] = []
    for path, weight in parts:
        loaded = first if path == parts[0][0] else open_run(path, rights=rights)
        if loaded.base_fingerprint != first.base_fingerprint:
            raise ModelError(
                f"{path} stands on another base than {parts[0][0]} ({loaded.section.path} and {first.section.path}); "
                "only changes of the same weights can be added"
            )
        if head_tensors(loaded):
            raise ModelError(f"{path} has a task head of its own; heads cannot be added, export each run alone")
        if biases := trained_biases(loaded.model):
            raise ModelError(
                f"{path} trained {len(biases)} biases of the base (bias, bitfit), which are no low-rank change that could be "
                "added to another; export each run alone"
            )
        branches = concatenate_branches(branches_of(loaded.model, loaded.mounted))
        if any(b.magnitude is not None for b in branches):
            raise ModelError(f"{path} is a DoRA run: it rescales whole weights, which cannot be added to another change")
        everything += [(b, weight) for b in branches]
    combined = config.method().combine(everything, torch.Generator().manual_seed(config.seed))
    folder = Path(parts[0][0]) if is_adapter(parts[0][0]) else run_folder(parts[0][0])
    plain = delta.without_injected(saved_from(first))
    loaded = open_saved(first.section, plain, folder, TokenizerSection(), head=first.head)
    layer = layer_of(combined, {}, loaded.model, 0.0, "the combination")
    loaded.mounted += delta.mount_layer(loaded.model, layer, len(loaded.layers))
    loaded.layers.append(layer)
    return loaded
