"""Rows of tokens for training: each step's batch is a pure function of (seed, step), for any number of ranks.

The split is a circular stream of T tokens. Epoch e cuts it into R = T // L windows of L tokens, from a phase
that depends on e, and visits them in a keyed random order; nothing is kept, and any step costs the same.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash

from trainway.data.store import TokenSplit
from trainway.errors import ConfigError, DataError
from trainway.losses import IGNORE_INDEX

Packing = Literal["documents", "concat"]

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_PHASE, _ORDER = 1, 2  # what a key is for


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows of L tokens."""

    input_ids: torch.Tensor  # [B, L] int64
    labels: torch.Tensor  # [B, L] int64; labels[:, t] follows input_ids[:, t], or is IGNORE_INDEX
    position_ids: torch.Tensor  # [B, L] int64; 0 at the start of each segment
    boundaries: tuple[int, ...]  # segments over the flattened B*L tokens; the first is 0, the last B*L
    num_targets: int  # labels that are not IGNORE_INDEX

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; to a GPU the copy runs beside the computation."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        input_ids, labels, position_ids = (
            (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
            for tensor in (self.input_ids, self.labels, self.position_ids)
        )
        return Batch(input_ids, labels, position_ids, self.boundaries, self.num_targets)


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an optimiser step."""

    step: int
    micro_batches: tuple[Batch, ...]
    num_targets: int  # of this rank
    sample_hash: str  # xxh3_64 of the step's global sample ids: the same on every rank and world size


class Loader:
    """The training batches of one rank.

    Raises ConfigError for sizes that do not divide, DataError when the split has fewer than `seq_len` tokens.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        packing: Packing,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not divisible by "
                f"micro_batch_size {micro_batch_size} x {world_size} ranks",
                fix=f"use a multiple of {micro_batch_size * world_size}",
            )
        if split.num_tokens < seq_len:
            raise DataError(
                f"the {split.name} split has {split.num_tokens} tokens, fewer than one row of {seq_len}",
                fix="add documents, or set train.seq_len lower",
            )
        self._split = split
        self._seq_len = seq_len
        self._rows_per_step = global_batch_size
        self._micro_rows = micro_batch_size
        self._seed = seed
        self._packing: Packing = packing
        self._shuffle = shuffle
        self._rank = rank
        self._world_size = world_size
        self.rows_per_epoch = split.num_tokens // seq_len

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch, at least 1; a step may straddle two epochs."""
        return max(1, self.rows_per_epoch // self._rows_per_step)

    def step(self, step: int) -> StepBatch:
        """The batch of `step`, counted from 1, as if the steps before had been taken."""
        samples, starts = self._samples(step)
        stride = self._micro_rows * self._world_size
        offset = self._rank * self._micro_rows
        batches = tuple(
            _make_batch(self._split, starts[first : first + self._micro_rows], self._seq_len, self._packing)
            for first in range(offset, self._rows_per_step, stride)
        )
        digest = xxhash.xxh3_64_hexdigest(samples.astype("<i8").tobytes())
        return StepBatch(step, batches, sum(batch.num_targets for batch in batches), digest)

    def steps(self, start: int, stop: int, prefetch: int) -> Generator[StepBatch, None, None]:
        """The batches of the steps [start, stop); a thread holds up to `prefetch` of them ready.

        The thread ends with the iterator, however that ends; an error in it is raised here.
        """
        return _read_ahead(self.step, start, stop, prefetch)

    def _samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids (epoch * R + window) and first positions of the step's global rows: two [rows] int64."""
        rows = np.arange((step - 1) * self._rows_per_step, step * self._rows_per_step, dtype=np.int64)
        per_epoch = self.rows_per_epoch
        samples = np.empty_like(rows)
        starts = np.empty_like(rows)
        done = 0
        while done < len(rows):
            epoch = int(rows[done]) // per_epoch
            stop = min(len(rows), done + (epoch + 1) * per_epoch - int(rows[done]))
            windows = rows[done:stop] - epoch * per_epoch
            phase = 0
            if self._shuffle:
                windows = permute(windows, per_epoch, _key(self._seed, epoch, _ORDER))
                phase = _key(self._seed, epoch, _PHASE) % self._seq_len if epoch else 0
            samples[done:stop] = epoch * per_epoch + windows
            starts[done:stop] = (windows * self._seq_len + phase) % self._split.num_tokens
            done = stop
        return samples, starts


def validation_batches(
    split: TokenSplit,
    *,
    seq_len: int,
    micro_batch_size: int,
    packing: Packing,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The rows of the split in order, unshuffled, the last one filled up with eos that is not predicted.

    max_tokens limits them (at least one is read) to rows spread evenly over the split: its first documents alone,
    often of one source, would not speak for it. The micro-batches are the same for every world size and
    dealt out in turn: a rank may yield one fewer than another, or none. Raises DataError for a tiny split.
    """
    if split.num_tokens < 2:
        raise DataError(f"the {split.name} split has {split.num_tokens} tokens: nothing can be predicted",
                        fix="add validation documents")  # fmt: skip
    whole = -(-(split.num_tokens - 1) // seq_len)
    wanted = whole if max_tokens is None else min(whole, max(1, max_tokens // seq_len))
    rows = np.arange(wanted, dtype=np.int64) * whole // wanted
    return _validation_batches(split, rows, seq_len, micro_batch_size, packing, rank, world_size)


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


def _key(seed: int, epoch: int, purpose: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}/{epoch}/{purpose}".encode())


def _make_batch(split: TokenSplit, starts: np.ndarray, seq_len: int, packing: Packing) -> Batch:
    """Rows of seq_len + 1 tokens beginning at `starts`, read around the end of the stream."""
    rows, total = len(starts), split.num_tokens
    window = np.empty((rows, seq_len + 1), dtype=np.int64)
    found: list[np.ndarray] = []  # document starts, as positions in the flattened rows
    for row, start in enumerate(starts.tolist()):
        stop = start + seq_len + 1
        if stop <= total:
            window[row] = split.tokens(start, stop)
        else:
            window[row, : total - start] = split.tokens(start, total)
            window[row, total - start :] = split.tokens(0, stop - total)
        if packing == "documents":
            found.append(split.document_starts(start + 1, min(stop, total)) + (row * seq_len - start))
            if stop > total:
                found.append(split.document_starts(0, stop - total) + (row * seq_len - start + total))
    return _finish_batch(window, found, packing, rows * seq_len)


def _finish_batch(window: np.ndarray, found: list[np.ndarray], packing: Packing, num_targets: int) -> Batch:
    """window: [B, L+1]. found: flattened positions (1..L of each row) at which a document starts."""
    rows, seq_len = window.shape[0], window.shape[1] - 1
    labels = window[:, 1:].copy()
    row_starts = np.arange(0, rows * seq_len + 1, seq_len)
    if packing == "concat":
        positions = np.broadcast_to(np.arange(seq_len), (rows, seq_len)).copy()
        boundaries = row_starts
    else:
        begins = np.concatenate(found)
        flat = labels.reshape(-1)
        num_targets -= int(np.count_nonzero(flat[begins - 1] != IGNORE_INDEX))
        flat[begins - 1] = IGNORE_INDEX  # the last token of a document does not predict the next document
        # A start at position L of a row coincides with the next row's start.
        boundaries = np.unique(np.concatenate((begins, row_starts)))
        lengths = np.diff(boundaries)
        positions = (np.arange(rows * seq_len) - np.repeat(boundaries[:-1], lengths)).reshape(rows, seq_len)
    return Batch(
        torch.from_numpy(window[:, :-1].copy()),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        tuple(boundaries.tolist()),
        num_targets,
    )


def _validation_batches(
    split: TokenSplit,
    rows: np.ndarray,
    seq_len: int,
    micro_rows: int,
    packing: Packing,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    for first in range(rank * micro_rows, len(rows), world_size * micro_rows):
        starts = rows[first : first + micro_rows] * seq_len
        if int(starts[-1]) + seq_len + 1 <= split.num_tokens:
            yield _make_batch(split, starts, seq_len, packing)
        else:
            yield _padded_batch(split, starts, seq_len, packing)


def _padded_batch(split: TokenSplit, starts: np.ndarray, seq_len: int, packing: Packing) -> Batch:
    """Like _make_batch, but the last row reaches past the end: eos from there on, without targets."""
    window = np.full((len(starts), seq_len + 1), split.eos_id, dtype=np.int64)
    found: list[np.ndarray] = []
    for row, start in enumerate(starts.tolist()):
        stop = min(start + seq_len + 1, split.num_tokens)
        window[row, : stop - start] = split.tokens(start, stop)
        found.append(split.document_starts(start + 1, stop) + (row * seq_len - start))
    real = split.num_tokens - int(starts[-1])  # tokens of the last row
    found.append(np.array([(len(starts) - 1) * seq_len + real]))  # the filling is a segment of its own
    batch = _finish_batch(window, found, packing, len(starts) * seq_len)
    batch.labels[-1, real - 1 :] = IGNORE_INDEX
    num_targets = int((batch.labels != IGNORE_INDEX).sum())
    return Batch(batch.input_ids, batch.labels, batch.position_ids, batch.boundaries, num_targets)


def _read_ahead(
    make: Callable[[int], StepBatch], start: int, stop: int, prefetch: int
) -> Generator[StepBatch, None, None]:
    ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=max(1, prefetch))
    ended = threading.Event()

    def put(item: StepBatch | BaseException) -> None:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for step in range(start, stop):
                put(make(step))
                if ended.is_set():
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, name="batch-reader", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        thread.join()
