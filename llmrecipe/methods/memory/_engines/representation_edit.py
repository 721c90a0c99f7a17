"""Edits of rank r of the residual stream (ReFT), at the ends of prompts.

Shapes: h (M, d) the block's output at the edited tokens, W (r, d), b (r,), R (d, r) with orthonormal columns where the formula
has it orthonormal; f an activation.

    loreft        h + R (f(W h + b) - R^T h)
    noreft        the same with a free R
    consreft      h + R (b - R^T h)
    lobireft      h + R b
    direft        h + V (f(W h + b))              V (d, r) free
    direft_orth   h + R (f(W h + b))
    linear        h + V W h
    offset        h + O[slot]                     O (n + m, d): one vector a position

R is never stored: the trained tensor is M (d, r), and R = Q diag(sign diag U) with M = Q U (QR), in float32 or wider. It equals
an orthonormal M, stays orthonormal however M moves, weight decay included, and costs d r numbers, not d^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Annotated, Field, Literal, OpenFraction, Rank
from llmrecipe.core.registry import options
from llmrecipe.methods._base.method import ParamGroup, Stage, Wrapper
from llmrecipe.methods._engines.document_tokens import host_of
from llmrecipe.methods._engines.handed_down import handed_down
from llmrecipe.methods._engines.low_rank import wide
from llmrecipe.methods.memory._engines.prompt_ends import EditedTokens, PromptEnds, PromptEndsOfPass
from llmrecipe.models.hooks.hook import EDIT, Hook, all_hooks, device_of
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.site import Site

ACTIVATIONS = {"identity": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
ORTHONORMAL = ("loreft", "consreft", "lobireft", "direft_orth")
"""Formulas whose R has orthonormal columns."""
CONSTANT = ("consreft", "lobireft")
"""Formulas that learn b alone besides R."""


@dataclass(frozen=True)
class EditPlan:
    """What an edit is and where it acts."""

    formula: str
    r: int
    first: int
    last: int
    share_weights: bool
    activation: str
    dropout: float
    drops_output: bool
    identity: bool
    """Whether training starts at the base model."""

    def sides(self) -> list[str]:
        """Return the edits of a block: one for both ends of a prompt, or one for each."""
        return ["both"] if self.share_weights or not (self.first and self.last) else ["first", "last"]

    def count(self, width: int) -> int:
        """Return how many numbers one block trains."""
        if self.formula == "offset":
            return (self.first + self.last) * width
        per = {"linear": 2 * self.r * width, **dict.fromkeys(CONSTANT, self.r * width + self.r)}
        return len(self.sides()) * per.get(self.formula, 2 * self.r * width + self.r)


def positions_of(text: str, where: str) -> tuple[int, int]:
    """Return (n, m) of `f<n>+l<m>`.

    Raises:
        RecipeError: it names no position.
    """
    parts = {part[0]: int(part[1:]) for part in text.split("+")}
    if not any(parts.values()):
        raise RecipeError(f"{where}: '{text}' names no position; `f7+l7` edits the first and the last seven tokens of a prompt")
    return parts.get("f", 0), parts.get("l", 0)


def orthonormal(M: Tensor) -> Tensor:
    """Return Q (d, r) of M (d, r) = Q U with a non-negative diagonal of U; M itself where its columns are orthonormal."""
    Q, U = torch.linalg.qr(wide(M))
    return Q * torch.where(U.diagonal() < 0, -1.0, 1.0).to(Q.dtype)


class Edit(nn.Module):
    """The tensors of one edit and its formula."""

    def __init__(self, plan: EditPlan, width: int):
        super().__init__()
        self.plan = plan
        kind, r = plan.formula, plan.r
        if kind == "offset":
            self.O = nn.Parameter(torch.zeros(plan.first + plan.last, width))
            return
        if r > width:
            raise ModelError(f"r: {r} is more than the {width} numbers of a state; an edit of rank r needs r of them")
        self.R = nn.Parameter(torch.empty(width, r))
        if kind not in CONSTANT:
            self.W = nn.Parameter(torch.empty(r, width))
        if kind != "linear":
            self.b = nn.Parameter(torch.empty(r))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Initialize: R orthonormal, W and b as in a linear layer; or so that the edit changes nothing."""
        kind, bound = self.plan.formula, 1.0 / math.sqrt(self.R.shape[0])
        if kind in (*ORTHONORMAL, "noreft"):
            nn.init.orthogonal_(self.R)
        else:
            nn.init.uniform_(self.R, -bound, bound)
        if kind in CONSTANT:
            nn.init.uniform_(self.b)
        else:
            nn.init.uniform_(self.W, -bound, bound)
            if kind != "linear":
                nn.init.uniform_(self.b, -bound, bound)
        if self.plan.identity:
            self._start_at_base(kind)

    def _start_at_base(self, kind: str) -> None:
        if kind in ("loreft", "noreft"):
            self.W.copy_(self.R.t())
            self.b.zero_()
        elif kind == "lobireft":
            self.b.zero_()
        elif kind == "direft_orth":
            self.W.zero_()
            self.b.zero_()
        else:
            self.R.zero_()

    def basis(self) -> Tensor:
        """Return R (d, r) as the formula uses it."""
        return orthonormal(self.R) if self.plan.formula in ORTHONORMAL else wide(self.R)

    def forward(self, h: Tensor, slot: Tensor) -> Tensor:
        """Return Phi(h) - h, (M, d), for h (M, d) in float32 or wider."""
        kind = self.plan.formula
        if kind == "offset":
            return F.embedding(slot, wide(self.O))
        R = self.basis()
        if kind == "lobireft":
            return (wide(self.b) @ R.t()).expand_as(h)
        if kind == "consreft":
            inner = wide(self.b) - h @ R
        elif kind == "linear":
            inner = F.linear(h, wide(self.W))
        else:
            inner = ACTIVATIONS[self.plan.activation](F.linear(h, wide(self.W), wide(self.b)))
            inner = inner - h @ R if kind in ("loreft", "noreft") else inner
        return inner @ R.t()


class EditHook(Hook):
    """At a block: y with the edited states in the place of those at the ends of the prompt."""

    order = EDIT

    def __init__(self, plan: EditPlan, width: int):
        super().__init__()
        self.plan = plan
        for side in plan.sides():
            self.add_module(side, Edit(plan, width))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the block's output (R, T, d), edited.

        Raises:
            ModelError: the block runs outside the forward pass of its stack.
        """
        ends: PromptEnds | None = handed_down(self.owner)
        if ends is None:
            return y
        for side in self.plan.sides():
            y = self._edited(y, getattr(self, side), tokens_of(ends, side, self.plan))
        return y

    def _edited(self, y: Tensor, edit: Edit, tokens: EditedTokens) -> Tensor:
        if not tokens.index.numel():
            return y
        flat = y.reshape(-1, y.shape[-1])
        with torch.autocast(y.device.type, enabled=False):
            h = wide(flat.index_select(0, tokens.index))
            change = edit(h, tokens.slot)
            if self.plan.drops_output:
                new = F.dropout(h + change, self.plan.dropout, self.training)
            else:
                new = h + F.dropout(change, self.plan.dropout, self.training)
        # `index_copy` would keep the new states for its backward pass.
        return flat.index_put((tokens.index,), new.to(y.dtype)).view_as(y)


def tokens_of(ends: PromptEnds, side: str, plan: EditPlan) -> EditedTokens:
    """Return the tokens one edit of a block acts on; slots of the last ones follow those of the first."""
    if side != "both":
        return getattr(ends, side)
    return EditedTokens(
        torch.cat([ends.first.index, ends.last.index]), torch.cat([ends.first.slot, ends.last.slot + plan.first])
    )


def edited_blocks(model: nn.Module, target: str, name: str) -> list[Site]:
    """Return the blocks of a target; of an encoder-decoder those of the encoder, which reads the prompt.

    Raises:
        RecipeError: the target names something else than blocks, or blocks of such a decoder alone.
    """
    parts = anatomy(model)
    sites = parts.at(target)
    other = next((s for s in sites if s.role != "block"), None)
    if other is not None:
        raise RecipeError(
            f"stack.{name}.target: an edit changes the output of a block, not of '{other.role}'; "
            "use 'block' or 'layers.3|9.block'"
        )
    if parts.encoder_decoder:
        sites = [s for s in sites if s.side == "encoder"]
        if not sites:
            raise RecipeError(f"stack.{name}.target: the decoder of this model reads no prompt; name blocks of its encoder")
    return sites


@options
class StateEdits:
    """Mixin for a `Wrapper` that edits the residual stream; `variant` names the formula of an edit."""

    stage: ClassVar[Stage] = Stage.INJECT
    modality: ClassVar[str] = "text"
    otherwise: ClassVar[str] = "use vpt or lora"
    identity: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "it edits some tokens and not others; no weight can hold it"

    if TYPE_CHECKING:
        name: str

        @property
        def variant(self) -> str:
            """Return the formula."""

    target: str = "block"
    """Blocks whose output is edited, such as `layers.3|9|18|24.block`."""
    r: Rank = 8
    """Rank of the edit."""
    positions: Annotated[str, Field(pattern=r"^(f\d+(\+l\d+)?|l\d+)$")] = "f7+l7"
    """Edited tokens: the first n and the last m of each prompt."""
    share_weights: bool = True
    """One edit a block for both ends of the prompt; false: one for each."""
    activation: Literal["identity", "relu", "gelu", "silu", "tanh"] = "identity"
    """Applied to what the learned projection of h gives, its bias included."""
    dropout: OpenFraction = 0.0
    """Dropout while training."""
    dropout_on: Literal["edit", "output"] = "edit"
    """What is dropped: what the edit adds, or the whole edited state."""
    init: Literal["default", "identity"] = "default"
    """identity: start at the base model."""

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse positions that name no token."""
        positions_of(self.positions, f"stack.{self.name}.positions")

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base model."""
        return self.init == "identity"

    def plan(self) -> EditPlan:
        """Return the edit."""
        first, last = positions_of(self.positions, f"stack.{self.name}.positions")
        shared = self.share_weights or self.variant == "offset"
        output, identity = self.dropout_on == "output", self.init == "identity"
        return EditPlan(self.variant, self.r, first, last, shared, self.activation, self.dropout, output, identity)

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add an edit at every block of `target`, and what finds the prompts at the module that runs the blocks.

        Raises:
            RecipeError: the target names something else than blocks that read a prompt.
            ModelError: the rank is larger than the width of a state.
        """
        plan = self.plan()
        sites = edited_blocks(model, self.target, self.name)
        width = anatomy(model).width
        for side in dict.fromkeys(s.side for s in sites):
            ends = PromptEndsOfPass(plan.first, plan.last, side == "encoder")
            add_hook(host_of(model, side), f"{self.name}__prompts", ends, self.name)
        for site in sites:
            with torch.device(device_of(site.module)):
                hook = EditHook(plan, width)
            add_hook(site.module, self.name, hook, self.name)

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return every orthonormal R with weight decay 0: its length has no effect, so there is nothing to decay."""
        names = {
            f"{path}.{child}.{side}.R"
            for path, _, child, hook in all_hooks(model, self.name)
            if isinstance(hook, EditHook)
            for side in hook.plan.sides()
            if hook.plan.formula in ORTHONORMAL
        }
        return [ParamGroup(frozenset(names), weight_decay=0.0)] if names else []

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 2 r d + r numbers an edit, (n + m) d for offsets; AdamW keeps 8 bytes for each."""
        count = self.plan().count(anatomy(model).width) * len(edited_blocks(model, self.target, self.name))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}
