"""(IA)^3."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Field, Literal
from llmrecipe.core.registry import register
from llmrecipe.core.tasks import Tasks
from llmrecipe.methods._base.method import ParamGroup, Stage, Wrapper
from llmrecipe.methods._engines.task_ids import task_ids_for
from llmrecipe.models.hooks.hook import SCALE, Hook, device_of, own_tensors, row_index
from llmrecipe.models.hooks.host import add_hook, merge_hooks
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.models.anatomy import Anatomy
    from llmrecipe.models.site import Site

TERMS = {"key": ("attn.k", "cross.k"), "value": ("attn.v", "cross.v"), "ffn": ("mlp.down", "shared.down", "experts")}
"""Term of `scaled` -> roles of the sites it stands for."""


def factors(table: Tensor, x: Tensor) -> Tensor:
    """Return rows of a table (n, D) for an activation (R, T, D): (D,) for one task, else (R, T | 1, D) by `Context.task_ids`.

    Without task ids a pass belongs to the first task: probes of the bare model know no task.
    """
    tasks = None if table.shape[0] == 1 else task_ids_for(x)
    return table[0] if tasks is None else table[tasks]


class Scale(Hook):
    """Base of the scalings: a table l (n, D) of one vector a task, starting at one."""

    order = SCALE

    rows: Tensor | None

    def __init__(self, width: int, tasks: int, rows: Tensor | None = None):
        super().__init__()
        self.l = nn.Parameter(torch.ones(tasks, width))
        self.register_buffer("rows", rows, persistent=False)

    def only(self) -> Tensor:
        """Return the only vector (D,), in float32."""
        if self.l.shape[0] != 1:
            raise ModelError(
                f"{self.l.shape[0]} tasks cannot be merged into one weight; keep the adapter separate from the model"
            )
        return self.l[0].float()


class ScaleOutput(Scale):
    """y -> l * y, or l * y[rows] at some rows of a fused layer."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the scaled output (..., D)."""
        factor = factors(self.l, y).to(y.dtype)
        if self.rows is None:
            return y * factor
        full = factor.new_ones(*factor.shape[:-1], y.shape[-1])
        return y * full.index_copy(-1, self.rows, factor)

    def merge(self, module: nn.Module) -> None:
        """Multiply rows of W, and the bias, by l."""
        factor = self.only()
        axis = 1 if type(module).__name__ == "Conv1D" else 0
        _scale(module, "weight", axis, factor, self.rows)
        if getattr(module, "bias", None) is not None:
            _scale(module, "bias", 0, factor, self.rows)


class ScaleInput(Scale):
    """x -> l * x before a linear layer."""

    def before(self, x: Tensor) -> Tensor:
        """Return the scaled input (..., D)."""
        return x * factors(self.l, x).to(x.dtype)

    def merge(self, module: nn.Module) -> None:
        """Multiply columns of W by l."""
        _scale(module, "weight", 0 if type(module).__name__ == "Conv1D" else 1, self.only(), None)


class OneOutput(ScaleOutput):
    """`ScaleOutput` of a single task: any of a batch's rows can be scaled alone."""

    rowwise = traceable = True


class OneInput(ScaleInput):
    """`ScaleInput` of a single task: any of a batch's rows can be scaled alone."""

    rowwise = traceable = True


class ScaleKeys(Scale):
    """y -> l * y after a key norm, whose output is (R, T, D), (R, T, G, E) or (R, G, T, E)."""

    def __init__(self, heads: int, head_dim: int, tasks: int):
        super().__init__(heads * head_dim, tasks)
        self.heads, self.head_dim = heads, head_dim

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the scaled keys."""
        if y.dim() == 3:
            return y * factors(self.l, y).to(y.dtype)
        # A transposed view keeps the strides of the projection: the smaller one of the two axes is the heads'.
        transposed = y.shape[2] != self.heads or (y.shape[1] == self.heads and x.stride(1) < x.stride(2))
        tokens = y.transpose(1, 2) if transposed else y
        factor = factors(self.l, tokens).to(y.dtype).unflatten(-1, (self.heads, self.head_dim))
        return y * (factor.transpose(-3, -2) if transposed and factor.dim() == 4 else factor[:, None] if transposed else factor)


class ScaleExperts(Scale):
    """W_e -> W_e diag(l_e) for the down projections (E, D, F) of a mixture, (E, F, D) where stored transposed."""

    def __init__(self, site: Site):
        super().__init__(site.width_in, site.experts)
        self.tensor = str(site.tensor)
        self.transposed = site.transposed

    def weight(self, value: Tensor) -> Tensor:
        """Return the down projections of all experts with scaled inputs."""
        return value * (self.l[:, :, None] if self.transposed else self.l[:, None, :]).to(value.dtype)

    def merge(self, module: nn.Module) -> None:
        """Fold every vector into the neighbouring weights."""
        target = getattr(module, self.tensor)
        target.data = self.weight(target.float()).to(target.dtype)


def _scale(module: nn.Module, name: str, axis: int, factor: Tensor, rows: Tensor | None) -> None:
    weight = getattr(module, name)
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ModelError("merging into a quantized weight would quantize it again; dequantize the model first (export does)")
    full = factor.new_ones(weight.shape[axis])
    full = factor if rows is None else full.index_copy(0, rows, factor)
    shape = [1] * weight.dim()
    shape[axis] = -1
    weight.data = (weight.data.float() * full.view(shape)).to(weight.dtype)


@register
class Ia3(Wrapper):
    """(IA)^3: K' = l_k * K, V' = l_v * V and h' = l_ff * h before W2, with learned vectors l.

    Trained: l_k, l_v and l_ff of every layer, L (2 d_kv + f) numbers a task (decoder blocks with cross-attention 4 d_kv + f;
    routed experts one l_ff each). They start at one, so training starts at the base model, and have no weight decay: decay
    pulls to zero, not to one. Keys are scaled at the output of the key projection, before rotary positions and any key norm;
    `key_site: post_norm` scales after the key norm, where a norm cannot undo it. In fused projections only the rows of keys
    and values are scaled. Gated feed-forwards: the input of the down projection, the same function as scaling `up`.
    Merging is exact up to rounding: rows of W_k and W_v with their biases, columns of W_2.

    `tasks` gives every task its own vectors: one forward pass serves rows of several tasks, each by the task its row names,
    and equals running each task alone. `tasks: auto` takes the names from the training rows. Every row must name its task; an
    unknown name stops the run before weights are read.

    Paper: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (arXiv 2205.05638).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = True

    scaled: list[Literal["key", "value", "ffn"]] = Field(["key", "value", "ffn"])
    """What is scaled: keys and values of self- and cross-attention, inner activations of the feed-forward."""
    target: str | None = None
    """Sites of the target grammar instead of `scaled`: attention projections are scaled after, others at their input."""
    layers: str = "*"
    """Blocks that are scaled: a range such as `0:4` or `-1`."""
    key_site: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Where keys are scaled in models that norm their keys; `post_norm` cannot be merged."""
    tasks: list[str] | Literal["auto"] = Field(default_factory=list)
    """Names of the tasks of a mixed-task batch, or `auto` for those the training rows name; empty for one task."""
    task_field: str = "task"
    """Column in which a row names its task (or gives its number in `tasks`)."""

    def mixes(self) -> Tasks | None:
        """Return the named tasks, or those that the rows name.

        Raises:
            RecipeError: a name is given twice.
        """
        if not self.tasks:
            return None
        if self.tasks == "auto":
            return Tasks(None, self.task_field)
        twice = next((t for t in self.tasks if list(self.tasks).count(t) > 1), None)
        if twice is not None:
            raise RecipeError(f"stack.{self.name}.tasks: '{twice}' is given twice; every task has one set of vectors")
        return Tasks(tuple(self.tasks), self.task_field)

    def for_tasks(self, tasks: Tasks | None) -> Wrapper:
        """Return the wrapper with `tasks: auto` replaced by the names of the training rows."""
        if self.tasks != "auto" or tasks is None or tasks.names is None:
            return self
        return dataclasses.replace(self, tasks=list(tasks.names))  # type: ignore[call-arg]

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a scaling at every chosen site.

        Raises:
            RecipeError: the tasks are `auto` and no rows were read.
        """
        if self.tasks == "auto":
            raise RecipeError(f"stack.{self.name}.tasks: auto takes the names from training rows, and there are none here")
        parts = anatomy(model)
        sites = self.sites(parts)
        for site in sites:
            with torch.device(device_of(site.module)):
                hook = self._hook(site, parts)
            add_hook(site.module, site.name(self.name), hook, self.name)

    def sites(self, parts: Anatomy) -> list[Site]:
        """Return the chosen sites of a model.

        Raises:
            ModelError: a term of `scaled` matches nothing, or keys after the norm are requested where there is no key norm.
        """
        if self.target is not None:
            return parts.at(self.target)
        found: list[Site] = []
        for term in self.scaled:
            roles = TERMS[term]
            if term == "key" and self.key_site == "post_norm":
                roles = ("norm.k",)
            present = [r for r in roles if r in parts.roles()]
            if not present:
                hint = "; this model does not norm its keys, use key_site: pre_norm" if roles == ("norm.k",) else ""
                raise ModelError(f"stack.{self.name}.scaled: '{term}' matches nothing in this model{hint}\n{parts.describe()}")
            for role in present:
                here = parts.at(f"layers.{self.layers}.{'experts.down' if role == 'experts' else role}")
                found += [s for s in here if s not in found]
        return found

    def _hook(self, site: Site, parts: Anatomy) -> Hook:
        count = max(1, len(self.tasks))
        if site.tensor is not None:
            if count > 1:
                raise ModelError(f"stack.{self.name}.tasks: routed experts share one matrix product, so they cannot mix tasks")
            if not site.tensor.startswith("down"):
                raise ModelError(f"{site.path}.{site.tensor}: only down projections have inner activations to scale")
            return ScaleExperts(site)
        if site.role == "norm.k":
            return ScaleKeys(parts.kv_heads, parts.head_dim, count)
        if site.role.rsplit(".", 1)[-1] in ("k", "v", "q", "qkv", "kv") or site.rows is not None:
            kind = OneOutput if count == 1 else ScaleOutput
            return kind(site.width_out, count, row_index(site))
        return (OneInput if count == 1 else ScaleInput)(site.width_in, count)

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return its own parameters with weight decay 0."""
        return [ParamGroup(frozenset(own_tensors(model, self.name)), weight_decay=0.0)]

    def merge(self, model: nn.Module) -> None:
        """Fold every vector into the weights around it.

        Raises:
            ModelError: there are several tasks, keys are scaled after a norm, or a weight is quantized.
        """
        if len(self.tasks) > 1:
            raise ModelError(f"stack.{self.name}: {len(self.tasks)} tasks cannot be merged into one weight")
        if self.key_site == "post_norm":
            raise ModelError(f"stack.{self.name}: keys scaled after their norm cannot be merged; heads share its weight")
        merge_hooks(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: L (2 d_kv + f) train a task; AdamW keeps 8 bytes for each."""
        count = sum(n for _, n in self.describe(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}
