"""P-tuning v2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import Field, Literal, NonNegativeInt, OpenFraction, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.additive._engines import prefix_kv

if TYPE_CHECKING:
    from torch import nn


@register
class PTuningV2(Wrapper):
    """P-tuning v2: one table M (P, 2 L d_kv), trained directly, gives every layer's self-attention P key/value columns.

    y = softmax(Q [P_K; K]^T / sqrt(e) + mask) [P_V; V], with dropout on the columns while training. Meant for classification
    with a linear head; it serves every objective. `reparam: mlp` adds the optional projection M = W_2 tanh(W_1 X + b_1) + b_2.
    Entries start standard normal. Step 0 is not the base model: the columns take their shares of each softmax. A flat table
    wants a learning rate 10 to 100 times that of LoRA.

    Paper: P-Tuning v2 (arXiv 2110.07602).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    identity: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "its columns enter the softmax of attention; no weight holds them"

    target: str = "attn"
    """Attention modules that get a prefix, with sides and ranges of layers."""
    num_virtual_tokens: Rank = 128
    """Virtual tokens before the keys and values; the paper chooses it for each task, 8 to 128."""
    sizes: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Virtual tokens by layer number, instead of `num_virtual_tokens`; 0 leaves a layer out."""
    reparam: Literal["flat", "mlp"] = "flat"
    """Train the columns themselves, or a small table and an MLP."""
    hidden: Rank = 512
    """Width of the MLP."""
    dropout: OpenFraction = 0.1
    """Dropout on the columns while training."""
    positions: Literal["free", "shift"] = "free"
    """Where documents start: at 0, or after the prefix."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a table at each stack of blocks, a hook at each attention module of `target`."""
        plan = prefix_kv.ColumnPlan(
            self.target,
            self.num_virtual_tokens,
            self.reparam,
            self.hidden,
            dropout=self.dropout,
            shift=self.positions == "shift",
            sizes=self.sizes,
        )
        prefix_kv.attach_prefix(model, self.name, plan, structure)

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return whether the MLP has been dropped."""
        return prefix_kv.structure(model, self.name)

    def finish(self, model: nn.Module) -> None:
        """Keep the columns, drop the MLP."""
        prefix_kv.drop_mlp(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 2 L P d_kv train."""
        return prefix_kv.memory(model, self.name)
