"""Adaptive prefix tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import Literal, OpenFraction, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.additive._engines import apt_gates, prefix_kv
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import nn


@register
class Apt(Wrapper):
    """Adaptive prefix tuning: P'_i = lambda_i alpha_i P_i, with alpha_i = sigmoid(h_{i-1} W_i) a score of each virtual token.

    P-tuning v2 whose columns P_i = (P_K, P_V) of layer i are scaled for each document before they join its keys and values:
    alpha (P) from a summary h of the layer's input, lambda a learned number a layer. The summary is the first token where
    attention looks both ways ([CLS]) and the mean of the prompt in decoders: the same for every target of a document, kept
    with the cache while it is continued. A prompt is what the rows of an objective mark off, or what generation reads into an
    empty cache; other rows, those of a plain `model(input_ids=...)` among them, are summarised by their first token.
    W starts at N(0, 0.02^2), so alpha begins near one half, and lambda at one.

    Step 0 is not the base model, and a small lambda does not remove a virtual token: its logits go to 0 and it keeps its share
    of the softmax. Trained: 2 L P d_kv + L d P + L; the scores outweigh the columns where d > 2 d_kv.

    Paper: Towards Adaptive Prefix Tuning (arXiv 2305.15212); sigmoid, summary and start values are our reading of it.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "torch's fully_shard does not divide tensors without a dimension"
    stage: ClassVar[Stage] = Stage.INJECT
    modality: ClassVar[str] = "text"
    otherwise: ClassVar[str] = "use vpt or prefix_tuning"
    identity: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "its columns enter the softmax of attention; no weight holds them"

    target: str = "attn"
    """Self-attention modules that get a prefix, with sides and ranges of layers."""
    num_virtual_tokens: Rank = 128
    """Virtual tokens before the keys and values."""
    token_gate: Literal["input", "static", "off"] = "input"
    """Scores from the input, learned scores that are the same for every document, or none."""
    layer_gate: bool = True
    """Whether each layer learns lambda."""
    summary: Literal["auto", "first", "prompt_mean"] = "auto"
    """What h is: the first token, or the mean of the prompt; auto takes the first in encoders, the mean in decoders."""
    gate_bias: bool = False
    """Whether the scores from the input have a bias."""
    dropout: OpenFraction = 0.1
    """Dropout on the columns while training."""
    positions: Literal["free", "shift"] = "free"
    """Where documents start: at 0, or after the prefix."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a table at each stack of blocks, scores at each block, a hook at each attention module."""
        parts = anatomy(model)
        shift = self.positions == "shift"
        plan = prefix_kv.ColumnPlan(self.target, self.num_virtual_tokens, dropout=self.dropout, shift=shift)
        for hook, roles in prefix_kv.attach_prefix(model, self.name, plan, structure, apt_gates.ScoredTables):
            sites = [site for group in roles.values() for site in group]
            decoder = sites[0].side == "decoder" and parts.causal
            hook.summary = ("prompt_mean" if decoder else "first") if self.summary == "auto" else self.summary  # type: ignore[assignment]
            blocks = {(s.side, s.layer): s for s in parts.sites if s.role == "block"}
            for layer in dict.fromkeys((s.side, s.layer) for s in sites):
                block = blocks[layer]
                scores = apt_gates.BlockScores(
                    block.layer or 0, block.width_out, self.num_virtual_tokens, self.token_gate, self.layer_gate, self.gate_bias
                )
                add_hook(block.module, self.name, scores.to(next(model.parameters()).device), self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 2 L P d_kv + L d P + L train."""
        count = sum(n for _, n in self.describe(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}
