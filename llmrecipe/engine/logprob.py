"""The log-prob engine: log p(target | context) at scored positions only, in chunks, in float32.

    t_n = z_n[y_n] - logsumexp(z_n),   z_n = post(head(h_n))

The N x V logits never exist at once. Letters: N scored positions, D hidden width, V vocabulary.

Three implementations give the same numbers:

- a frozen plain head: d t_n / d h_n = (onehot(y_n) - softmax(z_n)) post'(z_n) W is formed in the forward pass, chunk by
  chunk, and only that (N, D) tensor is kept; the backward pass multiplies it by the incoming gradient. Exact for any loss.
- a plain head that trains: with g_n the incoming gradient, d z_n = g_n (onehot(y_n) - softmax(z_n))
  gives the gradients of states and weights; the softmax of the first chunks is kept for it, `KEPT_CHUNKS` of them, that of the
  others computed again.
- any other head (adapted, quantized, sharded, capped): the head module is called on each chunk, and of several chunks each
  is recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmrecipe.core.device_profile import profile_of
from llmrecipe.models.autograd_context import AutogradContext
from llmrecipe.models.hooks.hook import hooks_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configs call the cap of the logits."""


KEPT_CHUNKS = 4
"""How many chunks of float32 probabilities a head that trains keeps for its backward pass."""


@dataclass(frozen=True)
class Post:
    """What happens to the head's output: z -> cap * tanh(scale * z / cap) / temperature."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0
    """Temperature of the sampling distribution; 1 leaves the model's own."""

    def __call__(self, z: Tensor) -> Tensor:
        """Apply to float32 logits (..., V)."""
        if self.scale != 1.0:
            z = z * self.scale
        z = z if self.cap is None else self.cap * torch.tanh(z / self.cap)
        return z if self.temperature == 1.0 else z / self.temperature

    def derivative(self, z: Tensor) -> Tensor | None:
        """Return d post / d logit, computed from the result z (..., V); None where it is 1 everywhere."""
        scale = self.scale / self.temperature
        if self.cap is None:
            return None if scale == 1.0 else torch.full_like(z, scale)
        return (1.0 - (z * self.temperature / self.cap) ** 2) * scale

    @staticmethod
    def of(config: PreTrainedConfig) -> Post:
        """Read a family's logit scaling from its config."""
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        family, scale = getattr(text, "model_type", ""), 1.0
        if getattr(text, "logit_scale", None) and family.startswith("cohere"):
            scale = float(text.logit_scale)
        if getattr(text, "logits_scaling", None):
            scale = float(text.logits_scaling) if family.startswith("hyperclovax") else 1.0 / float(text.logits_scaling)
        if getattr(text, "logits_mup_width_multiplier", None):
            scale = 1.0 / float(text.logits_mup_width_multiplier)
        if getattr(text, "mup_base_width", None):
            scale = float(text.mup_base_width) / float(text.hidden_size)
        scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)
        # T5 ties its head whatever `tie_word_embeddings` of a checkpoint says; that value became this one.
        if getattr(text, "scale_decoder_outputs", False):
            scale *= float(getattr(text, "mup_base_width", None) or text.hidden_size) ** -0.5
        return Post(scale, next((cap for name in CAPS if (cap := getattr(text, name, None))), None))


def token_logprobs(
    hidden: Tensor, target: Tensor, head: nn.Module, post: Post = Post(), entropy: bool = False, entropy_graph: bool = False,
    normalizer: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Compute log-probabilities of targets.

    Args:
        hidden: (N, D) states that predict the targets.
        target: (N,) token ids.
        head: module (N, D) -> (N, V).
        entropy: also return the detached entropy of each distribution (costs one more pass over the logits).
        entropy_graph: give the entropy its graph, for losses it is part of.
        normalizer: also return log sum_v exp(z_v), with graph.

    Returns:
        `logprobs` (N,) float32 with graph, `correct` (N,) whether no token is more likely than the target, `entropy` (N,), and
        `normalizer` (N,) where it was requested.
    """
    if hidden.shape[0] == 0:
        # A micro-batch without targets still takes part in the backward pass of every rank.
        zero = upcast(hidden.sum()) * 0.0
        found = {"logprobs": zero.expand(0), "correct": hidden.new_zeros(0), "entropy": hidden.new_zeros(0)}
        return found | ({"normalizer": zero.expand(0)} if normalizer else {})
    if _is_plain_frozen(head) and not (entropy_graph or normalizer):
        t, correct, ent = _FrozenHead.apply(hidden, target, head.weight, head.bias, post, entropy)
        return {"logprobs": t, "correct": correct, "entropy": ent}
    size = chunk_rows(head_width(head), hidden.device)
    if not entropy_graph and _is_plain_trained(head, post, hidden):
        kept = KEPT_CHUNKS if torch.is_grad_enabled() else 0
        t, correct, ent, norm = _TrainedHead.apply(hidden, target, head.weight, head.bias, post, entropy, kept)
        return {"logprobs": t, "correct": correct, "entropy": ent} | ({"normalizer": norm} if normalizer else {})
    parts: list[tuple[Tensor, ...]] = []
    for h, y in zip(hidden.split(size), target.split(size), strict=True):
        # The logits of a single chunk exist at once either way, so computing them twice would save nothing.
        if torch.is_grad_enabled() and hidden.shape[0] > size:
            parts.append(checkpoint(_chunk, h, y, head, post, entropy, entropy_graph, use_reentrant=False))
        else:
            parts.append(_chunk(h, y, head, post, entropy, entropy_graph))
    t, correct, ent, norm = (torch.cat(p) for p in zip(*parts, strict=True))
    return {"logprobs": t, "correct": correct, "entropy": ent} | ({"normalizer": norm} if normalizer else {})


Comparison = Callable[[Tensor, slice], dict[str, Tensor]]
"""Makes values (n,) by name of the float32 logits (n, V) of some of the N scored positions, and of which these are."""


NOTHING = "nothing"
"""Name of the one entry, (0,) with a graph, that a comparison of no positions gives."""


def compared(hidden: Tensor, head: nn.Module, post: Post, compare: Comparison) -> dict[str, Tensor]:
    """Return what a comparison makes of the logits of all positions, (N,) by name, with its graph.

    Logits exist for one chunk at a time; of several chunks each is computed again in the backward pass.

    Args:
        hidden: (N, D) states that predict the targets.
        head: module (N, D) -> (N, V).
    """

    def chunk(h: Tensor, rows: slice) -> dict[str, Tensor]:
        return compare(post(upcast(head(h))), rows)

    count, size = hidden.shape[0], chunk_rows(head_width(head), hidden.device)
    if not count:
        # A micro-batch without targets still takes part in the backward pass of every rank.
        zero = upcast(hidden.sum()) * 0.0
        return {NOTHING: zero.expand(0)}
    parts: list[dict[str, Tensor]] = []
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        if torch.is_grad_enabled() and count > size:
            parts.append(checkpoint(chunk, hidden[rows], rows, use_reentrant=False))
        else:
            parts.append(chunk(hidden[rows], rows))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def head_width(head: nn.Module) -> int:
    """Return V, the number of logits of a head."""
    return int(getattr(head, "out_features", 0) or getattr(head, "nf", 0) or 65536)


def upcast(x: Tensor) -> Tensor:
    """Cast to float32, or leave float64 where the model computes in it."""
    return x if x.dtype == torch.float64 else x.float()


def chunk_rows(vocabulary: int, device: torch.device | str) -> int:
    """Return the number of rows whose float32 logits are one chunk on a device."""
    return profile_of(device).logit_rows(vocabulary)


def _is_plain_frozen(head: nn.Module) -> bool:
    return (
        type(head) is nn.Linear
        and not hooks_of(head)
        and not head.weight.requires_grad
        and (head.bias is None or not head.bias.requires_grad)
    )


def _is_plain_trained(head: nn.Module, post: Post, hidden: Tensor) -> bool:
    """Return whether gradients go to a linear head in one piece, without a cap, computed in the precision of the states."""
    return (
        type(head) is nn.Linear
        and not hooks_of(head)
        and type(head.weight) is nn.Parameter
        and head.weight.requires_grad
        and (head.bias is None or head.bias.requires_grad)
        and post.cap is None
        and not torch.is_autocast_enabled(hidden.device.type)
    )


def _chunk(h: Tensor, y: Tensor, head: nn.Module, post: Post, entropy: bool, graph: bool) -> tuple[Tensor, ...]:
    z = post(upcast(head(h)))
    lse = torch.logsumexp(z, -1)
    t = z.gather(-1, y[:, None]).squeeze(-1) - lse
    with torch.no_grad():
        correct = (z.argmax(-1) == y).float()
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
        ent = lse - (z.softmax(-1) * z).sum(-1) if entropy else torch.zeros_like(lse)
    return t, correct, ent, lse


def _softmax(z: Tensor, zy: Tensor, top: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return e = exp(z - top) (n, V), its sums (n, 1), log-probabilities of the targets (n,), and entropies (n,) or zeros.

    e overwrites the logits: one buffer of chunk x V is all that exists, and one exp is all it costs.
    """
    shifted = z.sub_(top)
    e = shifted.exp() if entropy else shifted.exp_()
    total = e.sum(-1, keepdim=True)
    t = (zy - top - total.log()).squeeze(-1)
    if not entropy:
        return e, total, t, torch.zeros_like(t)
    return e, total, t, (total.log() - (e * shifted).sum(-1, keepdim=True) / total).squeeze(-1)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, post: Post, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if needs else None
        out: list[Tensor] = []
        hits: list[Tensor] = []
        ents: list[Tensor] = []
        size = chunk_rows(weight.shape[0], hidden.device)
        W = weight.to(hidden.dtype)
        for first in range(0, hidden.shape[0], size):
            h, y = hidden[first : first + size], target[first : first + size, None]
            z = post(upcast(torch.nn.functional.linear(h, W, None if bias is None else bias.to(h.dtype))))
            top = z.amax(-1, keepdim=True)
            zy = z.gather(-1, y)
            hits.append((zy == top).float().squeeze(-1))
            derivative = post.derivative(z) if slope is not None else None
            e, total, t, ent = _softmax(z, zy, top, entropy)
            out.append(t)
            ents.append(ent)
            if slope is None:
                continue
            # d t / d h = post'(z_y) W_y - (sum_v e_v post'(z_v) W_v) / sum_v e_v
            part = slope[first : first + size]
            torch.mm((e if derivative is None else e.mul_(derivative)).to(h.dtype), W, out=part)
            own = W[target[first : first + size]]
            part.div_(-total).add_(own if derivative is None else own * derivative.gather(-1, y).to(own.dtype))
        if slope is not None:
            ctx.save_for_backward(slope)
        correct, ent = torch.cat(hits), torch.cat(ents)
        ctx.mark_non_differentiable(correct, ent)
        return torch.cat(out), correct, ent

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor, *_: object) -> tuple[Any, ...]:
        (slope,) = ctx.saved_tensors
        return grad[:, None].to(slope.dtype) * slope, None, None, None, None, None


class HeadContext(AutogradContext, Protocol):
    """The context of a head that trains."""

    post: Post


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: HeadContext, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, post: Post, entropy: bool,
        keep: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        out: list[Tensor] = []
        hits: list[Tensor] = []
        ents: list[Tensor] = []
        kept: list[Tensor] = []
        norms: list[Tensor] = []
        for h, y in _chunks(hidden, target, weight):
            z = post(upcast(_logits(h, weight, bias)))
            top, zy = z.amax(-1, keepdim=True), z.gather(-1, y)
            hits.append((zy == top).float().squeeze(-1))
            e, total, t, ent = _softmax(z, zy, top, entropy)
            out.append(t)
            ents.append(ent)
            norms.append(zy - t[:, None])
            if len(kept) < keep:
                kept.append(e.div_(total))
        normalizer = torch.cat(norms)
        ctx.post = post
        ctx.save_for_backward(hidden, target, weight, bias, normalizer, *kept)
        correct, ent = torch.cat(hits), torch.cat(ents)
        ctx.mark_non_differentiable(correct, ent)
        return torch.cat(out), correct, ent, normalizer.squeeze(-1)

    @staticmethod
    def backward(ctx: HeadContext, grad: Tensor, _: Tensor, __: Tensor, grad_normalizer: Tensor) -> tuple[Any, ...]:
        post, (hidden, target, weight, bias, norms, *kept) = ctx.post, ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight, dtype=hidden.dtype)
        to_bias = torch.zeros_like(bias, dtype=hidden.dtype) if bias is not None else None
        W, factor, first = weight.to(hidden.dtype), post.scale / post.temperature, 0
        for index, (h, y) in enumerate(_chunks(hidden, target, weight)):
            part = slice(first, first + len(h))
            first += len(h)
            g = grad[part, None] * factor
            to_p = grad_normalizer[part, None] * factor - g
            # d z = g onehot(y) + (g' - g) p, g' that of the normalizer; what is kept stays as it is, for a second pass.
            if index < len(kept):
                slope = kept[index] * to_p
            else:
                slope = post(upcast(_logits(h, weight, bias))).sub_(norms[part]).exp_().mul_(to_p)
            slope = slope.scatter_add_(-1, y, g).to(h.dtype)
            torch.mm(slope, W, out=to_hidden[part])
            to_weight.addmm_(slope.T, h)
            if to_bias is not None:
                to_bias += slope.sum(0)
        own_bias = None if bias is None or to_bias is None else to_bias.to(bias.dtype)
        return to_hidden, None, to_weight.to(weight.dtype), own_bias, None, None, None


def _chunks(hidden: Tensor, target: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (states (n, D), targets (n, 1)) of each chunk."""
    size = chunk_rows(weight.shape[0], hidden.device)
    yield from zip(hidden.split(size), target[:, None].split(size), strict=True)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))
