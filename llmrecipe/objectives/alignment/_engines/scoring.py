"""Scores of a trained reward model: on its own, or as an additional role on a base that also carries a policy.

score_sequences(load(RUN)[0], [prompt + answer, ...]) -> (S,) normalised scores
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError, RunError
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.reference_cache import weights_digest
from llmrecipe.models import task_heads
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.runs import delta
from llmrecipe.runs.open_model import LoadedModel

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel


ROLE = "reward"
TOKENS = 8192
"""Most padded tokens scored in one forward pass."""


@torch.no_grad()
def score_sequences(
    model: LanguageModel | Engine,
    sequences: Seq[Seq[int]],
    *,
    role: str = "policy",
    off: frozenset[str] = frozenset(),
    tokens: int = TOKENS,
) -> Tensor:
    """Compute normalised scores gain * s + bias of whole sequences (prompt and answer), (S,) float32 on the CPU, in order.

    A score does not depend on the other sequences: rows of similar length share a forward pass, padding is masked.

    Args:
        model: a model with a reward head (`llmrecipe.load(RUN)`, or a policy that `add_reward` prepared); or its `Engine`.
        role: `policy` for a reward run on its own, `reward` for the reward adapters of a shared base.
        off: wrappers that are disabled (see `SharedReward.off`).

    Raises:
        ModelError: the model has no reward head.
    """
    engine = model if isinstance(model, Engine) else Engine(model)
    if ROLE not in task_heads.head_roles(engine.model):
        raise ModelError("scores: this model has no reward head; train one with recipe=reward and open that run")
    if any(len(s) == 0 for s in sequences):
        raise ModelError("scores: an empty sequence has no last token to score")
    was, device = engine.training, next(engine.model.parameters()).device
    engine.eval()
    scores = torch.zeros(len(sequences))
    try:
        for part in _groups([len(s) for s in sequences], tokens):
            # Padding is masked by position; its id is never looked at.
            batch = pad([Sequence(sequences[i], [0] * len(sequences[i])) for i in part], 0).to(device)
            scores[part] = engine(batch, want="reward", role=role, off=off)["reward"].float().cpu()
    finally:
        engine.train(was)
    return scores


def _groups(lengths: list[int], tokens: int) -> list[list[int]]:
    """Group indices by length, so that rows times the longest of a group stay within a number of tokens."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@dataclass(frozen=True)
class SharedReward:
    """A reward model mounted on the policy's base."""

    off: frozenset[str]
    """Mounted wrappers of the policy that the reward model was not trained on."""
    added: tuple[str, ...]
    """Mounted wrappers of the reward model alone; they serve the role `reward` and no other."""


def add_reward(policy: LoadedModel, run: str) -> SharedReward:
    """Mount a finished reward run on a loaded policy of the same base, without a second copy of the base.

    Stacks that both have in common (the SFT run both continue) are shared; the rest of the reward run's stacks serve the role
    `reward` only. Call before the policy's own stack is attached, and score with
    `score_sequences(model, sequences, role="reward", off=shared.off | {names of the policy's own wrappers})`; wrappers of the
    policy that serve every role but the reference must be named there.

    Raises:
        RunError: the folder is not a finished adapter run with a reward head.
        ModelError: it was trained on another base; open it by `llmrecipe.load` instead.
    """
    folder = run_folder(run)
    if folder is None or not (folder / delta.STACK_FILE).is_file():
        raise RunError(f"{run}: not a finished adapter run, so it cannot share the policy's base; open it with llmrecipe.load")
    saved = delta.read_stack(Path(folder))
    if not any(f"{task_heads.ATTRIBUTE}.{ROLE}.weight" in layer.tensors for layer in saved.layers):
        raise RunError(f"{run}: this run has no reward head; train one with recipe=reward")
    delta.check_base(policy.model, saved, str(folder))
    common = sum(1 for _ in itertools.takewhile(lambda pair: _same(*pair), zip(policy.layers, saved.layers, strict=False)))
    own = {name for i, layer in enumerate(policy.layers) if i >= common for name in _names(layer, i)}
    added: list[str] = []
    for index, layer in enumerate(saved.layers[common:], len(policy.layers)):
        for wrapper in delta.mount_layer(policy.model, layer, index):
            added.append(wrapper.name)
            for _, _, _, hook in all_hooks(policy.model, wrapper.name):
                hook.mounted, hook.roles = False, frozenset({ROLE})
    return SharedReward(frozenset(own), tuple(added))


def _same(one: delta.Layer, other: delta.Layer) -> bool:
    return one.wrappers == other.wrappers and weights_digest(one.tensors) == weights_digest(other.tensors)


def _names(layer: delta.Layer, index: int) -> list[str]:
    return [f"mounted{index}_{name}" for name in layer.wrappers]
