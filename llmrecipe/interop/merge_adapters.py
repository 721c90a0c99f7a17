"""Several adapters of one base as one: the weighted merger of their changes.

cat       [w1 s1 B1, w2 s2 B2] [A1; A2]: exactly w1 dW1 + w2 dW2, at the sum of the ranks
linear    (sum_i sqrt(|w_i s_i|) B_i) (sum_i sgn(w_i) sqrt(|w_i s_i|) A_i): keeps the rank, adds products of different
          adapters; needs equal ranks
ties, dare_linear, dare_ties, magnitude_prune
          like linear, with the factors A and B each merged by that rule (see `task_vectors`), as PEFT does
svd, ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
          the changes s_i B_i A_i themselves are merged by the rule, as the papers have it, and the best approximation of the
          largest rank is kept; ranks may differ
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merge_options import How
from llmrecipe.interop.peft.layout import Branch, joined
from llmrecipe.interop.task_vectors import merge
from llmrecipe.models.checkpoint_path import is_adapter, run_folder
from llmrecipe.runs import delta
from llmrecipe.runs.open_model import Opened, open_saved


def open_combination(parts: Sequence[tuple[str, float]], how: How = How(), rights: Mapping[str, bool] | None = None) -> Opened:
    """The base of the first run or PEFT folder with the combination of all of them mounted on it.

    Args:
        parts: (run directory or PEFT adapter folder, weight).
        rights: see `open_run`.

    Raises:
        UserError: `how` does not fit together.
        ModelError: the bases differ, or one of them is more than a low-rank change of weights.
    """
    how.check()
    from llmrecipe.interop.peft.exporter import branches_of, head_tensors, saved_from, trained_biases
    from llmrecipe.interop.peft.importer import layer_of
    from llmrecipe.recipe.schema import TokenizerSection

    first = open_run(parts[0][0], rights=rights)
    everything: list[tuple[Branch, float]] = []
    for path, weight in parts:
        opened = first if path == parts[0][0] else open_run(path, rights=rights)
        if opened.base_fingerprint != first.base_fingerprint:
            raise ModelError(
                f"{path} stands on another base than {parts[0][0]} ({opened.section.path} and {first.section.path}); "
                "only changes of the same weights can be added"
            )
        if head_tensors(opened):
            raise ModelError(f"{path} has a task head of its own; heads cannot be added, export each run alone")
        if biases := trained_biases(opened.model):
            raise ModelError(
                f"{path} trained {len(biases)} biases of the base (bias, bitfit), which are no low-rank change that could be "
                "added to another; export each run alone"
            )
        branches = joined(branches_of(opened))
        if any(b.magnitude is not None for b in branches):
            raise ModelError(f"{path} is a DoRA run: it rescales whole weights, which cannot be added to another change")
        everything += [(b, weight) for b in branches]
    if how.way == "cat":
        combined = joined([replace(b, scale=b.scale * weight) for b, weight in everything])
    elif biased := next((b.path for b, _ in everything if b.bias is not None), None):
        raise ModelError(f"--combine {how.way}: {biased} has a bias in its branch (lora_bias); only --combine cat adds those")
    else:
        combined = _merged(everything, how)
    folder = Path(parts[0][0]) if is_adapter(parts[0][0]) else run_folder(parts[0][0])
    plain = delta.without_injected(saved_from(first))
    opened = open_saved(first.section, plain, folder, TokenizerSection(), head=first.head)
    layer = layer_of(combined, {}, opened.model, 0.0, "the combination")
    opened.mounted += delta.mount(opened.model, layer, len(opened.layers))
    opened.layers.append(layer)
    return opened


def _merged(everything: list[tuple[Branch, float]], how: How) -> list[Branch]:
    """One branch a weight; adapters that leave a weight alone take no part in it.

    Raises:
        ModelError: factors are to be merged whose ranks differ.
    """
    groups: dict[tuple[str, str], list[tuple[Branch, float]]] = {}
    for branch, weight in everything:
        groups.setdefault(branch.key, []).append((branch, weight))
    generator = torch.Generator().manual_seed(how.seed)
    rule = "linear" if how.way == "svd" else how.way.removesuffix("_svd")

    def merged(tensors: list[Tensor], weights: list[float]) -> Tensor:
        return merge(tensors, weights, rule, how.density or 1.0, how.sign, generator)

    result = []
    for pairs in groups.values():
        group, weights = [b for b, _ in pairs], [w for _, w in pairs]
        if how.way.endswith("svd"):
            result.append(_approximated(group, merged([b.scale * (b.B @ b.A) for b in group], weights)))
            continue
        if len({b.r for b in group}) > 1:
            ranks = ", ".join(str(b.r) for b in group)
            raise ModelError(
                f"--combine {how.way}: {group[0].path} has ranks {ranks}; equal ranks are needed, "
                "--combine cat and svd take any"
            )
        roots = [abs(b.scale * w) ** 0.5 for b, w in pairs]
        # The sign stands on one side: on both it would cancel.
        signed = [root if b.scale * w >= 0 else -root for (b, w), root in zip(pairs, roots, strict=True)]
        A = merged([b.A for b in group], signed)
        result.append(replace(group[0], A=A, B=merged([b.B for b in group], roots), scale=1.0))
    return result


def _approximated(group: list[Branch], change: Tensor) -> Branch:
    """The best approximation (U S)[:, :r] V[:r] of a change at the largest rank of its group."""
    r = max(b.r for b in group)
    U, S, V = torch.linalg.svd(change.float(), full_matrices=False)
    return replace(group[0], A=V[..., :r, :].contiguous(), B=(U * S[..., None, :])[..., :r].contiguous(), scale=1.0)
