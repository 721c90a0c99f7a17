"""UniPELT."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.hybrid._engines.parts import part_of
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import nn


@register
class Unipelt(Wrapper):
    """UniPELT: LoRA, a prefix and a serial adapter in every block, each behind a gate g = sigmoid(w x + b) of its input.

    lora     y = W x + g B A x at queries and values; the gate stands in the place of alpha / r
    prefix   y = softmax(Q [g P_K; K]^T / sqrt(e) + mask) [g P_V; V]
    adapter  x' = x + F(x) + g W_u relu(W_d u), u = x + F(x), post-norm u = LN(x + F(x)) and x' = LN(x + F(x) + g ...)

    It stands for `lora`, `prefix_tuning` and `adapter`, which a recipe may write out instead: `check` prints them. `mean` is
    the paper's gate, one number a document, the mean over its tokens (never over padding). It reads tokens to come, so
    decoders take `token`, one number a token: the same with a cache, packed or padded. g = 0 does not remove a prefix: zero
    keys and values still take their share of the softmax.

    B and W_u start at zero; the prefix makes step 0 another model than the base. Trained a layer: 2 d r for each projection,
    2 d b + b + d, the prefix's 2 P d_kv (or its table and MLP), and d + 1 a gate: query, value, prefix, adapter. Not mergeable.

    Paper: UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning (arXiv 2110.07577). Departures: as in
    its code, queries and values have a gate each (`share: per_part` is the paper's one); W_u at zero, where the code draws
    both matrices from N(0, 0.02^2) (`adapter_init: bert`); padding stays out of the mean; in pre-norm blocks the adapter's
    gate reads u / rms(u), for u grows with depth (`gate_input: raw` reads u).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "torch's fully_shard does not divide tensors without a dimension"
    stage: ClassVar[Stage] = Stage.INJECT
    modality: ClassVar[str] = "text"
    otherwise: ClassVar[str] = "use vpt or mam"
    mergeable: ClassVar[bool] = False
    identity: ClassVar[bool] = False

    parts: Literal["APL", "AP"] = "APL"
    """Adapter, prefix and LoRA, or the first two."""
    r: Rank = 8
    """Rank of LoRA."""
    num_virtual_tokens: Rank = 10
    """Virtual tokens of the prefix."""
    reparam: Literal["mlp", "flat"] = "mlp"
    """How the prefix trains: a small table and an MLP, or the columns themselves."""
    hidden: Rank = 512
    """Width of the prefix's MLP."""
    reduction: PositiveInt = 16
    """Width of the model over the width of the adapters."""
    gate: Literal["auto", "token", "mean"] = "auto"
    """One number a token, or the mean over a document; auto takes the mean in encoders."""
    share: Literal["per_module", "per_part"] = "per_module"
    """A gate for each projection of LoRA, or three gates a block."""
    gate_input: Literal["normed", "raw"] = "normed"
    """What the adapter's gate reads in a pre-norm block."""
    adapter_init: Literal["zero_up", "bert"] = "zero_up"
    """Start of the adapters: exact identity, or both matrices N(0, 0.02^2)."""

    def expand(self, model: nn.Module) -> list[Wrapper]:
        """Return the gated parts.

        Raises:
            RecipeError: a mean over tokens that a causal layer has not seen yet.
        """
        sites = anatomy(model)
        sees_all = not sites.causal and not sites.encoder_decoder
        if self.gate == "mean" and not sees_all:
            raise RecipeError(
                f"stack.{self.name}.gate: a mean over a document reads tokens that a decoder has not seen yet; use gate: token"
            )
        gate = self.gate if self.gate != "auto" else "mean" if sees_all else "token"
        made: list[Wrapper] = []
        if self.parts == "APL":
            shared = "per_layer" if self.share == "per_part" else "per_module"
            made.append(part_of(self, Lora, target="attn.q|v", r=self.r, gate=gate, gate_share=shared))
        made.append(
            part_of(
                self, PrefixTuning, num_virtual_tokens=self.num_virtual_tokens, reparam=self.reparam, hidden=self.hidden,
                gate=gate,
            )
        )  # fmt: skip
        made.append(
            part_of(
                self, Adapter, placement="pfeiffer", reduction=self.reduction, init=self.adapter_init, gate=gate,
                gate_input=self.gate_input,
            )
        )  # fmt: skip
        return made
