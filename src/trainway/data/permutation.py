"""Keyed random permutations that are computed, not stored: any place of any order costs the same."""

from __future__ import annotations

import numpy as np
import xxhash

PHASE, ORDER, BLOCK, DEAL = 1, 2, 3, 4
"""What a key is for: where an epoch's windows begin, the order of its rows, the order of the sources in a block, which
of the documents of one length goes into which row."""

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def order_key(*parts: int) -> int:
    """A 64-bit key that depends on all of `parts`, such as (seed, epoch, purpose)."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of `index` (int64 in [0, size)) under the keyed random permutation of range(size).

    A Feistel network over mixed radix a x b >= size (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002); an image outside [0, size) is mapped again until it is inside, so the map is a bijection.
    """
    if size == 1:
        return np.zeros_like(index)
    # At least 4 x 4: with a side of 1 the rounds would only rotate.
    left = max(4, int(np.ceil(np.sqrt(size))))
    right = max(4, -(-size // left))
    values: np.ndarray = _feistel(index.astype(np.uint64), left, right, key)
    while (outside := values >= np.uint64(size)).any():
        values[outside] = _feistel(values[outside], left, right, key)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, left: int, right: int, key: int) -> np.ndarray:
    radix = (np.uint64(left), np.uint64(right))
    halves: list[np.ndarray] = [values % radix[0], values // radix[0]]
    for turn in range(_ROUNDS):
        here, other = turn % 2, 1 - turn % 2
        round_key = np.uint64(_mix_int(key + turn))
        halves[here] = (halves[here] + _mix(halves[other] + round_key) % radix[here]) % radix[here]
    return np.asarray(halves[1] * radix[0] + halves[0])


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014), elementwise."""
    mixed: np.ndarray = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def _mix_int(value: int) -> int:
    return int(_mix(np.array([value & (2**64 - 1)], dtype=np.uint64))[0])
