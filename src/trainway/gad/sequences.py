"""Prompts with their answers, dealt over ranks and micro-batches by a budget of tokens, and laid out for a model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from trainway.data.batch import IGNORE_INDEX, Batch, restarting_positions

PAD_MULTIPLE = 8


class Exchange(NamedTuple):
    """A prompt and one answer to it, as tokens: int32 arrays, neither empty."""

    prompt: np.ndarray
    response: np.ndarray

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class ExchangeBatch:
    """Some of a step's answers as a micro-batch; of a rank that has none left, filling without targets."""

    members: tuple[int, ...]
    """Which of the step's answers."""
    batch: Batch
    """Its labels are the tokens of the responses: one after the other, in the order of `members`."""
    last: torch.Tensor
    """[members] int64, flattened position of each answer's last token."""
    response_lengths: tuple[int, ...]


def deal(lengths: Sequence[int], budget: int, world_size: int) -> list[list[list[int]]]:
    """Answers by rank and micro-batch: every rank has as many micro-batches, of about as many tokens.

    A micro-batch has at most `budget` tokens, unless a single answer has more; with few answers some are empty. The
    longest go first, each to the emptiest micro-batch, so that ranks wait for each other as little as can be.
    """
    sizes = [min(length, budget) for length in lengths]  # whoever has more fills a micro-batch
    order = sorted(range(len(sizes)), key=lambda index: (-lengths[index], index))
    count = max(1, -(-sum(sizes) // (budget * world_size)))
    while True:
        bins = _spread([(index, sizes[index]) for index in order], count * world_size)
        loads = [sum(sizes[index] for index in members) for members in bins]
        if max(loads) <= budget:
            break
        count += 1
    # the heaviest and the lightest to the same rank, as in a draft that turns back after each round
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    by_load = sorted(range(len(bins)), key=lambda place: (-loads[place], place))
    for turn in range(count):
        own = by_load[turn * world_size : (turn + 1) * world_size]
        for rank, place in enumerate(own if turn % 2 == 0 else own[::-1]):
            ranks[rank].append(sorted(bins[place]))
    return ranks


def lay_out(
    answers: Sequence[Exchange], members: Sequence[int], pad_id: int, *, packed: bool
) -> ExchangeBatch:
    """The micro-batch of answers[members]: one row of whole sequences, or a padded row for each."""
    chosen = [answers[index] for index in members]
    lengths = np.array([answer.length for answer in chosen], dtype=np.int64)
    width = -(-int(lengths.max(initial=1)) // PAD_MULTIPLE) * PAD_MULTIPLE
    if packed:
        total = int(lengths.sum()) or PAD_MULTIPLE  # a rank without answers takes part all the same
        begins = np.cumsum(lengths) - lengths
        shape = (1, total)
        boundaries = np.append(begins, total) if len(chosen) else np.array([0, total])
        positions = restarting_positions(boundaries)
    else:
        shape = (max(1, len(chosen)), width)
        begins = np.arange(len(chosen), dtype=np.int64) * width
        boundaries = None
        positions = np.tile(np.arange(width), shape[0])
    tokens = np.full(shape[0] * shape[1], pad_id, dtype=np.int64)
    targets = [np.empty(0, dtype=np.int64)]
    for begin, answer in zip(begins.tolist(), chosen, strict=True):
        first = begin + len(answer.prompt)
        tokens[begin:first] = answer.prompt
        tokens[first : begin + answer.length] = answer.response
        targets.append(np.arange(first - 1, begin + answer.length - 1))
    places = np.concatenate(targets)
    labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int64)
    labels[places] = tokens[places + 1]
    batch = Batch(
        torch.from_numpy(tokens).view(shape),
        torch.from_numpy(labels).view(shape),
        torch.from_numpy(positions).view(shape),
        None if boundaries is None else tuple(boundaries.tolist()),
        len(places),
        int(lengths.sum()),
        torch.from_numpy(places),
    )
    last = torch.from_numpy(begins + lengths - 1)
    return ExchangeBatch(tuple(members), batch, last, tuple(len(answer.response) for answer in chosen))


def _spread(items: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    """(index, size) pairs, largest first, each into the least loaded of `count` bins."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, place) for place in range(count)]
    for index, size in items:
        load, place = heapq.heappop(loads)
        bins[place].append(index)
        heapq.heappush(loads, (load + size, place))
    return bins
