"""NOAH."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Field, Literal, NonNegativeInt, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines import low_rank
from llmrecipe.methods._engines.kept_entries import entries_kept
from llmrecipe.methods.additive._engines import bottleneck, prefix_kv
from llmrecipe.methods.additive.vpt import own_head, prompt_blocks, prompt_bound
from llmrecipe.methods.hybrid._engines.elastic import (
    Elastic,
    ElasticAdapter,
    ElasticLowRank,
    ElasticPrompts,
    ElasticTables,
)
from llmrecipe.models.hooks.hook import all_hooks, device_of, row_index
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.vocabulary import reads_images

if TYPE_CHECKING:
    from torch import nn

KINDS = ("lora", "adapter", "prompt")

Design = Mapping[str, Mapping[str, int]]
"""Kind of part -> layer number -> size; what is not named is not there."""

SHAPE = bottleneck.BottleneckShape(activation="gelu")


@register
class Noah(Wrapper):
    """NOAH's supernet: LoRA, an adapter and prompts in every block, of which each step trains a sub-network drawn by chance.

    lora      y = W x + B[:, :k] A[:k] x                       queries, keys and values; A Kaiming-uniform, B zero
    adapter   y + W_u[:, :k] gelu(W_d[:k] y + b_d[:k]) + b_u   after the feed-forward, before its residual sum; W_u zero
    prompt    P[:k]                                            vectors in each block of a vision transformer (vpt, deep), or
                                                               key and value columns in a text model (p_tuning_v2)

    For each kind a step draws a depth D of `depths`, and for each of the first D layers a size k of the kind's list; deeper
    layers have no such part. Sizes share their leading entries, and entries that are not drawn do not move in that step, nor do
    their moments. The draw follows from (seed, step) alone, so processes, micro-batches and resumed runs see the same one.
    `sampling: sandwich` takes turns: the largest sub-network, the smallest, and two by chance.

    Outside of training steps the largest sub-network computes, or the one given as `sizes`: {lora: {"0": 5}, adapter: {},
    prompt: {"0": 10, "1": 1}}. The pipeline `noah_search` searches for the best within a number of parameters and trains what
    it finds from the start, as a plain stack of lora, adapter and vpt or p_tuning_v2 with sizes by layer.

    Trained: all parts at their largest size. Prompts make step 0 another model than the base. Not mergeable.

    Paper: Neural Prompt Search (arXiv 2206.04673). Departures: the adapter's nonlinearity is gelu and its up-projection starts
    at zero, where its code has quick-gelu and Xavier; parts are as wide as the largest size, where its code makes all of them
    100 wide; text models have key and value columns for prompts; sandwich takes turns over steps.
    """

    stage: ClassVar[Stage] = Stage.INJECT
    identity: ClassVar[bool] = False
    unsharded: ClassVar[str] = "the entries a step trains are parts of tensors of which each process holds a share"
    unmergeable: ClassVar[str] = "it is many networks at once; train the plain stack that noah_search writes"
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("before_step", "after_step")
    adjustable: ClassVar[tuple[str, ...]] = ("sizes",)

    lora: list[Rank] = Field(default_factory=lambda: [1, 5, 10])
    """Ranks; an empty list leaves the kind out."""
    adapter: list[Rank] = Field(default_factory=lambda: [1, 5, 10])
    """Bottleneck widths."""
    prompt: list[Rank] = Field(default_factory=lambda: [1, 5, 10])
    """Numbers of prompts, or of key and value columns."""
    depths: list[PositiveInt] = Field(default_factory=list)
    """How many of the first layers may have a part; default the quarters of the model's layers."""
    target: str = "attn.q|k|v"
    """Linear sites that get a low-rank branch."""
    sampling: Literal["uniform", "sandwich"] = "uniform"
    """How the sub-network of a step is drawn."""
    sizes: dict[Literal["lora", "adapter", "prompt"], dict[str, NonNegativeInt]] = Field(default_factory=dict)
    """Sub-network outside of training steps, by kind and layer number; empty for the largest."""
    seed: NonNegativeInt = 0
    """Seed of the draws."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add every part at its largest size.

        Raises:
            RecipeError: no kind has a size, or a depth or layer is beyond the model.
            ModelError: a site of `target` is not a linear layer, or the model's blocks have no place for a prompt.
        """
        self._check(model)
        if self.lora:
            self._attach_lora(model)
        if self.adapter:
            parts = anatomy(model)
            for sub in bottleneck.sublayers(parts, ["ffn"]):
                with torch.device(device_of(sub.block.module)):
                    hook = ElasticAdapter(parts.width, max(self.adapter), SHAPE)
                hook.kind, hook.layer = "adapter", sub.layer
                add_hook(sub.output.module, f"{self.name}__adapter", hook, self.name)
        if self.prompt:
            (self._attach_prompts if reads_images(model) else self._attach_columns)(model)
        self.use(model, self.outside(model))

    def _check(self, model: nn.Module) -> None:
        layers = layer_count(model)
        if not any(getattr(self, kind) for kind in KINDS):
            raise RecipeError(f"stack.{self.name}: lora, adapter and prompt are all empty, so nothing would train")
        beyond = [depth for depth in self.depths if depth > layers]
        if beyond:
            raise RecipeError(f"stack.{self.name}.depths: {beyond[0]} is more than the {layers} layers of this model")
        for kind, sizes in self.sizes.items():
            for layer, size in sizes.items():
                where, largest = f"stack.{self.name}.sizes.{kind}.{layer}", max(getattr(self, kind), default=0)
                if layer not in map(str, range(layers)):
                    raise RecipeError(f"{where}: this model has layers 0 to {layers - 1}")
                if size > largest:
                    raise RecipeError(f"{where}: {size} is more than {largest}, the largest that is trained")

    def _attach_lora(self, model: nn.Module) -> None:
        for site in anatomy(model).at(self.target):
            if not low_rank.is_linear_site(site):
                raise ModelError(f"stack.{self.name}.target: {site.path} is not a linear layer")
            with torch.device(device_of(site.module)):
                hook = ElasticLowRank(site.width_in, site.width_out, max(self.lora), row_index(site))
                low_rank.init_low_rank(hook)
            hook.kind, hook.layer = "lora", int(site.layer or 0)
            add_hook(site.module, site.name(f"{self.name}__lora"), hook, self.name)

    def _attach_prompts(self, model: nn.Module) -> None:
        blocks = prompt_blocks(model, self.name)
        bound = prompt_bound(model, blocks)
        for block in blocks:
            hook = ElasticPrompts(max(self.prompt), block.width_out, bound, 0.0)
            hook.kind, hook.layer = "prompt", int(block.layer or 0)
            add_hook(block.module, f"{self.name}__prompt", hook.to(device_of(block.module)), self.name)

    def _attach_columns(self, model: nn.Module) -> None:
        plan = prefix_kv.ColumnPlan("attn", max(self.prompt))
        for hook, roles in prefix_kv.attach_prefix(model, self.name, plan, tables_hook=ElasticTables):
            assert isinstance(hook, ElasticTables)
            hook.kind = "prompt"
            hook.follow({role: [int(site.layer or 0) for site in sites] for role, sites in roles.items()})

    # --- sub-networks ---------------------------------------------------------------------------------------------

    def space(self) -> dict[str, list[int]]:
        """Return the sizes of each kind that has any."""
        return {kind: sorted(set(getattr(self, kind))) for kind in KINDS if getattr(self, kind)}

    def choices(self, model: nn.Module) -> list[int]:
        """Return the depths."""
        layers = layer_count(model)
        return sorted(set(self.depths or [max(1, round(layers * quarter / 4)) for quarter in (1, 2, 3, 4)]))

    def outside(self, model: nn.Module) -> Design:
        """Return the sub-network outside of training steps."""
        return dict(self.sizes.items()) or self._every(model, max, max)

    def _every(self, model: nn.Module, deep: Any, wide: Any) -> Design:  # noqa: ANN401
        depth = deep(self.choices(model))
        return {kind: dict.fromkeys(map(str, range(depth)), wide(sizes)) for kind, sizes in self.space().items()}

    def draw(self, model: nn.Module, step: int) -> Design:
        """Draw the sub-network of a step, a function of seed and step alone."""
        if self.sampling == "sandwich" and step % 4 < 2:
            return self._every(model, max, max) if step % 4 == 0 else self._every(model, min, min)
        chance = random.Random(f"noah {self.seed} {step}")
        depths = self.choices(model)
        return {
            kind: {str(layer): chance.choice(sizes) for layer in range(chance.choice(depths))}
            for kind, sizes in self.space().items()
        }

    def use(self, model: nn.Module, design: Design) -> None:
        """Compute with a sub-network."""
        for part in self.parts(model):
            part.use(_by_number(design.get(part.kind, {})))

    def cost(self, model: nn.Module, design: Design) -> int:
        """Return how many numbers a sub-network leaves when it is trained as a plain stack, without a head."""
        return sum(part.cost(_by_number(design.get(part.kind, {}))) for part in self.parts(model))

    def parts(self, model: nn.Module) -> list[Elastic]:
        """Return its parts."""
        return [hook for _, _, _, hook in all_hooks(model, self.name) if isinstance(hook, Elastic)]

    def written(self, model: nn.Module, design: Design) -> dict[str, dict[str, Any]]:
        """Return the plain stack of a sub-network as options by kind; its low-rank scale is 1 at every rank."""
        layers = [str(layer) for layer in range(layer_count(model))]
        sizes = {kind: {layer: own.get(layer, 0) for layer in layers} for kind, own in design.items() if any(own.values())}
        found: dict[str, dict[str, Any]] = {}
        if "lora" in sizes:
            blocks = [site for site in anatomy(model).sites if site.role == "block" and sizes["lora"][str(site.layer)]]
            alphas = {rf"{re.escape(site.path)}\..*": float(sizes["lora"][str(site.layer)]) for site in blocks}
            found["lora"] = {"target": self.target, "sizes": sizes["lora"], "alpha_pattern": alphas}
        if "adapter" in sizes:
            found["adapter"] = {"sublayers": ["ffn"], "activation": SHAPE.activation, "sizes": sizes["adapter"]}
        if "prompt" in sizes:
            images = reads_images(model)
            kind, own = ("vpt", {"depth": "deep"}) if images else ("p_tuning_v2", {"dropout": 0.0})
            found[kind] = {**own, "sizes": sizes["prompt"]}
        return found

    # --- hooks of the loop ----------------------------------------------------------------------------------------

    def before_step(self, model: nn.Module, step: int) -> bool | None:
        """Draw the sub-network of the step."""
        self.use(model, self.draw(model, step))
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Return to the sub-network of evaluation."""
        self.use(model, self.outside(model))

    def stepping(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
        """Keep what was not drawn as it was, with its moments."""
        return entries_kept(optimizer, self._still(model))

    def _still(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        for part in self.parts(model):
            yield from part.still()

    def may_skip(self, name: str) -> bool:
        """Return True: every part may be absent from the sub-network of the first step."""
        return True

    def opened(self, model: nn.Module) -> set[str]:
        """Return a head that is the vision transformer's own, which trains with prompts; a new one trains in any case."""
        return own_head(model) if self.prompt and reads_images(model) else set()

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: all parts at their largest size are held; a step trains a part of them."""
        parameters = dict(model.named_parameters())
        count = sum(n for _, n in self.describe(model)) + sum(parameters[name].numel() for name in self.opened(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}


def _by_number(sizes: Mapping[str, int]) -> dict[int, int]:
    return {int(layer): size for layer, size in sizes.items()}


def layer_count(model: nn.Module) -> int:
    """Return how many layers the longer side of a model has."""
    return max(anatomy(model).blocks(side) for side in ("encoder", "decoder"))
