"""Visual prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Literal, OpenFraction, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.models.hooks.hook import ROWS, Hook, add_hook, first_tensor, with_first
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.task_heads import is_head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmrecipe.models.site import Site

T = TypeVar("T")


@register
class Vpt(Wrapper):
    """Visual prompt tuning: [x_i, _, E_i] = B_i([x_{i-1}, P_{i-1}, E_{i-1}]), with P trained vectors P_{i-1} at block B_i.

    x is the class token and E the patches. `depth: shallow` puts one set (P, d) behind the class token before the first block,
    and its outputs go on to the next; `depth: deep` has a set for each block, which takes the place of what the block before
    made of its own. Prompts have no positions. They are taken out behind the last block, so the head, which trains with them,
    reads what it always reads. All else is frozen.

    Prompts start uniform in [-v, v], v = sqrt(6 / (C p^2 + d)), for patches of p x p pixels of C channels: the bound of Xavier
    for the projection of a patch. Step 0 is not the base model.

    Trained: P d (shallow) or L P d (deep), and the head. Attention reads P columns more in every block.

    Paper: Visual Prompt Tuning (arXiv 2203.12119).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    identity: ClassVar[bool] = False
    modality: ClassVar[str] = "images"
    otherwise: ClassVar[str] = "use prompt_tuning (vectors before the text) or prefix_tuning (keys and values in every layer)"
    unmergeable: ClassVar[str] = "its vectors are rows of their own in every block; no weight holds them"

    depth: Literal["shallow", "deep"] = "deep"
    """Prompts at the first block alone, or new ones at every block."""
    num_virtual_tokens: Rank = 10
    """Trained vectors at a block."""
    dropout: OpenFraction = 0.0
    """Dropout on the prompts while training."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add prompts at the first block, or at each, and take them out behind the last.

        Raises:
            ModelError: the model's blocks do not take rows without a position.
        """
        blocks = self._blocks(model)
        bound = _bound(pretrained(model).config, blocks[0].width_out)
        device = next(model.parameters()).device
        for i, block in enumerate(blocks):
            first, last = i == 0, i == len(blocks) - 1
            if first or last or self.depth == "deep":
                trained = first or self.depth == "deep"
                hook = BlockPrompts(self.num_virtual_tokens, block.width_out if trained else 0, bound, self.dropout)
                hook.opens, hook.closes = first, last
                add_hook(block.module, self.name, hook.to(device), self.name)

    def _blocks(self, model: nn.Module) -> list[Site]:
        """Return the blocks of the vision transformer, in order."""
        config = pretrained(model).config
        if getattr(config, "depths", None) is not None:
            raise ModelError(
                f"stack.{self.name}: {config.model_type} merges patches from stage to stage, where a prompt has no place; "
                "use lora, or a model with blocks of one width (ViT, DeiT, DINOv2)"
            )
        parts = anatomy(model)
        relative = getattr(config, "positions", "") == "relative" or getattr(config, "use_relative_position_bias", False)
        if parts.rope or relative:
            raise ModelError(
                f"stack.{self.name}: attention of {config.model_type} computes with positions here, and a prompt has none; "
                "use lora, or a model that adds its positions to the patches (ViT, DeiT, DINOv2)"
            )
        return [site for site in parts.sites if site.role == "block"]

    def opened(self, model: nn.Module) -> set[str]:
        """Return the head's parameters, where the head is the model's own; a new one trains in any case."""
        heads = [site.path for site in anatomy(model).sites if site.role == "head"]
        names = {name for name, _ in model.named_parameters() if any(name.startswith(f"{path}.") for path in heads)}
        return {name for name in names if not is_head(model, name)}

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: P d or L P d, and the head where it is the model's own."""
        parameters = dict(model.named_parameters())
        count = sum(n for _, n in self.describe(model)) + sum(parameters[name].numel() for name in self.opened(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}


class BlockPrompts(Hook):
    """At a block: its prompts (P, d) behind the first row of x (B, T, d), from where they open to where they close."""

    order: ClassVar[int] = ROWS
    opens: bool = False
    """Whether x comes without rows for prompts."""
    closes: bool = False
    """Whether x leaves without them."""

    def __init__(self, count: int, width: int, bound: float, dropout: float):
        super().__init__()
        self.count = count
        self.drop = nn.Dropout(dropout)
        if width:
            self.prompts = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the block over its longer rows."""
        x = inputs["hidden_states"]
        if hasattr(self, "prompts"):
            rows = self.drop(self.prompts.to(x.dtype).expand(x.shape[0], -1, -1))
            x = torch.cat([x[:, :1], rows, x[:, 1 if self.opens else 1 + self.count :]], 1)
        out = call(**{**inputs, "hidden_states": x})
        if not self.closes:
            return out
        y: Tensor = first_tensor(out)
        return with_first(out, torch.cat([y[:, :1], y[:, 1 + self.count :]], 1))


def _bound(config: PreTrainedConfig, width: int) -> float:
    """Return v = sqrt(6 / (C p p + d))."""
    size = getattr(config, "patch_size", 1)
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    return math.sqrt(6 / (getattr(config, "num_channels", 3) * high * wide + width))
