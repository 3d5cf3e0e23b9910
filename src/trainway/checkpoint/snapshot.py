"""What a checkpoint's large files hold, as tensors of this rank: by reference, or as a copy made beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainway.checkpoint.optimizer_state import Slot, write_optimizer
from trainway.checkpoint.pieces import Part, Piece
from trainway.checkpoint.weights import write_model
from trainway.files import fsync_file

MODEL_DIR = "model"
"""Directory of the model within a checkpoint."""


@dataclass(frozen=True)
class Snapshot:
    """The weights and optimiser states that this rank writes; on a rank whose replica writes them, part is None."""

    weights: dict[str, Piece]
    slots: dict[str, Slot]
    part: Part | None

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Snapshot:
        """The same with each tensor replaced by `change(key, tensor)`."""

        def changed(prefix: str, pieces: dict[str, Piece]) -> dict[str, Piece]:
            return {
                name: replace(piece, tensor=change(f"{prefix}{name}", piece.tensor))
                for name, piece in pieces.items()
            }

        slots = {
            name: replace(slot, tensors=changed(f"{name}/", slot.tensors))
            for name, slot in self.slots.items()
        }
        return Snapshot(changed("", self.weights), slots, self.part)


def write_snapshot(snapshot: Snapshot, directory: Path, model: Any, tokenizer: Any) -> None:
    """Write this rank's files into a checkpoint's directory, down to the disk. Raises OSError of the disk.

    `model`: for its configuration; its weights are not read.
    """
    part = snapshot.part
    if part is None:
        return
    model_dir = directory / MODEL_DIR
    write_model(model, model_dir, tokenizer, weights=snapshot.weights, part=part)
    write_optimizer(snapshot.slots, directory, part)
    for path in directory.rglob("*.safetensors"):
        if part.count == 1 or f".part-{part.index:05d}-" in path.name:
            fsync_file(path)


class Staging:
    """A copy of a snapshot in the CPU's memory, made while the next step's forward and backward passes run.

    1) `begin` starts the copy 2) `before_update` waits for it, just before the weights change 3) `result` is the copy,
    for a thread that writes it. The room is kept for the next copy: fresh pages cost as much as the copy itself.
    """

    def __init__(self) -> None:
        self._room: dict[str, torch.Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()
        self._failure: BaseException | None = None
        self._copy: Snapshot | None = None
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    def begin(self, snapshot: Snapshot) -> None:
        """Start copying; the copy before must have been written."""
        self._copied.clear()
        self._failure, self._event = None, None
        on_gpu = any(piece.tensor.is_cuda for piece in snapshot.weights.values())
        if on_gpu:
            self._copy_on_stream(snapshot)
        else:
            threading.Thread(target=self._run, args=(snapshot,), name="staging", daemon=True).start()

    def before_update(self) -> None:
        """Return when the weights may change."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)  # the GPU waits, this thread does not
        else:
            self._copied.wait()

    def result(self) -> Snapshot:
        """The copy, complete. Raises what copying raised."""
        self._copied.wait()
        if self._event is not None:
            self._event.synchronize()
        if self._failure is not None:
            raise self._failure
        assert self._copy is not None
        return self._copy

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._copy = snapshot.map(self._copy_on_cpu)
        except BaseException as error:
            self._failure = error
        self._copied.set()

    def _copy_on_cpu(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        room = self._room_for(key, tensor, pinned=False)
        # numpy copies with this thread alone: torch would wake a second team of threads beside the training's
        np.copyto(_bytes(room), _bytes(tensor.detach().contiguous()))
        return room

    def _copy_on_stream(self, snapshot: Snapshot) -> None:
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())

        def copied(key: str, tensor: torch.Tensor) -> torch.Tensor:
            room = self._room_for(key, tensor, pinned=True)
            return room.copy_(tensor.detach(), non_blocking=True)

        with torch.cuda.stream(self._stream):
            self._copy = snapshot.map(copied)
            self._event = self._stream.record_event()
        self._copied.set()

    def _room_for(self, key: str, tensor: torch.Tensor, *, pinned: bool) -> torch.Tensor:
        room = self._room.get(key)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned and tensor.numel() > 0)
            self._room[key] = room
        return room


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    # a view as bytes: numpy has no bf16
    return tensor.reshape(-1).view(torch.uint8).numpy()
