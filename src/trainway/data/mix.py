"""Which source each training row comes from: a pure function of the row's number and the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from trainway.config.mixes import source_name
from trainway.config.schema import SourceConfig
from trainway.data.permutation import BLOCK, order_key, permute
from trainway.errors import DataError

BLOCK_ROWS = 256
MANY_EPOCHS = 4
"""A source that is repeated more often adds little: Muennighoff et al., "Scaling Data-Constrained Language
Models", 2023."""


@dataclass(frozen=True)
class Mix:
    """Sources and the shares of the rows that they give.

    The rows are numbered from 0 over the whole run and fall into blocks of BLOCK_ROWS. At the end of each block
    every source has given its share, rounded; inside a block the sources take turns in a random order.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    """Rows in one pass over each source."""
    shares: tuple[Fraction, ...]
    """Of all rows; their sum is exactly 1."""
    rows_per_epoch: int

    def counts(self, num_rows: int) -> list[int]:
        """How many of the first `num_rows` rows each source gives: never less for more rows, num_rows in all.

        The sources are halved, and halved again, and the rows divided between the halves by their shares, rounded.
        So each halving adds at most half a row to the distance from the exact share: with four sources it stays
        below one row, however long the run.
        """

        def divide(number: int, shares: Sequence[Fraction]) -> list[int]:
            if len(shares) == 1:
                return [number]
            left, right = shares[: len(shares) // 2], shares[len(shares) // 2 :]
            given = math.floor(number * sum(left) / sum(shares) + Fraction(1, 2))
            return divide(given, left) + divide(number - given, right)

        return divide(num_rows, self.shares)

    def place(self, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row its source and its number among the rows of that source: two int64 arrays.

        rows: consecutive numbers, int64. The numbers of a source are 0, 1, 2, ... in the order of the rows.
        """
        first, last = int(rows[0]), int(rows[-1])
        blocks = [self._block(block, seed) for block in range(first // BLOCK_ROWS, last // BLOCK_ROWS + 1)]
        own = slice(first % BLOCK_ROWS, first % BLOCK_ROWS + len(rows))
        sources, numbers = (np.concatenate(arrays)[own] for arrays in zip(*blocks, strict=True))
        return sources, numbers

    def _block(self, block: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = (np.array(self.counts(n * BLOCK_ROWS), dtype=np.int64) for n in (block, block + 1))
        given = np.repeat(np.arange(len(before)), after - before)
        sources = given[permute(np.arange(BLOCK_ROWS), BLOCK_ROWS, order_key(seed, block, BLOCK))]
        by_source = np.argsort(sources, kind="stable")
        numbers = np.empty_like(by_source)
        # Sorted by source, a source's rows begin where those of the sources before it end.
        numbers[by_source] = np.arange(BLOCK_ROWS) + (after - np.cumsum(after - before))[given]
        return sources, numbers


def plan_mix(sources: Sequence[SourceConfig], tokens: Sequence[int], seq_len: int) -> Mix:
    """The mix of `sources`, of which source i has tokens[i] tokens, in windows of `seq_len`.

    Raises DataError for a source that is shorter than one row.
    """
    for source, own_tokens in zip(sources, tokens, strict=True):
        if own_tokens < seq_len:
            raise DataError(
                f"data.train: the source {source_name(source)} has {own_tokens} tokens, "
                f"fewer than one row of {seq_len}",
                fix="add documents to it, leave it out, or set train.seq_len lower",
            )
    return mix_rows(sources, [count // seq_len for count in tokens])


def mix_rows(sources: Sequence[SourceConfig], rows: Sequence[int]) -> Mix:
    """The mix of `sources`, of which source i has rows[i] rows, at least one.

    With weights an epoch is as many rows as all sources have together; with epochs it is what the passes sum up to.
    """
    names, rows = tuple(source_name(source) for source in sources), tuple(rows)
    # Fractions of the decimals as written: 0.1 is a tenth, not the binary fraction next to it.
    if any(source.weight is not None for source in sources):
        parts = [Fraction(str(source.weight)) for source in sources]
        rows_per_epoch = sum(rows)
    else:
        passes = [Fraction(str(source.epochs or 1)) for source in sources]
        parts = [own * passed for own, passed in zip(rows, passes, strict=True)]
        rows_per_epoch = max(1, round(sum(parts)))
    return Mix(names, rows, tuple(part / sum(parts) for part in parts), rows_per_epoch)


def epochs_by_source(mix: Mix, num_rows: int) -> dict[str, float]:
    """How often each source is passed over in `num_rows` rows of training."""
    return {
        name: float(num_rows * share / rows)
        for name, share, rows in zip(mix.names, mix.shares, mix.rows, strict=True)
    }


def describe_mix(mix: Mix, documents: Sequence[int], tokens: Sequence[int], num_rows: int) -> list[str]:
    """One line for each source: what it holds, its share, and how often `num_rows` rows of training pass over it."""
    epochs = epochs_by_source(mix, num_rows)
    return [
        f"{name}: {own_documents:,} documents of {own_tokens:,} tokens, {float(share):.1%} of the rows, "
        f"{epochs[name]:.2f} epochs"
        for name, share, own_documents, own_tokens in zip(
            mix.names, mix.shares, documents, tokens, strict=True
        )
    ]


def repeated_sources(mix: Mix, num_rows: int) -> list[str]:
    """A warning for each source that `num_rows` rows of training pass over more than MANY_EPOCHS times."""
    return [
        f"the source {name} is repeated {epochs:.1f} times: beyond {MANY_EPOCHS} passes a model learns little more "
        "from it; give it less weight, or add documents"
        for name, epochs in epochs_by_source(mix, num_rows).items()
        if epochs > MANY_EPOCHS
    ]
