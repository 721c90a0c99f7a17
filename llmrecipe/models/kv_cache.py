"""Key/value caches whose rows can be removed and added during generation (continuous batching).

Letters: R rows, H key/value heads, K columns a layer keeps, C columns of the cache, E head size, W sliding window.

Rows are right-aligned: the last column of a cache is every row's newest token, and a shorter row starts with dead columns. So
rows are removed by an index, leading columns that are dead in every row are cut off, and two caches are concatenated by rows
once the narrower one is padded with dead columns on the left. A layer with a sliding window keeps the last min(C, W - 1)
columns and is treated alike.

`fresh` says which models have such a cache. What a method computes for each row in the pass over a prompt and reuses in later
passes belongs into `carried(cache)`: it is reordered with the rows.

`FixedCache` has rows and columns that stay: rows end at a column that moves to the right, and are overwritten by new ones.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

CACHE_NAMES = ("cache", "past_key_values")
"""What models call their cache: the first since Transformers 5.24."""
SPARE = 8
"""Columns in use for each that is allocated behind them."""
Carried = dict[str, dict[Any, Tensor]]
"""Wrapper's name -> any key -> tensor (R, ...), one entry per row."""


class CacheLayer(Protocol):
    """What is used of one layer of a `DynamicCache`."""

    is_initialized: bool
    """Whether it has keys of its own."""
    keys: Tensor
    """(R, H, K, E)."""
    values: Tensor

    def get_seq_length(self) -> int:
        """Return the columns that went through it."""


class RowCache(Protocol):
    """What is used of a `DynamicCache` whose rows can be removed and added."""

    layers: list[CacheLayer]
    carried: Carried
    """What methods store for each row (see `carried`)."""
    reorder_cache: Callable[[Tensor], None]


def fresh(model: nn.Module) -> RowCache | None:
    """Return an empty `DynamicCache`, or None where rows cannot be removed and added.

    That is so for an encoder-decoder, for states that are not columns (recurrent layers), for chunks counted from the first
    column, and for weights sharded over processes, which must all run the same passes.
    """
    config: Any = model.config
    if config.is_encoder_decoder or getattr(model, "_is_stateful", False) or sharded(model):
        return None
    if not getattr(model, "_supports_default_dynamic_cache", lambda: False)():
        return None
    own = config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(own, "layer_types", None) or ()):
        return None
    cache = DynamicCache(config=own)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    cache.layers = [SpareLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cast("RowCache", cache) if plain else None


class SpareLayer(DynamicLayer):
    """Keys (R, H, C, E) and values of one layer, with columns to spare behind them.

    A decoding step writes its own column. All are copied only where none is left, or where rows or columns have been changed.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.whole: list[Tensor] = []
        """Keys and values with the columns to spare."""
        self.written: list[Tensor] = []
        """The views of them that the last update returned."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Append columns, (R, H, N, E), and return all of them."""
        columns = self.get_seq_length()
        if not columns or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        end = columns + key_states.shape[2]
        own = [self.keys, self.values]
        changed = [x is not y for x, y in zip(own, self.written, strict=False)]
        if not changed or any(changed) or self.whole[0].shape[2] < end:
            self.whole = [x.new_empty(*x.shape[:2], end + end // SPARE, x.shape[3]) for x in own]
            for whole, x in zip(self.whole, own, strict=True):
                whole[:, :, :columns] = x
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, columns:end] = new
        self.written = [whole[:, :, :end] for whole in self.whole]
        self.keys, self.values = self.written
        return self.keys, self.values


def cache_of(named: Mapping[str, Any]) -> Any:  # noqa: ANN401 - caches of Transformers have no type in common
    """Return the cache among the inputs or outputs of a model, by name; None where there is none."""
    return next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)


def cache_name(function: Callable[..., Any]) -> str:
    """Return by what name a function of a model takes its cache."""
    taken = inspect.signature(function).parameters
    return next(name for name in CACHE_NAMES if name in taken or name == CACHE_NAMES[-1])


def cached(inputs: dict[str, Any]) -> int:
    """Return the number of tokens already in the cache of a pass."""
    cache = cache_of(inputs)
    if isinstance(cache, FixedCache):
        return cache.seen
    return int(cache.get_seq_length()) if cache is not None else 0


def prompts_of(inputs: dict[str, Any], given: Tensor | None, real: Tensor) -> Tensor | None:
    """Return the number of leading real tokens of each row that are a prompt, for methods that decide from a whole prompt.

    A prompt is what the caller marked as one, or everything that is read into an empty cache, which answers will follow. For no
    other tokens is it known that they precede the tokens the decision applies to, neither without a cache nor in a pass that
    continues one.

    Args:
        inputs: inputs of a stack of blocks, by name.
        given: (R,) prompt lengths set by the caller; beams repeat the rows of a prompt.
        real: (R, T) True on real tokens.

    Returns:
        (R,), or None where no row has a prompt.
    """
    if cached(inputs):
        return None
    if given is not None and not real.shape[0] % given.shape[0]:
        return given.to(real.device).repeat_interleave(real.shape[0] // given.shape[0])
    return real.sum(1) if cache_of(inputs) is not None else None


def sharded(model: nn.Module) -> bool:
    """Return whether each process has only a shard of each weight."""
    return is_deepspeed_zero3_enabled() or any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules())


def carried(cache: RowCache) -> Carried:
    """Return what methods store for each row of a cache; it is reordered with the rows."""
    if "carried" not in cache.__dict__:
        cache.carried = {}
        # A cache that held itself would keep its memory until Python looks for cycles; no allocator of a device makes it.
        place = weakref.ref(cache)

        def reorder(rows: Tensor) -> None:
            whole: Any = place()
            type(whole).reorder_cache(whole, rows)
            for own in whole.carried.values():
                for key, value in own.items():
                    own[key] = value.index_select(0, rows.to(value.device))

        cache.reorder_cache = reorder
    return cache.carried


def keep_rows(cache: RowCache, rows: Tensor) -> None:
    """Keep these rows, in this order; a row may be named several times."""
    carried(cache)
    cache.reorder_cache(rows)


def drop_columns(cache: RowCache, columns: int) -> None:
    """Cut off the first `columns` columns."""
    for layer in _filled(cache):
        left = cache_columns(layer) - columns
        kept = min(left, layer.keys.shape[2])
        layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]
        _note(layer, left)


def join(first: RowCache, second: RowCache) -> None:
    """Append the rows of the second cache to the first."""
    for a, b in zip(_filled(first), _filled(second), strict=True):
        columns, kept = max(cache_columns(a), cache_columns(b)), max(a.keys.shape[2], b.keys.shape[2])
        a.keys = torch.cat((_wide(a.keys, kept), _wide(b.keys, kept)))
        a.values = torch.cat((_wide(a.values, kept), _wide(b.values, kept)))
        _note(a, columns)
    more = carried(second)
    for name, own in carried(first).items():
        for key, value in own.items():
            own[key] = torch.cat((value, more[name][key]))


def cache_columns(layer: CacheLayer) -> int:
    """Return C, the number of columns that went through a layer and were not cut off."""
    return int(layer.get_seq_length())


def columns_of(cache: RowCache) -> int:
    """Return C of a cache that has read something."""
    return cache_columns(_filled(cache)[0])


def fixable(model: nn.Module) -> bool:
    """Return whether keys behind the newest column do not mislead a model, as its class says, and its rows can be replaced."""
    return bool(getattr(model, "_can_compile_fullgraph", False)) and fresh(model) is not None


class FixedLayer(StaticLayer):
    """Keys (R, H, C, E) and values of one layer, written at the column its cache is at; a sliding window is the mask's part.

    Args:
        like: a layer of another cache, for sizes and dtypes.
        column: where the next token is written, one tensor for all layers; a layer does not move it.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, like: CacheLayer, rows: int, columns: int, column: Tensor):
        super().__init__(columns)
        self.keys, self.values = (x.new_zeros(rows, x.shape[1], columns, x.shape[3]) for x in (like.keys, like.values))
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.cumulative_length, self.is_initialized = column, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write one token of each row, (R, H, 1, E), and return all columns."""
        at = self.cumulative_length.view(1)
        self.keys.index_copy_(2, at, key_states)
        self.values.index_copy_(2, at, value_states)
        return self.keys, self.values


class FixedCache(Cache):
    """A cache whose tensors keep their shapes and their places: rows are overwritten, and columns that are dead are masked.

    The newest token of every row stands in the column before `column`. What a column held before it was written again, and
    what stands before a row's first token, is never read: that is the mask's part.

    Args:
        like: a cache that has read something, for the sizes of the layers.
    """

    def __init__(self, like: RowCache, rows: int, columns: int):
        self.rows, self.columns, self.seen = rows, columns, 0
        self.carried: Carried = {}
        self.column = torch.zeros((), dtype=torch.long, device=_filled(like)[0].keys.device)
        """Where the next token is written, on the device."""
        layers: list[Any] = [FixedLayer(x, rows, columns, self.column) if x.is_initialized else x for x in like.layers]
        super().__init__(layers=layers)

    def stand_at(self, column: int) -> None:
        """Write the next token at a column.

        Args:
            column: also what the host knows of it (`seen`).
        """
        self.seen = column
        self.column.fill_(column)

    def advance(self) -> None:
        """Go on to the next column."""
        self.seen += 1
        self.column.add_(1)

    def put(self, rows: Tensor, other: RowCache) -> None:
        """Overwrite rows (N,) by those of another cache, whose newest column comes to stand before `column`."""
        for own, new in zip(_filled(cast("RowCache", self)), _filled(other), strict=True):
            first = self.seen - new.keys.shape[2]
            own.keys[:, :, first : self.seen].index_copy_(0, rows, new.keys)
            own.values[:, :, first : self.seen].index_copy_(0, rows, new.values)
        for name, group in carried(other).items():
            for key, value in group.items():
                kept = self.carried.setdefault(name, {})
                if key not in kept:
                    kept[key] = value.new_zeros(self.rows, *value.shape[1:])
                kept[key].index_copy_(0, rows, value)

    def move(self, columns: int) -> None:
        """Move every row by a number of columns, to the left where it is negative."""
        for layer in _filled(cast("RowCache", self)):
            layer.keys.copy_(layer.keys.roll(columns, 2))
            layer.values.copy_(layer.values.roll(columns, 2))
        self.stand_at(self.seen + columns)


def _filled(cache: RowCache) -> list[CacheLayer]:
    """Return the layers with keys of their own; others may read those of an earlier layer."""
    return [layer for layer in cache.layers if layer.is_initialized]


def _wide(x: Tensor, columns: int) -> Tensor:
    """Pad (R, H, K, E) with dead columns on the left."""
    return F.pad(x, (0, 0, columns - x.shape[2], 0))


def _note(layer: CacheLayer, columns: int) -> None:
    """Set the column count of a layer that does not keep every column."""
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = columns
