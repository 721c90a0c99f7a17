"""The selection pass: a score for every entry of the base, and the exact top k of them.

    fisher      S_i = sum_n (d log p(y_n | x_n) / d theta_i)^2     one backward pass an example
    absolute    S_i = sum_n |d log p(y_n | x_n) / d theta_i|
    signed      S_i = sum_b d L_b / d theta_i                      no score: the gradient itself, for initializations
    batch       S_i = sum_b (d L_b / d theta_i)^2                  one a batch: another quantity, the one SPT is defined by

No weight becomes a leaf: while scores are taken, a hook on each scored tensor sees that tensor's dense gradient, adds its
square to a float32 buffer and lets it go, so the memory is the buffer (4 bytes a candidate) and one layer's gradient.
`layer_groups: k` repeats the pass over k parts of the model and keeps only the best of each, for 1 / k of the buffer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import activate
from llmrecipe.methods.selective._engines.base_weight import Weight
from llmrecipe.methods.selective._engines.top_k import Part, top_k
from llmrecipe.models.autograd_context import AutogradContext
from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook, remove_hook

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.methods._base.method import Probe

Power = Literal["square", "absolute", "signed"]
Fold = Callable[[str, Tensor], Tensor]
"""(name, flat powers of a tensor's gradient) -> the fewer numbers of it that are added up."""
OWNER = "selection_scores"


class Scores:
    """Accumulated scores of tensors, flat, float32 (float64 for float64 weights)."""

    def __init__(
        self,
        weights: Mapping[str, Weight],
        power: Power,
        device: str = "auto",
        clip: float | None = None,
        fold: Fold | None = None,
    ):
        self.power, self.clip, self.fold = power, clip, fold
        self.totals = {}
        for name, weight in weights.items():
            kind = torch.float64 if weight.value.dtype == torch.float64 else torch.float32
            where = weight.value.device if device == "auto" else torch.device(device)
            size = weight.numel if fold is None else fold(name, torch.empty(weight.numel, device="meta")).numel()
            self.totals[name] = torch.zeros(size, dtype=kind, device=where)
        self.accumulates = False
        """Whether the gradient of an example comes in several parts (micro-batches)."""
        self.pending: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def seen(self, name: str, grad: Tensor) -> None:
        """Add part of an example's gradient of one tensor; of one used twice (tied, chunked head) parts are summed first."""
        flat = grad.detach().reshape(-1).to(self.totals[name].dtype)
        # A sum of gradients needs no pause; a power is taken of the whole.
        if (self.accumulates or self.calls[name] > 1) and (self.power != "signed" or self.clip is not None):
            kept = self.pending.get(name)
            self.pending[name] = flat.clone() if kept is None else kept.add_(flat)
        else:
            self._add(name, flat)

    def finish(self) -> None:
        """Finish an example."""
        for name, flat in self.pending.items():
            self._add(name, flat)
        self.pending.clear()
        self.calls.clear()

    def _add(self, name: str, flat: Tensor) -> None:
        total = self.totals[name]
        if self.clip is not None:
            flat = flat * (self.clip / (flat.norm() + 1e-6)).clamp_max(1.0)
        if self.fold is not None:
            powers = flat.square() if self.power == "square" else flat.abs() if self.power == "absolute" else flat
            total.add_(self.fold(name, powers).to(total.device))
            return
        flat = flat.to(total.device)
        if self.power == "square":
            total.addcmul_(flat, flat)
        elif self.power == "signed":
            total.add_(flat)
        else:
            total.add_(flat.abs_())


class _WatchContext(AutogradContext, Protocol):
    scores: Scores
    name: str


class _Watch(torch.autograd.Function):
    """W -> W; its gradient goes to the scores and no further."""

    @staticmethod
    def forward(ctx: _WatchContext, weight: Tensor, anchor: Tensor, scores: Scores, name: str) -> Tensor:
        ctx.scores, ctx.name = scores, name
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: _WatchContext, grad: Tensor) -> tuple[Any, ...]:
        ctx.scores.seen(ctx.name, grad)
        return None, None, None, None


class _WatchLinear(torch.autograd.Function):
    """y -> y at a quantized linear; dW = G^T X with respect to the dequantized weight."""

    @staticmethod
    def forward(ctx: _WatchContext, x: Tensor, y: Tensor, anchor: Tensor, scores: Scores, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scores, ctx.name = scores, name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: _WatchContext, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        ctx.scores.seen(ctx.name, g.float().t() @ x.reshape(-1, x.shape[-1]).float())
        return None, grad, None, None, None


class Watch(Hook):
    """Shows the gradient of one tensor to the scores."""

    order = -2

    def __init__(self, scores: Scores, name: str, tensor: str, anchor: Tensor):
        super().__init__()
        self.scores, self.source, self.tensor = scores, name, tensor
        self.anchor = [anchor]

    def weight(self, value: Tensor) -> Tensor:
        """Record and return W unchanged."""
        if not torch.is_grad_enabled():
            return value
        self.scores.calls[self.source] = self.scores.calls.get(self.source, 0) + 1
        return _Watch.apply(value, self.anchor[0], self.scores, self.source)


class WatchQuantized(Hook):
    """The same at a quantized linear, whose weight no graph can reach."""

    order = -2

    def __init__(self, scores: Scores, name: str, anchor: Tensor):
        super().__init__()
        self.scores, self.source = scores, name
        self.anchor = [anchor]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Record (x, y) and return y unchanged."""
        if not torch.is_grad_enabled():
            return y
        self.scores.calls[self.source] = self.scores.calls.get(self.source, 0) + 1
        return _WatchLinear.apply(x, y, self.anchor[0], self.scores, self.source)


@contextlib.contextmanager
def watching(weights: Mapping[str, Weight], scores: Scores) -> Iterator[None]:
    """Add hooks at every user of the tensors, for the length of a pass."""
    placed: list[tuple[nn.Module, str]] = []
    try:
        for number, (name, weight) in enumerate(weights.items()):
            anchor = torch.zeros((), device=weight.value.device, requires_grad=True)
            for module, tensor in weight.owners:
                child = f"{OWNER}_{number}"
                hook: Hook = WatchQuantized(scores, name, anchor) if weight.quantized else Watch(scores, name, tensor, anchor)
                add_hook(module, child, hook, OWNER)
                placed.append((module, child))
        yield
    finally:
        for module, child in reversed(placed):
            remove_hook(module, child)


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in training or evaluation mode; every module's own mode is restored after."""
    kept = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in kept.items():
            module.training = was


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep parameters from collecting gradients; each one's flag is restored after."""
    kept = [p for p in model.parameters() if p.requires_grad]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)


def score_entries(
    model: nn.Module,
    probe: Probe,
    weights: Mapping[str, Weight],
    examples: int,
    *,
    rows: int | None = 1,
    power: Power = "square",
    reduction: Literal["sum", "mean"] = "sum",
    training: bool = False,
    device: str = "auto",
    clip: float | None = None,
    fold: Fold | None = None,
    targets: Callable[[Any], Iterator[tuple[Any, float]]] | None = None,
) -> dict[str, Tensor]:
    """Score every entry of some tensors.

    Args:
        examples: how many batches are drawn; with several processes each takes its share and the scores are added.
        rows: rows in one batch; 1 for scores an example, None for the batch size of the recipe.
        reduction: `sum` scores log p(y|x), `mean` the mean loss, which would weigh an example of T targets by 1 / T^2.
        training: dropout on.
        clip: largest norm of one tensor's gradient before the power is taken.
        fold: adds up parts of each tensor, such as blocks, so that no buffer of its size is needed.
        targets: batch -> batches with other targets and their weights, where y is an expectation.

    Returns:
        name -> flat scores, folded where `fold` is given.

    Raises:
        ModelError: no gradient reached any of the tensors.
    """
    scores = Scores(weights, power, device, clip, fold)
    world, rank = getattr(probe.world, "world", 1), getattr(probe.world, "rank", 0)
    with mode(model, training), frozen(model), watching(weights, scores):
        for index, micros in enumerate(probe.groups(examples, rows)):
            if index % world != rank:
                continue
            scores.accumulates = len(micros) > 1
            weights_of = [probe.weight(m) for m in micros] if probe.weight is not None else [1.0] * len(micros)
            whole = 1.0 if reduction == "sum" else max(sum(weights_of), 1e-12)
            for micro, weight in zip(micros, weights_of, strict=True):
                for variant, share in targets(micro) if targets else ((micro, 1.0),):
                    # The power is taken of the gradient, so a probability enters as its root under squares.
                    factor = weight / whole * (share**0.5 if power == "square" else share)
                    if factor:
                        (probe.loss(variant) * factor).backward()
                    if targets:
                        scores.finish()
            scores.finish()
    if world > 1:
        for name, total in scores.totals.items():
            scores.totals[name] = probe.world.sum(total.double()).to(total)
    if weights and not any(bool(total.any()) for total in scores.totals.values()):
        raise ModelError("selection: no gradient reached the scored tensors; is there a supervised token in the rows?")
    return scores.totals


def select_top(
    weights: Mapping[str, Weight], k: int, layer_groups: int, scorer: Callable[[dict[str, Weight]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the k best entries of all tensors; the scorer is called once a group, and only a group's best are kept.

    Returns:
        name -> sorted flat indices, without tensors that won nothing.
    """
    names = list(weights)
    size = -(-len(names) // max(1, layer_groups))
    kept: list[Part] = []
    for first in range(0, len(names), size):
        group = {name: weights[name] for name in names[first : first + size]}
        totals = scorer(group)
        fresh: list[Part] = [(name, totals[name], None) for name in group]
        if size >= len(names):
            return {name: idx for name, idx in top_k(fresh, k).items() if idx.numel()}
        both = [*kept, *fresh]
        best = top_k(both, k)
        kept = [(name, _at(values, idx, best[name]), best[name]) for name, values, idx in both if best[name].numel()]
    return {name: idx for name, _, idx in kept if idx is not None}


def _at(values: Tensor, idx: Tensor | None, wanted: Tensor) -> Tensor:
    """Return scores at flat indices of a part."""
    return values[wanted] if idx is None else values[torch.searchsorted(idx, wanted)]


class Answering(Protocol):
    """What is used of the engine that answers for a model (see `Probe.engine`)."""

    head: nn.Module
    post: Callable[[Tensor], Tensor]

    def __call__(self, batch: Batch, want: str) -> dict[str, Tensor]:
        """Return what is wanted of a batch."""

    def hidden(self, batch: Batch) -> Tensor:
        """Return the states (R, T, D) that the head reads."""


def sampled_targets(engine: Answering, draws: int, seed: int) -> Callable[[Batch], Iterator[tuple[Batch, float]]]:
    """Sample y from the model instead of the data: tokens from language models, all classes of classifiers by probability.

    What is drawn for a batch depends on the seed and its rows alone, so any number of processes draws the same.
    """

    def variants(batch: Batch) -> Iterator[tuple[Batch, float]]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{list(batch.rows)}".encode()))
        labels = batch.extra.get("labels")
        if labels is not None and not batch.target.numel():
            with torch.no_grad():
                scores = engine(batch, want="scores")["scores"]
            if labels.is_floating_point():
                raise ModelError("selection: sample_type=expect needs classes or tokens; use sample_type=label here")
            for index, share in enumerate(scores.float().softmax(-1)[0].tolist()):
                yield batch.with_extra(labels=torch.full_like(labels, index)), share
            return
        for _ in range(draws):
            with torch.no_grad(), activate(batch.context()):
                hidden = engine.hidden(batch)
                logits = engine.post(engine.head(hidden.reshape(-1, hidden.shape[-1])[batch.source]).float())
            drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
            yield dataclasses.replace(batch, target=drawn.to(batch.target)), 1.0 / draws

    return variants
