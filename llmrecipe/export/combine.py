"""Several adapters of one base as one: the weighted sum of their changes.

cat       [w1 s1 B1, w2 s2 B2] [A1; A2]: exactly w1 dW1 + w2 dW2, at the sum of the ranks
linear    (sum_i sqrt(|w_i s_i|) sign(w_i) B_i) (sum_i sqrt(|w_i s_i|) A_i): keeps the rank, adds products of different
          adapters; needs equal ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from llmrecipe.errors import ModelError
from llmrecipe.export.load import open_run
from llmrecipe.export.peft_format import Branch, joined
from llmrecipe.models.source import is_adapter, run_folder
from llmrecipe.training import delta
from llmrecipe.training.opened import Opened, open_saved

How = Literal["cat", "linear"]


def open_combination(parts: Sequence[tuple[str, float]], how: How = "cat") -> Opened:
    """The base of the first run or PEFT folder with the combination of all of them mounted on it.

    Args:
        parts: (run directory or PEFT adapter folder, weight).

    Raises:
        ModelError: the bases differ, or one of them is more than a low-rank change of weights.
    """
    from llmrecipe.export.peft import branches_of, head_tensors, saved_from
    from llmrecipe.export.peft_import import layer_of
    from llmrecipe.recipe.schema import TokenizerSection

    first = open_run(parts[0][0])
    everything: list[list[Branch]] = []
    for path, weight in parts:
        opened = first if path == parts[0][0] else open_run(path)
        if opened.base_fingerprint != first.base_fingerprint:
            raise ModelError(
                f"{path} stands on another base than {parts[0][0]} ({opened.section.path} and {first.section.path}); "
                "only changes of the same weights can be added"
            )
        if head_tensors(opened):
            raise ModelError(f"{path} has a task head of its own; heads cannot be added, export each run alone")
        branches = joined(branches_of(opened))
        if any(b.magnitude is not None for b in branches):
            raise ModelError(f"{path} is a DoRA run: it rescales whole weights, which cannot be added to another change")
        everything.append([replace(b, scale=b.scale * weight) for b in branches])
    combined = joined([b for branches in everything for b in branches]) if how == "cat" else _linear(everything)
    folder = Path(parts[0][0]) if is_adapter(parts[0][0]) else run_folder(parts[0][0])
    plain = delta.without_injected(saved_from(first))
    opened = open_saved(first.section, plain, folder, TokenizerSection(), head=first.head)
    layer = layer_of(combined, {}, opened.model, 0.0, "the combination")
    opened.mounted += delta.mount(opened.model, layer, len(opened.layers))
    opened.layers.append(layer)
    return opened


def _linear(everything: list[list[Branch]]) -> list[Branch]:
    """One branch a weight at the common rank.

    Raises:
        ModelError: ranks differ at one weight.
    """
    groups: dict[tuple[str, str], list[Branch]] = {}
    for branches in everything:
        for branch in branches:
            groups.setdefault(branch.key, []).append(branch)
    result = []
    for group in groups.values():
        if len({b.r for b in group}) > 1:
            ranks = ", ".join(str(b.r) for b in group)
            raise ModelError(
                f"--combine linear: {group[0].path} has ranks {ranks}; equal ranks are needed, --combine cat takes any"
            )
        roots = [abs(b.scale) ** 0.5 for b in group]
        A = sum((b.A * root for b, root in zip(group, roots, strict=True)), group[0].A * 0)
        B = sum((b.B * (root if b.scale >= 0 else -root) for b, root in zip(group, roots, strict=True)), group[0].B * 0)
        result.append(replace(group[0], A=A, B=B, scale=1.0))
    return result
