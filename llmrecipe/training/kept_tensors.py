"""What autograd keeps for the backward pass, counted while it is kept."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from llmrecipe.models.checkpointing import noted_results


class _Held:
    """A tensor that a graph keeps; it counts from when it is saved until the graph lets go of it."""

    __slots__ = ("counts", "kept", "place", "tensor")

    def __init__(self, tensor: Tensor, kept: KeptTensors):
        self.tensor = tensor
        self.kept = kept
        self.counts = tensor.layout == torch.strided
        if self.counts:
            self.place = tensor.untyped_storage()._cdata
            kept._add(tensor, self.place)

    def __del__(self) -> None:
        if self.counts:
            self.kept._drop(self.place)


class KeptTensors:
    """Inside, the storages that a graph saves count once each until the graph lets go of them.

    A block that is computed again in the backward pass counts by its inputs, and by the results it keeps besides them; what
    rests on the host in the meantime does not count. What a custom function stores on its `ctx` itself does not show; this
    package's functions store no activations there.

    Args:
        exclude: tensors that exist anyway, such as parameters and buffers.
        vocabulary: width by which logits are known; None counts none.
    """

    def __init__(self, exclude: Iterable[Tensor] = (), vocabulary: int | None = None):
        self.known = {t.untyped_storage()._cdata for t in exclude}
        self.vocabulary = vocabulary
        self.now = self.now_logits = 0
        self.peak = self.peak_logits = 0
        """Most bytes that were kept at one time, and those of logits among them."""
        self._uses: Counter[int] = Counter()
        self._sizes: dict[int, tuple[int, bool]] = {}
        """Storage -> (bytes, whether it holds logits)."""
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, self), lambda held: held.tensor)
        self._watched = noted_results(self._until_freed)

    def __enter__(self) -> KeptTensors:
        self._hooks.__enter__()
        self._watched.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watched.__exit__(kind, error, trace)
        self._hooks.__exit__()

    def _until_freed(self, tensor: Tensor) -> None:
        """Count what a selective block keeps; nothing but the end of its storage says that it is let go."""
        storage = tensor.untyped_storage()
        self._add(tensor, storage._cdata)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _add(self, tensor: Tensor, place: int) -> None:
        self._uses[place] += 1
        if self._uses[place] > 1 or place in self.known:
            return
        logits = tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        self._sizes[place] = tensor.untyped_storage().nbytes(), logits
        self._count(place, 1)
        if self.now > self.peak:
            self.peak, self.peak_logits = self.now, self.now_logits

    def _drop(self, place: int) -> None:
        self._uses[place] -= 1
        if not self._uses[place]:
            del self._uses[place]
            if place in self._sizes:
                self._count(place, -1)
                del self._sizes[place]

    def _count(self, place: int, sign: int) -> None:
        size, logits = self._sizes[place]
        self.now += sign * size
        self.now_logits += sign * size * logits
