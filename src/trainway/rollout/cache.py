"""What a batch of answers decodes against: the keys and values of rows that come and go, in room made ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

Joining = tuple[Cache, Tensor]
"""A cache of prompts, and for each row that joins the index of its prompt, int64."""

_LEAST_ROOM = 64
"""Columns that are made ahead; a quarter of those there are, if that is more."""


class ColumnCache(Cache):
    """Rows whose newest tokens share a column: each step writes one, in place, and a row may join or leave at any time.

    A row of fewer tokens begins in a later column. What is before its first is 0 and must be masked.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        """`windows`: for each layer the number of tokens that one sees, itself among them; None for all."""
        super().__init__(layers=[_Columns(window) for window in windows])

    def change(self, kept: Tensor | None, joining: Sequence[Joining], length: int) -> None:
        """Keep some rows, by index, and add those that join behind them; the longest row has `length` tokens now."""
        for number, layer in enumerate(self.layers):
            layer.change(kept, [(cache.layers[number], index) for cache, index in joining], length)


class StateCache(DynamicCache):
    """transformers' own cache, for models that keep more of a row than keys and values: a batch is of prompts of one
    length, and none joins it."""

    def change(self, kept: Tensor | None, joining: Sequence[Joining], length: int) -> None:
        """As `ColumnCache.change`; rows that join are the first ones, from one cache, which is taken over."""
        if joining:
            assert kept is None and len(joining) == 1
            cache, kept = joining[0]
            self.layers = cache.layers
        if kept is not None:
            self.reorder_cache(kept)


def new_cache(config: PreTrainedConfig) -> ColumnCache | StateCache:
    """The cache for a model of this configuration."""
    layers = DynamicCache(config=config).layers
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    plain = {DynamicLayer, DynamicSlidingWindowLayer}
    # a chunk begins at a multiple of its size, which a row that begins in a later column does not
    if {type(layer) for layer in layers} <= plain and "chunked_attention" not in kinds:
        return ColumnCache([getattr(layer, "sliding_window", None) for layer in layers])
    return StateCache(config=config)


class _Columns(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, columns, width] each; of a sliding window only what it still sees."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self._seen = 2**62 if window is None else window - 1  # columns that a new token sees, without its own
        self._length = 0  # columns of the longest row, those that no window sees any more too
        self._end = 0  # where the next one is written

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the next column, [rows, heads, 1, width] each, and return all that it sees."""
        assert self.keys is not None and self.values is not None
        past = min(self._length, self._seen)
        if self._end == self.keys.shape[2]:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.change(rows, (), self._length)
        self.keys.narrow(2, self._end, 1).copy_(key_states)
        self.values.narrow(2, self._end, 1).copy_(value_states)
        first = self._end - past
        self._end += 1
        self._length += 1
        return self.keys.narrow(2, first, past + 1), self.values.narrow(2, first, past + 1)

    def change(
        self, kept: Tensor | None, joining: Sequence[tuple[CacheLayerMixin, Tensor]], length: int
    ) -> None:
        """As `ColumnCache.change`."""
        past, self._length = min(self._length, self._seen), length
        count = min(length, self._seen)
        first = self._end - past
        for name in ("keys", "values"):
            parts = [(getattr(layer, name), index) for layer, index in joining]
            if kept is not None:
                parts.insert(0, (getattr(self, name).narrow(2, first, past), kept))
            setattr(self, name, _together(parts, count))
        self._end = count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self._length, self._seen)
        return past + query_length, self._length - past

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("rows join by `change`")


def _together(parts: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """The chosen rows of all parts [N, heads, C, width], their last `count` columns side by side, and room behind."""
    like = parts[0][0]
    rows = sum(len(index) for _, index in parts)
    room = count + max(_LEAST_ROOM, count // 4)
    kind = like.dtype
    if torch.is_autocast_enabled(like.device.type):
        # attention casts them in every step anew; held so, it finds nothing to do
        kind = torch.get_autocast_dtype(like.device.type)
    out = like.new_zeros((rows, like.shape[1], room, like.shape[3]), dtype=kind)
    row = 0
    for source, index in parts:
        own = min(count, source.shape[2])
        chosen = source.narrow(2, source.shape[2] - own, own).index_select(0, index)
        out[row : row + len(index), :, count - own : count] = chosen
        row += len(index)
    return out
