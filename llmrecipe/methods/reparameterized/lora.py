"""LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import (
    Annotated,
    Field,
    Literal,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Rank,
)
from llmrecipe.core.registry import register
from llmrecipe.core.time_limit import compiled, within
from llmrecipe.methods._base.method import ParamGroup, Probe, Stage, Wrapper
from llmrecipe.methods._engines import data_init, initialization, low_rank
from llmrecipe.methods._engines.biases import BiasMaster, make_room, open_biases
from llmrecipe.methods._engines.gated_low_rank import GateShares
from llmrecipe.methods._engines.input_gate import gate_means, prepare_gates
from llmrecipe.methods._engines.loftq_codes import Requantized, assign_codes
from llmrecipe.models.hooks.hook import Hook, all_hooks
from llmrecipe.models.hooks.host import add_hook, merge_hooks
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmrecipe.models.site import Site

T = TypeVar("T")


@register
class Lora(Wrapper):
    """LoRA: y = W x + s B A dropout(x), s = alpha / r (alpha / sqrt r with `use_rslora`).

    A (r, in) starts Kaiming-uniform and B (out, r) at zero, so training starts at the base model. A and B train; W is frozen.
    Merging W <- W + s B A is exact up to rounding. Embeddings: y = E[x] + s (A[:, x])^T B^T with A at zero. Fused 3-D experts:
    one pair an expert. Tied embeddings: when `embed` and `head` are both targeted one pair serves both. Biases named by `bias`
    train as float32 copies in the place of the base's, which stay as they were and are back when the adapter is switched off.

    `init` of linear layers; embeddings and fused experts have `default` and `gaussian`, embeddings also `mica`:
    orthogonal (B A = 0, neither is), pissa and pissa_niter_N (leading singular triplets of W; N power iterations), olora (QR of
    W), mica (minor left singular vectors in B, which is frozen; A = 0), loftq (best approximation of what 4 or 8 bits lost of
    W), eva (principal directions of the inputs in A, B = 0; ranks move to the layers where they explain most), corda, corda_kpm
    (triplets of W times the inputs' second moments: the first adapt fast, the last keep what the model knows), lora_ga
    (singular vectors of the gradient). The last five look at data before step 0 (`init_batches`), loftq at the dense weights,
    which are loaded once more for it.

    `gate` puts a factor in the place of alpha / r (`token`, `mean`): y = W x + g B A x, g = sigmoid(w x + b), for hybrids such
    as UniPELT; a branch whose factor depends on the input is not mergeable and has no PEFT form.

    Paper: LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685); scaling: A Rank Stabilization Scaling Factor
    for Fine-Tuning with LoRA (arXiv 2312.03732); init: PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775), MiCA (arXiv
    2604.01694), LoftQ (arXiv 2310.08659), EVA (arXiv 2410.07170), CorDA (arXiv 2406.05223), LoRA-GA (arXiv 2407.05000).
    Departures: pissa, olora, corda and lora_ga subtract their frozen first product instead of rewriting W, so base weights stay
    bit-equal and deltas portable. For the same reason the codes that loftq chooses from its second iteration on are kept and
    saved next to those of the base, half a byte a weight more, and a PEFT folder cannot bring them. eva takes all inputs at
    once instead of by increments.
    """

    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = True
    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")

    target: str = "attn.q|v"
    """Sites that get a low-rank branch."""
    r: Rank = 8
    """Rank of A and B."""
    alpha: PositiveFloat = 16.0
    """Scale of the branch: it is multiplied by alpha / r."""
    dropout: OpenFraction = 0.0
    """Dropout on the branch's input while training."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead, so that larger ranks keep learning."""
    init: (
        Literal["default", "gaussian", "orthogonal", "pissa", "olora", "mica", "loftq", "eva", "corda", "corda_kpm", "lora_ga"]
        | Annotated[str, Field(pattern=r"^pissa_niter_[1-9]\d*$")]
    ) = "default"
    """Initialization of A and B, also pissa_niter_N; every one but loftq starts at the base model."""
    init_batches: PositiveInt = 16
    """Batches that eva and lora_ga look at before step 0; rows, for corda."""
    eva_rho: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest rank eva may give a layer, as a multiple of r; 1 keeps all ranks equal."""
    loftq_iter: PositiveInt = 1
    """Iterations of loftq: from the second on the target's 4-bit codes are chosen again for W - s B A, then A and B again."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Rank by site path: regular expressions matched against the end of the module path."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Alpha by site path, like rank_pattern."""
    sizes: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Rank by layer number, instead of r; 0 leaves a layer out."""
    gate: Literal["none", "token", "mean"] = "none"
    """A gate sigmoid(w x + b) of the layer's input in the place of alpha / r: a token's own, or a document's mean (UniPELT)."""
    gate_share: Literal["per_module", "per_layer"] = "per_module"
    """Whether each branch has a gate of its own, or the branches of a layer have one together."""
    lr_ratio: PositiveFloat = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354)."""
    lora_bias: bool = False
    """Give B a bias b that trains too, from zero: y = W x + s (B A x + b). For linear layers."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base that train too: none, all of them, or those of the layers that get a branch."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a pair at every site of `target`.

        Raises:
            RecipeError: an option of a start that is not the one chosen.
            ModelError: a site cannot have the pair, its start, or a trained bias.
        """
        if self.loftq_iter > 1 and self.init != "loftq":
            raise RecipeError(f"stack.{self.name}.loftq_iter: it is an option of init: loftq, and init is {self.init}")
        sites = [site for site in anatomy(model).at(self.target) if self.sizes.get(str(site.layer), 1)]
        if self.gate != "none":
            self._attach_gated(model, sites)
            return
        tied = _tied(model, sites)
        ranks = (structure or {}).get("ranks", {})
        for site in sites:
            r = self._rank(site)
            initialization.check_init(site, self.init, r)
            alpha = pattern_value(self.alpha_pattern, site.path, self.alpha, f"stack.{self.name}.alpha_pattern")
            scale = alpha / (math.sqrt(r) if self.use_rslora else r)
            if tied is not None and site.role == "head":
                hook: Hook = low_rank.LowRankTiedHead(getattr(tied.module, tied.name(self.name)))
            else:
                learned = ranks.get(structure_key(site), 0 if ranks else r)
                if learned == 0:
                    continue
                hook = low_rank.low_rank_hook(site, learned, scale, self.dropout, self.lora_bias)
                initialization.init_hook(hook, self.init, site.module)
            add_hook(site.module, site.name(self.name), hook, self.name)
        if self.loftq_iter > 1:
            assign_codes(sites, self.name, "loftq_iter")
        open_biases(model, self.name, self.bias, self.target, sites, "lora_bias=true gives the branches biases of their own")

    def _rank(self, site: Site) -> int:
        given = self.sizes.get(str(site.layer), self.r)
        return int(pattern_value(self.rank_pattern, site.path, given, f"stack.{self.name}.rank_pattern"))

    def _attach_gated(self, model: nn.Module, sites: list[Site]) -> None:
        """Add a pair behind a gate at every site.

        Raises:
            RecipeError: an option that a gated pair does not have.
        """
        plain = {"init": "default", "lora_bias": False, "bias": "none", "use_rslora": False, "alpha_pattern": {}}
        for option, wanted in plain.items():
            if getattr(self, option) != wanted:
                raise RecipeError(f"stack.{self.name}.{option}: a gated branch has none; leave it out, or set gate: none")
        prepare_gates(model, self.name, self.gate, sites)
        shares = GateShares(self.name, self.gate, self.gate_share == "per_layer")
        for site in sites:
            add_hook(site.module, site.name(self.name), shares.hook(site, self._rank(site), self.dropout), self.name)

    def merges(self) -> bool:
        """Return whether the branch is a fixed change of W: without a gate."""
        return self.gate == "none"

    def metrics(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the mean gate of the last forward pass, where there are gates."""
        return gate_means(model, self.name) if self.gate != "none" else {}

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return the ranks that eva chose, by site."""
        if self.init != "eva":
            return {}
        hooks = [
            (path, name, hook) for path, _, name, hook in all_hooks(model, self.name) if isinstance(hook, low_rank.LowRank)
        ]
        return {"ranks": {f"{path}{name.removeprefix(self.name)}": hook.A.shape[0] for path, name, hook in hooks}}

    def calibrates(self) -> bool:
        """Return whether the initial values come from data, or from the weights before they were quantized."""
        return self.init in initialization.FROM_DATA

    def chooses(self) -> bool:
        """Return whether ranks are moved from site to site."""
        return self.init == "eva" and self.eva_rho > 1

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Run that initialization."""
        if self.calibrates():
            data_init.begin(model, self.name, self.init, probe, self.init_batches, self.eva_rho, self.loftq_iter)

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base: all but loftq, which starts nearer to the model before it was quantized."""
        return self.init != "loftq"

    def frozen(self, model: nn.Module) -> set[str]:
        """Return mica's B."""
        if self.init != "mica":
            return set()
        return {f"{path}.{name}.B" for path, _, name, hook in all_hooks(model, self.name) if hasattr(hook, "B")}

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return B with its own learning rate if `lr_ratio` is set."""
        if self.lr_ratio == 1.0:
            return []
        ends = (".B", ".bias")
        hooks = [f"{path}.{name}" for path, _, name, hook in all_hooks(model, self.name) if not isinstance(hook, BiasMaster)]
        names = {f"{p}{end}" for p in hooks for end in ends} & {n for n, _ in model.named_parameters()}
        return [ParamGroup(frozenset(names), lr_scale=self.lr_ratio)]

    def merge(self, model: nn.Module) -> None:
        """Set W <- W + s B A at every site, b <- the trained b; with `lora_bias` b <- b + s b_B.

        A host without a bias is given one at zero where its config has a flag for it.

        Raises:
            ModelError: the branches have gates; one side of a tied pair is adapted alone, so that merging would change the
                other side too; or a branch has a bias and its host can have none.
        """
        if not self.merges():
            super().merge(model)
        found = all_hooks(model, self.name)
        hooks = {path: hook for path, _, _, hook in found if not isinstance(hook, BiasMaster | Requantized)}
        shared = _shared_weights(model)
        for path, hook in hooks.items():
            partners = shared.get(path, set()) - {path}
            if partners and not (partners & set(hooks)) and not isinstance(hook, low_rank.LowRankExperts):
                raise ModelError(
                    f"stack.{self.name}: {path} shares its weight with {', '.join(sorted(partners))}, which has no branch; "
                    "merging would change both. Target both (`embed + head`) or load the adapter unmerged."
                )
        if self.lora_bias:
            hosts = [(path, host) for path, host, _, hook in all_hooks(model, self.name) if isinstance(hook, low_rank.LowRank)]
            make_room(model, hosts, self.name)
        merge_hooks(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: sum of r (in + out), and of out with `lora_bias`, train; AdamW keeps 8 bytes for each."""
        count = sum(n for _, n in self.describe(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}


def structure_key(site: Site) -> str:
    """Return what a saved structure calls a site, independent of the wrapper's name."""
    return f"{site.path}{site.name('')}"


def pattern_value(patterns: Mapping[str, T], path: str, default: T, where: str) -> T:
    """Return the value of the most specific (longest) pattern that matches the end of a path.

    Raises:
        RecipeError: two different patterns of one length match.
    """
    hits = [key for key in patterns if within(compiled(rf"(?:^|\.)(?:{key})$", where).search, path, where)]
    if not hits:
        return default
    longest = max(len(h) for h in hits)
    best = [h for h in hits if len(h) == longest]
    if len(best) > 1:
        raise RecipeError(f"{where}: both '{best[0]}' and '{best[1]}' match {path}; make one of them longer")
    return patterns[best[0]]


def _tied(model: nn.Module, sites: list[Site]) -> Site | None:
    """Return the embedding site, when it and the head are both targeted and share their weight."""
    embed = next((s for s in sites if s.role == "embed"), None)
    head = next((s for s in sites if s.role == "head"), None)
    if embed is None or head is None or embed.module.weight is not head.module.weight:
        return None
    # The embedding must be attached before the head that borrows its pair.
    sites.sort(key=lambda s: s.role == "head")
    return embed


def _shared_weights(model: nn.Module) -> dict[str, set[str]]:
    """Return module path -> paths of the modules that use the very same weight."""
    by_tensor: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, torch.nn.Parameter):
            by_tensor.setdefault(id(weight), set()).add(path)
    return {path: paths for paths in by_tensor.values() if len(paths) > 1 for path in paths}
