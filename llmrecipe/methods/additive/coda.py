"""CoDA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate, current
from llmrecipe.core.option_types import Literal, PositiveFloat, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines.document_tokens import stack_input
from llmrecipe.methods.additive._engines import bottleneck
from llmrecipe.methods.additive._engines.soft_topk import iterated_top_k, soft_top_k
from llmrecipe.models.attention import Attend, PickedTokens
from llmrecipe.models.hooks.hook import DELTA, Hook, device_of
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.kv_cache import prompts_of
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.models.anatomy import Anatomy
    from llmrecipe.models.site import Site

T = TypeVar("T")

ROWS = ("attn.q", "attn.q_a", "attn.o", "mlp", "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.down")
"""Roles that compute chosen tokens only."""
KEYS = ("attn.k", "attn.v", "attn.qkv", "attn.kv", "attn.kv_a")
"""Roles that do so too where keys and values come from chosen tokens only."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which tokens of a batch compete with each other."""

    place: Tensor
    """(G, L) flat index into R * T of each competitor."""
    exists: Tensor
    """(G, L) False where a group is shorter than L."""
    dense: Tensor
    """(R, T) tokens that always go through the block, unweighted."""


def padded_groups(mask: Tensor, prompt: Tensor | None, causal: bool) -> Groups:
    """Return one group a row (R, T): its real tokens, or the first `prompt` (R,) of them in a causal model."""
    mask = mask.bool()
    rows, columns = mask.shape
    place = torch.arange(rows * columns, device=mask.device).view(rows, columns)
    chosen_from = mask
    if causal and prompt is not None:
        chosen_from = mask & (mask.long().cumsum(1) <= prompt[:, None])
    return Groups(place, chosen_from, mask & ~chosen_from)


def packed_groups(context: Context, causal: bool, device: torch.device) -> Groups:
    """Return one group a segment: all of it, or, in a causal model, a shared prompt or the prompt at its beginning.

    Raises:
        ModelError: a segment that continues a shared prompt has a prompt of its own.
    """
    layout = context.layout
    assert layout is not None
    key = ("coda", causal, device)
    if key not in layout.cache:
        parents = {s.parent for s in layout.segments if s.parent is not None}
        spans: list[tuple[int, int]] = []
        for i, segment in enumerate(layout.segments):
            if causal and segment.parent is not None and segment.prompt:
                raise ModelError(
                    "coda: a packed row whose prompt is shared only in part cannot be routed; set data.packing=off"
                )
            length = segment.prompt if causal and i not in parents else segment.length
            if length:
                spans.append((segment.start, length))
        wide = max((size for _, size in spans), default=0)
        starts, sizes = torch.tensor(spans, dtype=torch.long, device=device).view(-1, 2).unbind(1)
        at = torch.arange(wide, device=device)
        exists = at < sizes[:, None]
        place = starts[:, None] + at * exists
        dense = torch.ones(1, layout.columns, dtype=torch.bool, device=device)
        dense[0, place[exists]] = False
        layout.cache[key] = Groups(place, exists, dense)
    return layout.cache[key]


class Router(bottleneck.Bottleneck):
    """Around a block: y = x + A(n) + m * (block(x) - x), with n = N(x) and the block computing the chosen tokens only."""

    order = DELTA

    def __init__(self, wrapper: Coda, width: int, r: int, norm: nn.Module | None, causal: bool):
        super().__init__(width, width, r, bottleneck.BottleneckShape(wrapper.activation))
        self.router = nn.Parameter(torch.randn(width) / width**0.5)
        self.wrapper = wrapper
        self.causal = causal
        # In a list, so that the block's norm is not registered twice.
        self.norm = [] if norm is None else [norm]

    def wrap_forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the conditional block, (R, T, D) -> (R, T, D)."""
        normed = self.norm[0](x) if self.norm else x
        groups = self._groups(x)
        if groups is None or not groups.place.numel():
            return call(x) + self.network(normed)
        weight = self._weights(normed, groups)
        context = current()
        shared = {**context.shared, self.owner: (self._picked(weight, groups, context), x.shape[1])}
        with activate(dataclasses.replace(context, shared=shared)):
            increment = call(x) - x
        return x + self.network(normed) + weight[..., None].to(x.dtype) * increment

    def _groups(self, x: Tensor) -> Groups | None:
        """Return the competing groups; None where everything is computed: a decoder's rows without a prompt, or after one."""
        context = current()
        shape = x.shape[:2]
        if context.layout is not None and (context.layout.rows, context.layout.columns) == tuple(shape):
            return packed_groups(context, self.causal, x.device)
        prompt = context.prompt_lengths
        if self.causal and (prompt is None or prompt.shape[0] != shape[0]):
            return None
        mask = context.attention_mask
        if mask is None or mask.shape != shape:
            mask = torch.ones(shape, dtype=torch.long, device=x.device)
        return padded_groups(mask, prompt, self.causal)

    def _weights(self, normed: Tensor, groups: Groups) -> Tensor:
        """Return m (R, T): soft top-k of the chosen tokens, one for dense ones, zero for the rest."""
        with torch.autocast(normed.device.type, enabled=False):
            full = torch.promote_types(normed.dtype, torch.float32)
            flat = (normed.to(full) @ self.router.to(full)).flatten()
            size = groups.exists.sum(1)
            wanted = self.wrapper.k_of(size)
            scores = flat[groups.place]
            soft = self.wrapper.solve(scores, wanted, groups.exists)
        rank = scores.masked_fill(~groups.exists, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        hard = (rank < wanted[:, None]) & groups.exists
        weight = groups.dense.to(soft.dtype).flatten()
        return weight.index_put((groups.place[hard],), soft[hard]).view(groups.dense.shape)

    def _picked(self, weight: Tensor, groups: Groups, context: Context) -> PickedTokens:
        """Return the tokens with a weight, as columns of each row."""
        chosen = (weight.detach() > 0) | groups.dense
        wide = int(chosen.sum(1).max())
        # A stable sort puts the chosen ones first and keeps their order.
        index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :wide].sort(1).values
        counts: tuple[int, ...] = ()
        if context.layout is not None and context.layout.columns == chosen.shape[1]:
            counts = tuple(int(c.sum()) for c in chosen[0].cpu().split([s.length for s in context.layout.segments]))
        return PickedTokens(index, chosen.gather(1, index), counts, self.wrapper.kv == "selected")


class OnRows(Hook):
    """y[chosen] = f(x[chosen]), zero elsewhere."""

    def wrap_forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the host on chosen tokens, (R, T, D_in) -> (R, T, D_out)."""
        picked, columns = current().shared.get(self.owner, (None, 0))
        # Rows that are no longer the batch's tokens: another CoDA has gathered its own, which the outer block needs,
        # or a method (DoRA) sends its matrices through the layer.
        if picked is None or x.dim() != 3 or x.shape[1] != columns:
            return call(x)
        y = call(x.gather(1, picked.index[..., None].expand(-1, -1, x.shape[2])))
        return y.new_zeros(*x.shape[:2], y.shape[2]).scatter(1, picked.index[..., None].expand(-1, -1, y.shape[2]), y)


class OnQueries(Hook):
    """Attention of the chosen queries."""

    def attention(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention (R, H, T, Ev), zero at queries that were not chosen."""
        picked, _ = current().shared.get(self.owner, (None, 0))
        return attend(q, k, v) if picked is None else attend(q, k, v, picked=picked)


class KnowRows(Hook):
    """Around a stack of blocks: what its inputs tell of their rows becomes the context's.

    That is the padding mask, also where generation or an encoder brings its own, and how long the prompts are
    (see `kv_cache.prompts_of`).
    """

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the stack under that context."""
        context = current()
        if context.layout is not None:
            return call(**inputs)
        shape = stack_input(inputs).shape[:2]
        given = inputs.get("attention_mask")
        mask = given if isinstance(given, Tensor) and given.dim() == 2 else context.attention_mask
        fits = mask is not None and mask.shape == shape
        real = mask.bool() if fits else torch.ones(shape, dtype=torch.bool, device=stack_input(inputs).device)  # type: ignore[union-attr]
        prompt = prompts_of(inputs, context.prompt_lengths, real)
        with activate(dataclasses.replace(context, attention_mask=mask, prompt_lengths=prompt)):
            return call(**inputs)


@register
class Coda(Wrapper):
    """CoDA: y = x + A(N(x)) + m * Z; an adapter A for all n tokens of a block, its frozen part for k routed ones only.

    Scores s = N(x) w; l = argmax s.l + e H(l) with sum l = k, 0 <= l <= 1 (soft top-k); m_i = l_i for the k largest, else zero.
    Z is what attention and feed-forward add to the k chosen tokens, which are gathered: their cost falls as n / k. `kv: all`
    lets chosen tokens attend to every token (keys and values of all are computed), `kv: selected` to each other. Padding
    never competes; packed sequences are routed one by one. At k = n the block is the dense one with a parallel adapter.

    Trained: for each conditional block an adapter (2 d r + r + d), a router w (d) and, with `train_norms`, its norms. W_u
    starts at zero and w at N(0, 1/d). Not the base model at step 0: unchosen tokens skip the block, and that is the method.

    Encoders only by default: choosing among all tokens of a decoder lets later ones decide for earlier ones. `causal:
    prompt_only` routes inside the prompt of a decoder, with generated tokens dense. A prompt is what the rows of an objective
    mark off, or what generation reads into an empty cache; other rows, those of a plain `model(input_ids=...)` among them,
    stay dense. Not mergeable.

    Paper: Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference (arXiv 2304.04947); iteration from
    the same line of work (CoLT5, arXiv 2303.09752). Departures: the soft top-k is solved in closed form (`solver: iterative`
    is the paper's, whose weights sum to less than k at small e); post-norm blocks take Z = block(x) - x and read x itself;
    no conditional pre-training phase of its own: run the same stack on `clm` or masked rows first and continue.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    waits: ClassVar[str] = "which tokens its blocks compute, so how many of them"
    stage: ClassVar[Stage] = Stage.INJECT
    modality: ClassVar[str] = "text"
    otherwise: ClassVar[str] = "use vpt or lora"
    identity: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    r: Rank = 64
    """Width of the adapters' bottleneck."""
    reduction: PositiveFloat = 4.0
    """Tokens over chosen tokens: k = ceil(n / reduction)."""
    k: PositiveInt | None = None
    """Chosen tokens of every sequence, instead of `reduction`."""
    kv: Literal["all", "selected"] = "all"
    """Which tokens have keys and values."""
    solver: Literal["exact", "iterative"] = "exact"
    """Closed form, or the paper's coordinate steps."""
    eps: PositiveFloat = 0.03
    """Entropy weight e of the soft top-k; only scores within about e of the cut move the router (short texts need about 1)."""
    eps_init: PositiveFloat = 4.0
    """Iterative: e at the first step."""
    eps_decay: PositiveFloat = 0.7
    """Iterative: factor of e between steps."""
    iters: PositiveInt = 20
    """Iterative: steps."""
    layers: str = "*"
    """Blocks that are conditional: a range such as `2:` or `-1`."""
    causal: Literal["refuse", "prompt_only"] = "refuse"
    """What a decoder-only model gets: an explanation, or routing inside the prompt."""
    activation: Literal["relu", "gelu", "silu", "tanh", "identity"] = "relu"
    """Nonlinearity of the adapters."""
    train_norms: bool = True
    """Also train the norms of the conditional blocks."""

    def k_of(self, size: Tensor) -> Tensor:
        """Return how many of each group's tokens are chosen, (G,)."""
        wanted = torch.full_like(size, self.k) if self.k is not None else torch.ceil(size / self.reduction).long()
        return torch.minimum(wanted.clamp_min(1), size)

    def solve(self, scores: Tensor, k: Tensor, exists: Tensor) -> Tensor:
        """Return soft top-k weights (G, L)."""
        if self.solver == "exact":
            return soft_top_k(scores, k, exists, self.eps)
        return iterated_top_k(scores, k, exists, self.eps, self.eps_init, self.eps_decay, self.iters)

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a router to every conditional block and gathers to what it computes.

        Raises:
            ModelError: a decoder without `causal: prompt_only`, or one with `kv: selected`.
        """
        parts = anatomy(model)
        roles = ROWS if self.kv == "all" else ROWS + KEYS
        for block in self._blocks(parts):
            inside = [s for s in parts.sites if (s.side, s.layer) == (block.side, block.layer) and s.rows is None]
            norm = next((s.module for s in inside if s.role == "norm.attn"), None) if parts.pre_norm else None
            with torch.device(device_of(block.module)):
                hook = Router(self, parts.width, self.r, norm, block.side == "decoder")
            add_hook(block.module, self.name, hook, self.name)
            done: list[nn.Module] = []
            for site in inside:
                # Where the feed-forward is one module its inside already sees chosen tokens only.
                nested = any(site.module is m for d in done for m in d.modules())
                if site.role in roles and not nested:
                    add_hook(site.module, self.name, OnRows(), self.name)
                    done += [site.module] if site.role == "mlp" else []
                elif site.role == "attn":
                    add_hook(site.module, self.name, OnQueries(), self.name)
        add_hook(_stack_of(model, parts), self.name, KnowRows(), self.name)

    def _blocks(self, parts: Anatomy) -> list[Site]:
        if any(s.role == "block" and s.side == "encoder" for s in parts.sites):
            return parts.at(f"encoder.layers.{self.layers}.block")
        if self.causal == "refuse":
            raise ModelError(
                f"stack.{self.name}: {parts.family} is a decoder: choosing among all its tokens lets later ones decide for "
                "earlier ones. Use an encoder or encoder-decoder, or set causal: prompt_only to route inside prompts"
            )
        if self.kv == "selected":
            raise ModelError(f"stack.{self.name}.kv: generated tokens attend to the whole prompt; a decoder needs kv: all")
        return parts.at(f"layers.{self.layers}.block")

    def opened(self, model: nn.Module) -> set[str]:
        """Return the norms of the conditional blocks if `train_norms` is on."""
        parts = anatomy(model)
        return bottleneck.norm_parameters(model, self._blocks(parts), parts) if self.train_norms else set()

    def may_skip(self, name: str) -> bool:
        """Return whether it is a router of a decoder, unused where no row of a batch has a prompt."""
        return self.causal == "prompt_only" and name.endswith(".router")

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 2 d r + r + 2 d a block and its norms train; AdamW keeps 8 bytes for each."""
        parts = anatomy(model)
        each = bottleneck.count(parts.width, parts.width, self.r, bottleneck.BottleneckShape()) + parts.width
        parameters = dict(model.named_parameters())
        trained = each * len(self._blocks(parts)) + sum(parameters[name].numel() for name in self.opened(model))
        return {"trainable": trained, "optimizer_bytes": 8 * trained, "gradient_bytes": 4 * trained}


def _stack_of(model: nn.Module, parts: Anatomy) -> nn.Module:
    """Return the module that gets the two-dimensional padding mask on the way to the conditional blocks."""
    if parts.encoder_decoder:
        return model.get_encoder()  # type: ignore[operator]
    return model.base_model if isinstance(model.base_model, nn.Module) else model
