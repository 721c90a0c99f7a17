"""BitFit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Literal
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines.biases import add_to_bias, every_bias, make_room, pooler_of, shifted, train_bias
from llmrecipe.models.hooks.hook import Hook, all_hooks, row_index
from llmrecipe.models.hooks.host import add_hook, remove_hook
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.site_finder import is_convolutional

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

TERMS = {
    "query": ("attn.q", "cross.q", "attn.q_a"),
    "key": ("attn.k", "cross.k"),
    "value": ("attn.v", "cross.v"),
    "attn_out": ("attn.o", "cross.o"),
    "intermediate": ("mlp.gate", "mlp.up", "mlp.gate_up", "shared.gate", "shared.up"),
    "output": ("mlp.down", "shared.down"),
}
"""Term -> roles of its linear layers; the term `norm` is every role that starts with `norm.`."""

WHOLE = ("attn.qkv", "attn.kv", "attn.kv_a")
"""Fused projections, taken whole where every one of their parts is wanted."""


class ZeroBias(Hook):
    """A bias the model does not have, starting at zero: y + b."""

    rows: Tensor | None

    def __init__(self, width: int, rows: Tensor | None, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=torch.promote_types(dtype, torch.float32)))
        self.register_buffer("rows", rows, persistent=False)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + b, (..., out), at the listed outputs of a fused layer."""
        return shifted(y, self.bias.to(y.dtype), self.rows)

    def merge(self, module: nn.Module) -> None:
        """Add b to the bias the module has been given by now."""
        add_to_bias(module, self.bias.detach(), self.rows)


@register
class Bitfit(Wrapper):
    """BitFit: y = W x + b and y = LN(x) g + b; only the vectors b train.

    Trained: every bias of the model (BERT base: 11 d a layer, 102,912 in all, without the task head, which always trains).
    `terms: [query, intermediate]` is the paper's half-size variant. The trained biases are float32 master weights used in place
    of the base's, which stay as they were. Merging writes them back: exact in float32, one rounding below.

    Models without biases (Llama, Mistral, Qwen3, T5): `missing: add_zero` adds zero biases to the projections of attention and
    feed-forward (norms only with `add_norm_bias`); they merge where the family has config flags for them (Llama), else the
    adapter stays separate from the model. Without position in the keys (BERT, GPT-2) the key bias adds one constant to all
    logits of a query and changes nothing: it is counted, for parity, and reported as without effect. With rotary positions it
    acts. Convolutional networks (ResNet) train the biases they have. PEFT folders hold biases of linear layers (BEFT) or of
    LayerNorms (LN tuning), not both.

    Paper: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (arXiv 2106.10199).
    Departures: names are matched by role, not by substring, and the pooler's bias is a choice of its own.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    conflicts_by_default: ClassVar[dict[str, str]] = {
        "bitfit": "both would train the same biases; with bitfit's terms=[intermediate] and terms=[output] both train",
        "s4": "two of its groups train the same biases; with s4's tuned=[G1,G2] both train",
    }

    terms: Literal["all"] | list[Literal["query", "key", "value", "attn_out", "intermediate", "output", "norm"]] = "all"
    """Which biases train: all of the model, or those of some projections and norms."""
    missing: Literal["error", "add_zero", "existing_only"] = "error"
    """What to do where a projection has no bias: refuse, add one at zero, or train the biases that exist."""
    layers: str = "*"
    """Blocks whose biases train: a range such as `6:`, with a side where there are two: `encoder.6:`; * adds those outside."""
    add_norm_bias: bool = False
    """With add_zero: norms without a bias (RMSNorm) get one too."""
    pooler: Literal["auto", "train", "freeze"] = "auto"
    """The pooler's bias of encoders; `auto` trains it with `terms: all` only."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a master weight for every chosen bias, and a zero bias where one is missing and requested."""
        have, lack = self._sites(model)
        self._refuse(model, have, lack)
        if self.terms == "all":
            for module, tensor in self._every(model):
                train_bias(module, self.name if tensor == "bias" else f"{self.name}__{tensor}", self.name, None, tensor)
        else:
            for site in have:
                train_bias(site.module, site.name(self.name), self.name, row_index(site))
            for module, tensor in every_bias(model) if self.pooler == "train" else ():
                if module is pooler_of(model):
                    train_bias(module, self.name, self.name, None, tensor)
        if self.missing == "add_zero":
            for site in lack:
                self._add(site)

    def _every(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return (module, tensor name) of every bias in the chosen layers."""
        found = every_bias(model, pooler=self.pooler != "freeze")
        if self.layers == "*":
            return found
        inside = {id(module) for block in self._blocks(model) for module in block.module.modules()}
        return [place for place in found if id(place[0]) in inside]

    def _blocks(self, model: nn.Module) -> list[Site]:
        side, _, layers = self.layers.rpartition(".")
        return anatomy(model).at(f"{side}.layers.{layers}.block" if side else f"layers.{layers}.block")

    def costs(self, model: nn.Module) -> dict[tuple[str, int], int]:
        """Return how many numbers `terms: all` trains in each block, by side and layer."""
        _, lack = self._sites(model)
        blocks = self._blocks(model)
        places = {id(m): (b.side, int(b.layer or 0)) for b in blocks for m in b.module.modules()}
        found = {(b.side, int(b.layer or 0)): 0 for b in blocks}
        for module, tensor in every_bias(model):
            if id(module) in places:
                found[places[id(module)]] += getattr(module, tensor).numel()
        for site in lack if self.missing == "add_zero" else ():
            if id(site.module) in places:
                found[places[id(site.module)]] += site.width_out
        return found

    def _add(self, site: Site) -> None:
        weight = next(p for p in site.module.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        add_hook(site.module, site.name(self.name), ZeroBias(site.width_out, row_index(site), weight.device, dtype), self.name)

    def _roles(self) -> set[str]:
        terms = [*TERMS, "norm"] if self.terms == "all" else list(self.terms)
        return {role for term in terms for role in TERMS.get(term, ())} | ({"norm."} if "norm" in terms else set())

    def _sites(self, model: nn.Module) -> tuple[list[Site], list[Site]]:
        """Return chosen sites that have a bias, and chosen sites that lack one."""
        roles = self._roles() | (set(WHOLE) if self.terms == "all" else set())
        if self.terms == "all" and is_convolutional(model):
            return [], []
        wanted = [s for s in anatomy(model).sites if s.role in roles or ("norm." in roles and s.role.startswith("norm."))]
        whole = {s.path for s in wanted if s.rows is None}
        wanted = [s for s in wanted if s.rows is None or s.path not in whole]
        wanted = list({s.key: s for s in wanted}.values())
        if self.layers != "*":
            blocks = {(b.side, b.layer) for b in self._blocks(model)}
            wanted = [s for s in wanted if (s.side, s.layer) in blocks]
        have = [s for s in wanted if isinstance(getattr(s.module, "bias", None), nn.Parameter)]
        lack = [s for s in wanted if getattr(s.module, "bias", None) is None]
        if not self.add_norm_bias:
            lack = [s for s in lack if not s.role.startswith("norm.")]
        return have, lack

    def chosen(self, model: nn.Module) -> list[Site]:
        """Return the sites whose biases train under these terms."""
        have, lack = self._sites(model)
        return have + lack if self.missing == "add_zero" else have

    def _refuse(self, model: nn.Module, have: list[Site], lack: list[Site]) -> None:
        """Refuse to train nothing, or nine tensors, in silence.

        Raises:
            ModelError: requested biases are missing and `missing` does not say what to do, or none is left to train.
        """
        if self.missing == "error" and lack:
            counts = Counter(s.role for s in lack)
            there = Counter(s.role for s in have)
            raise ModelError(
                f"stack.{self.name}: {len(lack)} projections of this model have no bias "
                f"({', '.join(f'{role} x{n}' for role, n in counts.items())}); biases exist at "
                f"{', '.join(f'{role} x{n}' for role, n in there.items()) or 'no site'}. Set "
                f"stack.{self.name}.missing=add_zero to add zero biases, or missing=existing_only to train those that exist"
            )
        some = bool(have) or (self.terms == "all" and bool(every_bias(model)))
        if not some and not (lack and self.missing == "add_zero"):
            raise ModelError(
                f"stack.{self.name}: none of the requested biases exists in this model ({len(lack)} projections lack one); "
                f"set stack.{self.name}.missing=add_zero"
            )

    def merge(self, model: nn.Module) -> None:
        """Write the trained biases into the model.

        Raises:
            ModelError: added biases have no place in this family's config.
        """
        added = [(path, module) for path, module, _, hook in all_hooks(model, self.name) if isinstance(hook, ZeroBias)]
        make_room(model, added, self.name)
        with torch.no_grad():
            for _, module, name, hook in list(all_hooks(model, self.name)):
                hook.merge(module)
                remove_hook(module, name)

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield counts by role; biases without effect are named as such."""
        parts = anatomy(model)
        roles = {(s.path, s.name(self.name)): s.role for s in parts.sites}
        counts: Counter[str] = Counter()
        for path, _, name, hook in all_hooks(model, self.name):
            counts[roles.get((path, name), path)] += sum(p.numel() for p in hook.parameters())
        for role, count in counts.items():
            dead = role in ("attn.k", "cross.k") and not parts.rope
            yield f"bias of {role}{' (without effect: softmax ignores it)' if dead else ''}", count

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms; there are no weight gradients: biases need the gradients of outputs only."""
        count = sum(p.numel() for _, _, _, hook in all_hooks(model, self.name) for p in hook.parameters())
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}
