"""MAM adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from llmrecipe.core.option_types import Literal, OpenFraction, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.additive.parallel_adapter import ParallelAdapter
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.hybrid._engines.parts import attention_target, part_of

if TYPE_CHECKING:
    from torch import nn


@register
class Mam(Wrapper):
    """MAM adapter: a short prefix in every attention and a scaled parallel adapter at every feed-forward.

    attention      y = softmax(Q [P_K; K]^T / sqrt(e) + mask) [P_V; V]
    feed-forward   x' = x + F(N(x)) + s (W_u relu(W_d u + b_d) + b_u), post-norm x' = LN(x + F(x) + s (...))

    It stands for `prefix_tuning` (cross-attention included where there is one) and `parallel_adapter` (`sites: [ffn]`), which
    a recipe may write out instead: `check` prints them. W_u and both biases start at zero, so the feed-forward starts as the
    base's; the prefix takes its share of each softmax, so step 0 is not the base model. Trained: 2 d r + r + d a
    feed-forward, and the prefix: 2 P d_kv an attention, or the table and MLP that make it. Not mergeable.

    The defaults are the paper's for summarization (P = 30, r = 512, s = 4); for GLUE it takes P = 16, r = 16, s = 2.

    Paper: Towards a Unified View of Parameter-Efficient Transfer Learning (arXiv 2110.04366). Departures: those of
    `parallel_adapter`: u = N(x) in pre-norm blocks, `input: residual` is the paper's u = x. The paper's other parallel forms
    are options of that method: `scale: 1.0` (parallel), `form: multihead` (multi-head parallel), `sites: [attn]`.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = False
    identity: ClassVar[bool] = False

    num_virtual_tokens: Rank = 30
    """Virtual tokens of the prefix."""
    reparam: Literal["mlp", "flat"] = "mlp"
    """How the prefix trains: a small table and an MLP, or the columns themselves."""
    hidden: Rank = 800
    """Width of the prefix's MLP."""
    r: Rank = 512
    """Width of the bottleneck."""
    scale: float | Literal["learned"] = 4.0
    """Factor s: a number, or one trained number that starts at 1."""
    input: Literal["normed", "residual"] = "normed"
    """What the adapter reads in a pre-norm block."""
    dropout: OpenFraction = 0.0
    """Dropout on the columns and on the inner activation while training."""

    def expand(self, model: nn.Module) -> list[Wrapper]:
        """Return the prefix and the parallel adapter."""
        return [
            part_of(
                self, PrefixTuning, target=attention_target(model), num_virtual_tokens=self.num_virtual_tokens,
                reparam=self.reparam, hidden=self.hidden, dropout=self.dropout,
            ),
            part_of(
                self, ParallelAdapter, sites=["ffn"], r=self.r, scale=self.scale, input=self.input, dropout=self.dropout,
            ),
        ]  # fmt: skip
