"""Prefix-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import Field, Literal, NonNegativeInt, OpenFraction, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.additive._engines import apt_gates, prefix_from_text, prefix_kv

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class PrefixTuning(Wrapper):
    """Prefix-tuning: y = softmax(Q [P_K; K]^T / sqrt(e) + mask) [P_V; V] with trained P_K, P_V (g, P, e) in every attention.

    `reparam: mlp` makes the columns of all layers of one stack at once, M = W_2 tanh(W_1 X + b_1) + b_2, once a forward pass;
    after training only M is kept (`drop_mlp`, exact). `flat` trains M itself. Every query of a document sees every virtual
    token. Encoder, decoder and cross-attention have a table each: `target: attn` takes all self-attention, `attn + cross` the
    cross-attention too, `layers.4:.attn` some layers. The prefix carries no position (`positions: free`): documents start at 0
    and no context length is spent; `shift` starts them at P, as PEFT does.

    Step 0 is not the base model: even zero keys take P shares of each softmax. `gate_init: closed` starts at the base: the
    columns get a softmax of their own and a learned factor that begins at zero. A `gate` scales the columns and is no switch:
    at zero they still take their share.

    Paper: Prefix-Tuning (arXiv 2101.00190). `closed` is an extension after LLaMA-Adapter (arXiv 2303.16199): a logit bias that
    closes the joint softmax would leave the table without gradient. Gates: UniPELT (arXiv 2110.07577).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    identity: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "its columns enter the softmax of attention; no weight holds them"

    target: str = "attn"
    """Attention modules that get a prefix: attn (self-attention), cross, with sides and ranges of layers."""
    num_virtual_tokens: Rank = 30
    """Virtual tokens before the keys and values."""
    reparam: Literal["mlp", "flat"] = "mlp"
    """What is trained: a small table and an MLP, or the columns themselves."""
    hidden: Rank = 512
    """Width of the MLP."""
    width: PositiveInt | None = None
    """Width of the small table; the keys' width where null."""
    dropout: OpenFraction = 0.0
    """Dropout on the columns while training."""
    init: Literal["random", "zero", "text"] = "random"
    """Initialization of a flat table: standard normal, zeros, or the keys and values of `init_text`."""
    init_text: str = ""
    """Text for `init: text`, repeated or cut to the number of virtual tokens."""
    positions: Literal["free", "shift"] = "free"
    """Where documents start: at 0, or after the prefix."""
    gate_init: Literal["open", "closed"] = "open"
    """`closed` starts at the base model."""
    sizes: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Virtual tokens by layer number, instead of `num_virtual_tokens`; 0 leaves a layer out."""
    gate: Literal["none", "token", "mean"] = "none"
    """A gate sigmoid(w x + b) of the attention's input on keys and values: each query's own, or a document's mean (UniPELT)."""

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base: only a closed gate leaves the softmax unchanged."""
        return self.gate_init == "closed"

    def plan(self) -> prefix_kv.ColumnPlan:
        """Return the options as the shared code reads them."""
        return prefix_kv.ColumnPlan(
            self.target, self.num_virtual_tokens, self.reparam, self.hidden, self.width, self.dropout, self.init,
            self.positions == "shift", self.gate_init == "closed", self.sizes,
        )  # fmt: skip

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a table at each stack of blocks, a hook at each attention module of `target`."""
        if self.gate == "none":
            prefix_kv.attach_prefix(model, self.name, self.plan(), structure)
        else:
            apt_gates.attach_gated(model, self.name, self.plan(), structure, self.gate)

    def metrics(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the mean gate of the last forward pass, where there are gates."""
        return apt_gates.column_gates(model, self.name) if self.gate != "none" else {}

    def calibrates(self) -> bool:
        """Return whether the columns are initialized from a text."""
        return self.init == "text"

    def chooses(self) -> bool:
        """Return False: the text fills columns that are there."""
        return False

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Fill the table from `init_text`."""
        if self.init == "text":
            prefix_from_text.start_from_text(model, self.name, self.plan(), probe.tokenizer, self.init_text)

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return whether the MLP has been dropped."""
        return prefix_kv.structure(model, self.name)

    def finish(self, model: nn.Module) -> None:
        """Keep the columns, drop the MLP."""
        self.drop_mlp(model)

    def drop_mlp(self, model: nn.Module) -> None:
        """Replace the MLP by the table it makes, exactly."""
        prefix_kv.drop_mlp(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: P d_p + c (d_p + 1) + 2 L d_kv (c + 1) train for mlp, 2 L P d_kv for flat; kept: 2 L P d_kv.

        Gates are d + 1 more an attention, trained and kept.
        """
        facts = prefix_kv.memory(model, self.name)
        if self.gate == "none":
            return facts
        gates = apt_gates.gate_count(model, self.name)
        extra = {"trainable": gates, "optimizer_bytes": 8 * gates, "gradient_bytes": 4 * gates, "kept": gates}
        return {key: value + extra[key] for key, value in facts.items()}
