"""What every rollout engine does: take the student's weights, and answer prompts reproducibly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import xxhash


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    end_tokens: tuple[int, ...]
    """An answer is kept through the first of these; one without any is truncated at max_new_tokens."""


class Request(NamedTuple):
    """A prompt, and a seed for each of its answers."""

    prompt: np.ndarray
    """[P] int32, at least one token."""
    seeds: tuple[int, ...]
    """Of 64 bits. The same seed, prompt and weights give the same answer in any batch, on any rank, as far as logits do
    not depend on the batch in their last digits."""


class Rollout(NamedTuple):
    """One answer."""

    tokens: np.ndarray
    """[T] int32, 1 <= T <= max_new_tokens, the end token included."""
    truncated: bool
    """No end token came."""


class RolloutEngine(Protocol):
    """A student that answers. Every rank calls each method at the same time, `generate` with requests of its own."""

    def sync(self) -> None:
        """Take the student's present weights.

        Raises:
            EnvironmentFault: they could not be handed over.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Rollout]]:
        """The answers to each request, in order, one for each of its seeds. A rank may have no request at all.

        Raises:
            EnvironmentFault: an answer did not come.
        """

    def close(self) -> None:
        """Give back what the engine holds beside the student."""


def rollout_seed(seed: int, step: int, sample: int, index: int) -> int:
    """The 64-bit seed of answer `index` to the row with id `sample` at `step`: on any rank, after any restart."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{step}/{sample}/{index}".encode())
