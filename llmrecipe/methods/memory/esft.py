"""Expert-specialized fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Literal, PositiveFraction, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.memory._engines.expert_copies import (
    ChosenExperts,
    RoutingScores,
    add_chosen,
    mixtures,
    refuse_changed,
    smallest_set,
)
from llmrecipe.methods.selective._engines.selection import mode
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.hooks.host import merge_hooks

if TYPE_CHECKING:
    from torch import nn


@register
class Esft(Wrapper):
    """ESFT: of each mixture the experts that the task uses train, the smallest set whose scores sum to p; all else is frozen.

    Before step 0 forward passes over `n_tokens` tokens score expert i of a layer: g_i = mean over samples of the mean gate
    that was applied (`gate`), or r_i = mean over samples of the share of routed places that expert i has (`token`, sums to 1).
    Experts are taken in descending order until their scores sum to p. A model that renormalises gates has rows that sum to 1,
    where the paper's sum to less: p then means more. Chosen experts train as float32 copies from their own values, so training
    starts at the base model; the saved file, gradients and optimizer state hold n 3 D I numbers a layer (2 D I without a
    gate). Other experts, shared ones, routers and attention are never touched, and keep no inputs for the backward pass.
    Merging writes the copies back. Needs a mixture with fused 3-D experts (Transformers' families, the native mixture).

    Paper: Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse Architectural Large Language Models
    (arXiv 2407.01906); lr 1e-5 at billions of weights. Departures: samples weigh alike, as the paper defines it (its code
    weighs tokens alike).
    """

    waits: ClassVar[str] = "which tokens each of its experts is given, so how many of them"
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = True
    conflicts: ClassVar[dict[str, str]] = {
        "esft": "one of the two choices would train experts that the other one froze",
        "fishmask": "it selects entries of the experts, and the chosen experts train as copies",
        "child_tuning": "it selects entries of the experts, and the chosen experts train as copies",
        "diff_pruning": "it selects entries of the experts, and the chosen experts train as copies",
        "group_mask": "it selects entries of the experts, and the chosen experts train as copies",
    }
    conflicts_by_default: ClassVar[dict[str, str]] = {
        "ia3": "it scales inside the experts too, which copies would not see; with ia3's scaled=[key,value] both train",
    }

    score: Literal["token", "gate"] = "token"
    """Share of routed places, or average gate."""
    p: PositiveFraction | None = None
    """What the scores of the chosen experts sum to; default: 0.2 for token, 0.1 for gate."""
    n_tokens: PositiveInt = 131072
    """Tokens that are scored, each row at most once."""
    min_per_layer: PositiveInt = 1
    """Least number of experts of a layer."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add the copies of a saved choice; a fresh one is made by `calibrate`.

        Raises:
            ModelError: the model has no mixture with fused experts, or fewer experts than each layer is to train.
        """
        found = mixtures(model)
        count = min(sites[0].experts for sites in found.values())
        if self.min_per_layer > count:
            raise ModelError(
                f"stack.{self.name}.min_per_layer: must be <= {count}, the experts of a layer; got {self.min_per_layer}"
            )
        if structure is not None:
            add_chosen(model, self.name, {path: structure["experts"].get(path, []) for path in found})

    def check_attached(self, model: nn.Module) -> None:
        """Refuse another method on the expert tensors."""
        refuse_changed(model, self.name)

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Score the experts and add copies of the chosen ones."""
        found = mixtures(model)
        scores = self._scores(model, probe)
        p = self.p if self.p is not None else {"token": 0.2, "gate": 0.1}[self.score]
        add_chosen(model, self.name, {path: smallest_set(scores[path], p, self.min_per_layer) for path in found})
        for path, hook in self._copies(model):
            hook.scores.copy_(scores[path])

    @torch.no_grad()
    def _scores(self, model: nn.Module, probe: Probe) -> dict[str, torch.Tensor]:
        found = mixtures(model)
        sums = RoutingScores(list(found), next(iter(found.values()))[0].experts)
        world, rank = getattr(probe.world, "world", 1), getattr(probe.world, "rank", 0)
        handles = [
            sites[0].module.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: sums.see(path, *[*args, *kwargs.values()][1:3]),
                with_kwargs=True,
                prepend=True,
            )
            for path, sites in found.items()
        ]
        most = probe.count(self.n_tokens, 1)
        try:
            with mode(model, False):
                read = 0
                for index, micros in enumerate(probe.groups(most, 1)):
                    if index % world == rank:
                        for micro in micros:
                            probe.loss(micro)
                    # Every process counts all rows, so that the choice is made from the same ones however many there are.
                    read += sum(micro.tokens for micro in micros)
                    if read >= self.n_tokens:
                        break
        finally:
            for handle in handles:
                handle.remove()
        totals = sums.selected if self.score == "token" else sums.gate
        count = torch.tensor([float(sums.samples)], dtype=torch.float64)
        if world > 1:
            totals = {path: probe.world.sum(total) for path, total in totals.items()}
            count = probe.world.sum(count)
        return {path: total / float(count) for path, total in totals.items()}

    def _copies(self, model: nn.Module) -> Iterator[tuple[str, ChosenExperts]]:
        for path, _, _, hook in all_hooks(model, self.name):
            if isinstance(hook, ChosenExperts):
                yield path, hook

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return the chosen experts by module."""
        return {"experts": {path: hook.chosen.tolist() for path, hook in self._copies(model)}}

    def may_skip(self, name: str) -> bool:
        """Return True: a step may have no token for any chosen expert of a layer."""
        return True

    def merge(self, model: nn.Module) -> None:
        """Write the trained experts back."""
        merge_hooks(model, self.name)

    def grids(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return the scores of all experts, a row a layer, and which are trained."""
        copies = [hook for _, hook in self._copies(model)]
        if not copies:
            return {}
        values = [[round(v, 4) for v in hook.scores.tolist()] for hook in copies]
        marked = [hook.chosen.tolist() for hook in copies]
        return {f"{self.score} score": {"rows": "layer", "columns": "expert", "values": values, "marked": marked}}

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: AdamW keeps 8 bytes for each number of a chosen expert."""
        count = sum(p.numel() for _, hook in self._copies(model) for p in hook.parameters())
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield the chosen experts of each layer."""
        for path, hook in self._copies(model):
            shown = ", ".join(map(str, hook.chosen.tolist()))
            yield f"{path}: experts {shown} of {hook.count}", sum(p.numel() for p in hook.parameters())
