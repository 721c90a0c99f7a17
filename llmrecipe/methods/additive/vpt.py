"""Visual prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Field, Literal, NonNegativeInt, OpenFraction, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.models.hooks.hook import ROWS, Hook, first_tensor, with_first
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.task_heads import is_head

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

T = TypeVar("T")


@register
class Vpt(Wrapper):
    """Visual prompt tuning: [x_i, _, E_i] = B_i([x_{i-1}, P_{i-1}, E_{i-1}]), with P trained vectors P_{i-1} at block B_i.

    x is the class token and E the patches. `depth: shallow` puts one set (P, d) behind the class token before the first block,
    and its outputs go on to the next; `depth: deep` has a set for each block, and what a block makes of its own is left out
    of the next. Prompts have no positions. None is left behind the last block, so the head, which trains with them, reads
    what it always reads. All else is frozen.

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
    sizes: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Trained vectors by block number, instead of `num_virtual_tokens`; 0 leaves a block out. For `depth: deep`."""
    dropout: OpenFraction = 0.0
    """Dropout on the prompts while training."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add prompts at the first block, or at each, and take them out behind the last block that reads them.

        Raises:
            RecipeError: `sizes` with prompts at one block alone, or that name no block or leave every block out.
            ModelError: the model's blocks do not take rows without a position.
        """
        blocks = prompt_blocks(model, self.name)
        bound = prompt_bound(model, blocks)
        device = next(model.parameters()).device
        sizes = self._sizes(len(blocks))
        deep = self.depth == "deep"
        for i, block in enumerate(blocks):
            first, last = i == 0, i == len(blocks) - 1
            if (deep and sizes[i]) or (not deep and (first or last)):
                hook = BlockPrompts(sizes[i], block.width_out if first or deep else 0, bound, self.dropout)
                hook.closes = last or deep
                add_hook(block.module, self.name, hook.to(device), self.name)

    def _sizes(self, blocks: int) -> list[int]:
        """Return the trained vectors of each block."""
        if self.sizes and self.depth != "deep":
            raise RecipeError(f"stack.{self.name}.sizes: depth: shallow has prompts at the first block alone; set depth: deep")
        unknown = [layer for layer in self.sizes if layer not in map(str, range(blocks))]
        if unknown:
            raise RecipeError(f"stack.{self.name}.sizes.{unknown[0]}: this model has blocks 0 to {blocks - 1}")
        sizes = [self.sizes.get(str(i), self.num_virtual_tokens) for i in range(blocks)]
        if not any(sizes):
            raise RecipeError(f"stack.{self.name}.sizes: every block has size 0, so there is no prompt")
        return sizes

    def opened(self, model: nn.Module) -> set[str]:
        """Return the head's parameters, where the head is the model's own; a new one trains in any case."""
        return own_head(model)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: P d or the sum of P_l d, and the head where it is the model's own."""
        parameters = dict(model.named_parameters())
        count = sum(n for _, n in self.describe(model)) + sum(parameters[name].numel() for name in self.opened(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}


class BlockPrompts(Hook):
    """At a block: its prompts (P, d) behind the first row of x (B, T, d), until they are taken out where they close."""

    order: ClassVar[int] = ROWS
    closes: bool = True
    """Whether x leaves without rows for prompts."""

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
            rows = self.drop(self.prompts[: self.count].to(x.dtype).expand(x.shape[0], -1, -1))
            x = torch.cat([x[:, :1], rows, x[:, 1:]], 1)
        out = call(**{**inputs, "hidden_states": x})
        if not self.closes:
            return out
        y: Tensor = first_tensor(out)
        return with_first(out, torch.cat([y[:, :1], y[:, 1 + self.count :]], 1))


def own_head(model: nn.Module) -> set[str]:
    """Return the parameters of a head that is the model's own."""
    heads = [site.path for site in anatomy(model).sites if site.role == "head"]
    names = {name for name, _ in model.named_parameters() if any(name.startswith(f"{path}.") for path in heads)}
    return {name for name in names if not is_head(model, name)}


def prompt_blocks(model: nn.Module, name: str) -> list[Site]:
    """Return the blocks of a vision transformer, in order.

    Args:
        name: the wrapper's entry of the stack, for the message.

    Raises:
        ModelError: the model's blocks do not take rows without a position.
    """
    config = pretrained(model).config
    if getattr(config, "depths", None) is not None:
        raise ModelError(
            f"stack.{name}: {config.model_type} merges patches from stage to stage, where a prompt has no place; "
            "use lora, or a model with blocks of one width (ViT, DeiT, DINOv2)"
        )
    parts = anatomy(model)
    relative = getattr(config, "positions", "") == "relative" or getattr(config, "use_relative_position_bias", False)
    if parts.rope or relative:
        raise ModelError(
            f"stack.{name}: attention of {config.model_type} computes with positions here, and a prompt has none; "
            "use lora, or a model that adds its positions to the patches (ViT, DeiT, DINOv2)"
        )
    return [site for site in parts.sites if site.role == "block"]


def prompt_bound(model: nn.Module, blocks: list[Site]) -> float:
    """Return v = sqrt(6 / (C p p + d))."""
    config = pretrained(model).config
    size = getattr(config, "patch_size", 1)
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    return math.sqrt(6 / (getattr(config, "num_channels", 3) * high * wide + blocks[0].width_out))
