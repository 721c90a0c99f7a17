"""LoRA-FA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Literal, OpenFraction, PositiveFloat, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines.low_rank import init_low_rank
from llmrecipe.methods.memory._engines.frozen_down import FrozenDown
from llmrecipe.models.hooks.hook import all_hooks, device_of, row_index
from llmrecipe.models.hooks.host import add_hook, merge_hooks
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import nn

    from llmrecipe.models.site import Site


@register
class LoraFa(Wrapper):
    """LoRA-FA: y = W x + s B A x with A frozen at its random value, s = alpha / r; the backward pass keeps A x, not x.

    B (out, r) starts at zero, so training starts at the base model, and alone trains: r out numbers a layer. A (r, in) is
    saved with it. Of N tokens N r numbers are kept where LoRA keeps N (in + r), also with dropout, whose mask is drawn again
    from a seed; an input that something else keeps is not saved (attention keeps its own output, so `attn.o` frees nothing
    under SDPA): of a Llama block with all linear layers N (2 d + I) numbers go. With gradient checkpointing a block keeps its
    input alone, and what is saved here is part of the replay. Since r hardly costs memory it may be larger than LoRA's.

    `grad_correction: projection` steps along s^-2 dB (A A^T)^-1, once an update: then s B A moves along the gradient of W,
    projected on the rows of A. Merging W <- W + s B A is exact up to rounding.

    Paper: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning (arXiv 2308.03303), the
    correction from its third version. Departures: dropout acts on A x by default (`dropout_on`).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "its corrected gradient reads tensors of which each process holds a part"
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = True

    target: str = "all-linear"
    """Linear sites that get a branch."""
    r: Rank = 16
    """Rank of A and B."""
    alpha: PositiveFloat = 32.0
    """Scale of the branch: it is multiplied by alpha / r."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead."""
    init: Literal["default", "gaussian", "orthonormal"] = "default"
    """A: Kaiming-uniform, N(0, 1 / r^2), or orthonormal rows of the default's size, for which the correction is a scalar."""
    dropout: OpenFraction = 0.0
    """Dropout while training."""
    dropout_on: Literal["rank", "input"] = "rank"
    """What is dropped: A x, or x as in LoRA (twice the random numbers of x are drawn)."""
    grad_correction: Literal["none", "projection"] = "none"
    """What B's gradient is multiplied by."""

    @classmethod
    def reads_gradients(cls) -> bool:
        """Return False: only the correction does (see `check_stack`)."""
        return False

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse the correction under a rule that makes no gradients."""
        free = next((w.name for w in wrappers if w.gradient_free), None)
        if free and self.grad_correction != "none":
            raise RecipeError(f"stack.{self.name}.grad_correction: it changes gradients, and {free} makes none; set it to none")

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a branch at every site of `target`.

        Raises:
            ModelError: a site is no linear layer, or has fewer inputs than orthonormal rows are wanted.
        """
        scale = self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        for site in anatomy(model).at(self.target):
            self._refuse(site)
            with torch.device(device_of(site.module)):
                sizes = (site.width_in, site.width_out, self.r, scale, self.dropout, row_index(site))
                hook = FrozenDown(*sizes, side=self.dropout_on)
            init_low_rank(hook)
            if self.init == "gaussian":
                torch.nn.init.normal_(hook.A, std=1.0 / self.r)
            elif self.init == "orthonormal":
                # Rows of length sqrt(1 / 3): the root mean square of Kaiming-uniform numbers is 1 / sqrt(3 in).
                torch.nn.init.orthogonal_(hook.A, gain=math.sqrt(1.0 / 3.0))
            add_hook(site.module, site.name(self.name), hook, self.name)

    def _refuse(self, site: Site) -> None:
        if site.tensor is not None or site.role.startswith(("embed", "norm")) or not hasattr(site.module, "weight"):
            raise ModelError(
                f"{site.path}: a frozen A saves a linear layer's input, and this is no linear layer; use lora here"
            )
        if self.init == "orthonormal" and self.r > site.width_in:
            raise ModelError(f"{site.path}: {self.r} orthonormal rows need as many inputs, and it has {site.width_in}")

    def frozen(self, model: nn.Module) -> set[str]:
        """Return every A."""
        return {f"{path}.{name}.A" for path, name, _ in self._branches(model)}

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Multiply B's gradient by the correction."""
        if self.grad_correction == "none":
            return
        with torch.no_grad():
            for _, _, hook in self._branches(model):
                if hook.B.grad is not None:
                    hook.B.grad = hook.B.grad @ hook.correction()

    def _branches(self, model: nn.Module) -> Iterator[tuple[str, str, FrozenDown]]:
        for path, _, name, hook in all_hooks(model, self.name):
            if isinstance(hook, FrozenDown):
                yield path, name, hook

    def merge(self, model: nn.Module) -> None:
        """Set W <- W + s B A at every site."""
        merge_hooks(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: sum of r out trains, and AdamW keeps 8 bytes for each; A is r in numbers more; N r are saved."""
        hooks = [hook for _, _, hook in self._branches(model)]
        count, held = sum(h.B.numel() for h in hooks), sum(h.A.numel() for h in hooks)
        facts = {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count, "state_bytes": 4 * held}
        return {**facts, "saved_per_token": sum(h.A.shape[0] for h in hooks)}
