"""What a step hands to the model: rows of tokens with their labels, positions and segments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from trainway.losses import IGNORE_INDEX

Packing = Literal["documents", "concat", "none"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows of L tokens."""

    input_ids: torch.Tensor  # [B, L] int64
    labels: torch.Tensor  # [B, L] int64; labels[:, t] follows input_ids[:, t], or is IGNORE_INDEX
    position_ids: torch.Tensor  # [B, L] int64; 0 at the start of each segment
    boundaries: tuple[int, ...] | None
    """Segments over the flattened B*L tokens, the first 0 and the last B*L; None: rows padded on the right, for which
    plain causal attention needs no mask."""
    num_targets: int  # labels that are not IGNORE_INDEX
    num_tokens: int  # tokens that are not filling
    targets: torch.Tensor | None = None
    """[num_targets] int64, flattened positions of the labels, in order; None where nearly every position has one."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; to a GPU the copy runs beside the computation."""
        device = torch.device(device)
        if device.type == "cpu":
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            labels=moved(self.labels),
            position_ids=moved(self.position_ids),
            targets=None if self.targets is None else moved(self.targets),
        )


def restarting_positions(boundaries: np.ndarray) -> np.ndarray:
    """[boundaries[-1]] int64: each token's place within its segment."""
    return np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], np.diff(boundaries))


__all__ = ["IGNORE_INDEX", "Batch", "Packing", "restarting_positions"]
