"""What several tests share: real data where it lies beside the checkout, and the bytes that live at a peak."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent


def shared(*parts: str) -> Path:
    """A path inside the folder of real data and weights; the test skips where it is absent."""
    base = Path(os.environ.get("LLMRECIPE_SHARED", ROOT.parent / "shared"))
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the shared test data (set LLMRECIPE_SHARED)")
    return path


class PeakBytes(TorchDispatchMode):
    """Inside, every storage an operation makes counts until it is freed; `peak` is the most that lived at one time.

    Storages on the meta device hold nothing and do not count.

    Args:
        exclude: tensors that are there anyway, such as parameters.
    """

    def __init__(self, exclude: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in exclude}
        self.living: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout == torch.strided:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage._cdata in self.known or storage in self.living:
            return
        size = storage.nbytes()
        self.living.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
