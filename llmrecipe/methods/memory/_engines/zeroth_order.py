"""The zeroth-order engine: noise that is never stored, and updates from noise drawn again.

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),      theta <- theta - lr (g z + decay theta)

z ~ N(0, I) in float32 depends on (run seed, step, sample, parameter name, chunk) and on nothing else: not on the order of
parameters, not on the number of processes, not on how they divide a parameter, not on torch's global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmrecipe.models.sharded import first_entry, local, whole

CHUNK = 1 << 24
"""Entries of a tensor that are perturbed or updated at once; the only extra memory of an in-place step."""
SAMPLED = 4096
"""Entries of a tensor that enter its fingerprint."""


@dataclass(frozen=True)
class Trained:
    """One tensor that is optimised."""

    name: str
    parameter: nn.Parameter
    decays: bool = True
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Chunk:
    """A run of neighbouring entries of a parameter whose noise has one address, as far as this process holds it."""

    index: int
    size: int
    """Entries of the whole chunk."""
    start: int
    """Place in the chunk of the first entry that is held."""
    at: int
    """Place of that entry among all that this process holds of the parameter."""
    view: Tensor
    """The entries themselves, flat."""


def chunks_of(parameter: Tensor) -> Iterator[Chunk]:
    """Yield the chunks of a contiguous parameter; of a divided one those that this process holds entries of."""
    own, first = local(parameter).view(-1), first_entry(parameter)
    at = 0
    while at < own.numel():
        index, start = divmod(first + at, CHUNK)
        size = min(CHUNK, parameter.numel() - index * CHUNK)
        end = min(own.numel(), at + size - start)
        yield Chunk(index, size, start, at, own[at:end])
        at = end


class Noise:
    """z by address."""

    def __init__(self, seed: int, cpu: bool = False):
        """Draw on the CPU with `cpu`, whatever the parameter's device: slower, the same numbers on every machine."""
        self.seed = seed
        self.cpu = cpu
        self.generators: dict[str, torch.Generator] = {}

    def normal(self, name: str, step: int, sample: int, chunk: Chunk) -> Tensor:
        """Draw N(0, 1) in float32 for the entries of a parameter's chunk, on their device."""
        return self._drawn(torch.randn, "z", name, step, sample, chunk)

    def uniform(self, name: str, step: int, chunk: Chunk) -> Tensor:
        """Draw U(0, 1) in float32, for stochastic rounding."""
        return self._drawn(torch.rand, "rounding", name, step, 0, chunk)

    def _drawn(self, draw: Callable[..., Tensor], use: str, name: str, step: int, sample: int, chunk: Chunk) -> Tensor:
        generator = self._generator(use, name, step, sample, chunk.index, chunk.view.device)
        # The whole chunk, whatever part of it is held: a generator's numbers depend on how many are drawn at once.
        drawn = draw(chunk.size, generator=generator, device=generator.device)
        return drawn[chunk.start : chunk.start + chunk.view.numel()].to(chunk.view.device)

    def _generator(self, use: str, name: str, step: int, sample: int, index: int, place: torch.device) -> torch.Generator:
        device = torch.device("cpu") if self.cpu else place
        generator = self.generators.get(str(device))
        if generator is None:
            generator = self.generators[str(device)] = torch.Generator(device)
        address = f"{use}|{self.seed}|{step}|{sample}|{index}|{name}".encode()
        key = int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little")
        return generator.manual_seed(key >> 1)


def shift(tensor: Tensor, name: str, noise: Noise, step: int, sample: int, scale: float) -> None:
    """Add scale z to a tensor in place, one chunk of z at a time."""
    for chunk in chunks_of(tensor):
        chunk.view.add_(noise.normal(name, step, sample, chunk), alpha=scale)


def projected_gradient(above: float, below: float, eps: float, clip: float | None = None) -> float:
    """Return g = (L+ - L-) / (2 eps), clipped to [-clip, clip], rounded to float32: the history holds what is applied."""
    g = (above - below) / (2.0 * eps)
    if clip is not None:
        g = max(-clip, min(clip, g))
    return float32(g)


def float32(value: float) -> float:
    """Round a Python float to one that float32 holds exactly."""
    return float(torch.tensor(value, dtype=torch.float32))


@dataclass(frozen=True)
class StepEstimate:
    """What one step measured: enough to make its update again."""

    step: int
    lr: float
    g: tuple[float, ...]
    """One projected gradient a sample."""


@dataclass(frozen=True)
class UpdateMoments:
    """How estimates become an update.

    With m = beta1 m + (1 - beta1) e and v = beta2 v + (1 - beta2) e^2 over the estimates e = mean_i g_i z_i:
    sgd e; momentum m; adam (m / c1) / (sqrt(v / c2) + eps), c = 1 - beta^k after k estimates.
    """

    kind: str = "sgd"
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0


def gradient_estimate(item: Trained, noise: Noise, entry: StepEstimate, chunk: Chunk) -> Tensor:
    """Return e = mean_i g_i z_i of one chunk, in float32 (float64 for float64 parameters)."""
    dtype = torch.float64 if chunk.view.dtype == torch.float64 else torch.float32
    total = torch.zeros_like(chunk.view, dtype=dtype)
    for sample, g in enumerate(entry.g):
        total.add_(noise.normal(item.name, entry.step, sample, chunk), alpha=g / len(entry.g))
    return total


def update(
    trained: Iterable[Trained],
    noise: Noise,
    moments: UpdateMoments,
    window: Sequence[StepEstimate],
    stored: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Update theta <- theta - lr (direction + decay theta) for the last entry of the window.

    Args:
        window: entries from the oldest that counts to this step's; SGD needs this step's alone.
        stored: name -> (m, v) in float32, moved along; without it the moments are recomputed from the window.
    """
    now = window[-1]
    count = len(window) if stored is None else now.step + 1
    for item in trained:
        if stored is not None:
            absorb(item, noise, moments, now, stored)
        lr = now.lr * item.lr_scale
        decay = lr * moments.weight_decay if item.decays else 0.0
        for chunk in chunks_of(item.parameter.data):
            if stored is None:
                m, v = torch.zeros((), device=chunk.view.device), torch.zeros((), device=chunk.view.device)
                for entry in window if moments.kind != "sgd" else (now,):
                    m, v = _advance(m, v, gradient_estimate(item, noise, entry, chunk), moments)
            else:
                m, v = (_of_chunk(t, chunk) for t in stored[item.name])
            _apply(chunk, _direction(m, v, count, moments), lr, decay, noise, item.name, now.step)


def absorb(
    item: Trained, noise: Noise, moments: UpdateMoments, entry: StepEstimate, stored: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Update the stored moments of one tensor by one estimate."""
    for chunk in chunks_of(item.parameter.data):
        m, v = (_of_chunk(t, chunk) for t in stored[item.name])
        after_m, after_v = _advance(m, v, gradient_estimate(item, noise, entry, chunk), moments)
        m.copy_(after_m)
        v.copy_(after_v)


def new_moments(trained: Iterable[Trained]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> (m, v) at zero, in float32; of a divided parameter for what this process holds."""

    def zeros(item: Trained) -> Tensor:
        return torch.zeros_like(local(item.parameter.data), dtype=torch.float32)

    return {item.name: (zeros(item), zeros(item)) for item in trained}


def _advance(m: Tensor, v: Tensor, e: Tensor, moments: UpdateMoments) -> tuple[Tensor, Tensor]:
    if moments.kind == "sgd":
        return e, v
    m = m * moments.beta1 + e * (1.0 - moments.beta1)
    if moments.kind == "adam":
        v = v * moments.beta2 + e * e * (1.0 - moments.beta2)
    return m, v


def _direction(m: Tensor, v: Tensor, count: int, moments: UpdateMoments) -> Tensor:
    if moments.kind != "adam":
        return m
    first = m / (1.0 - moments.beta1**count)
    second = v / (1.0 - moments.beta2**count)
    return first / (second.sqrt() + moments.eps)


def _of_chunk(moment: Tensor, chunk: Chunk) -> Tensor:
    """Return the entries of a stored moment that belong to those of a chunk."""
    return moment.view(-1)[chunk.at : chunk.at + chunk.view.numel()]


def _apply(chunk: Chunk, d: Tensor, lr: float, decay: float, noise: Noise, name: str, step: int) -> None:
    view = chunk.view
    narrow = view.dtype in (torch.float16, torch.bfloat16)
    wide = view.float() if narrow else view
    if decay:
        wide.mul_(1.0 - decay)
    wide.add_(d, alpha=-lr)
    if narrow and lr:
        # An update far below the spacing of 16-bit numbers would round away; rounded at random it survives on average.
        view.copy_(round_at_random(wide, view.dtype, noise.uniform(name, step, chunk)))


def round_at_random(value: Tensor, dtype: torch.dtype, u: Tensor) -> Tensor:
    """Round float32 to one of its two 16-bit neighbours so that the mean is the value itself; u ~ U(0, 1)."""
    size = value.abs()
    below = size.to(dtype)
    bits = below.view(torch.int16) - (below.float() > size).to(torch.int16)
    below = bits.view(dtype).float()
    above = (bits + 1).view(dtype).float()
    up = u < (size - below) / (above - below)
    return torch.copysign((bits + up.to(torch.int16)).view(dtype), value.to(dtype))


def shapes_digest(trained: Iterable[Trained]) -> str:
    """Hash names, shapes and dtypes of the trained tensors, in any order."""
    lines = sorted(f"{t.name}:{tuple(t.parameter.shape)}:{t.parameter.dtype}" for t in trained)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def values_digest(trained: Iterable[Trained]) -> str:
    """Hash a strided sample of the trained values; every process that holds a part of them calls it."""
    digest = hashlib.blake2b(digest_size=16)
    for item in sorted(trained, key=lambda t: t.name):
        flat = whole(item.parameter.detach()).reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu()
        digest.update(item.name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
