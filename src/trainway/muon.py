"""Muon, and how its matrices are shared out: each is orthogonalised on one rank, wherever its rows lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients with the steepest slope at zero (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/)."""

TOGETHER = 2**25
"""Numbers of one shape that a rank orthogonalises at once: what that takes beside the matrices is several times as much."""


@dataclass(frozen=True)
class Spread:
    """How matrices lie over the ranks: their rows over `shards` as torch.chunk cuts them, copies over `replicas`."""

    shards: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    device: torch.device | None = None
    """Where to work, when the matrices lie in the CPU's memory."""

    def rows(self, num_rows: int) -> list[int]:
        """How many of a matrix's rows each shard holds."""
        count = _size(self.shards)
        chunk = -(-num_rows // count)
        return [max(0, min(chunk, num_rows - rank * chunk)) for rank in range(count)]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by Newton-Schulz; decoupled weight decay (Keller Jordan 2024).

    Takes matrices only, or this rank's rows of them. An update is scaled by sqrt(max(1, rows / columns)) of the whole
    matrix. State: one `momentum_buffer` each, of the rows that are here.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        spread: Spread | None = None,
        num_rows: Callable[[Tensor], int] = len,
    ) -> None:
        """`num_rows`: rows of the whole matrix of which a parameter holds some."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"]), (
            "Muon takes matrices only"
        )
        self._spread = spread or Spread()
        self._num_rows = num_rows

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            same_shape: dict[tuple[int, int, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault((self._num_rows(p), p.shape[1], p.device), []).append(p)
            for (rows, columns, _), parameters in same_shape.items():
                for some in self._in_turn(parameters, rows * columns):
                    self._update(some, rows, first, group["lr"], group["momentum"], group["weight_decay"])
                    first += len(some)  # so that not the same ranks take the odd matrix of every shape
        return loss

    def _in_turn(self, parameters: list[Tensor], size: int) -> Iterator[list[Tensor]]:
        """As many at once as give every rank of the spread TOGETHER numbers, or one matrix."""
        ranks = _size(self._spread.shards) * _size(self._spread.replicas)
        count = at_once(size) * ranks
        for start in range(0, len(parameters), count):
            yield parameters[start : start + count]

    def _update(
        self, parameters: list[Tensor], rows: int, first: int, lr: float, momentum: float, weight_decay: float
    ) -> None:
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        for p, gradient in zip(parameters, gradients, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(gradient)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
        directions = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))  # [n, rows here, columns]
        directions = directions.to(self._spread.device or directions.device)
        updates = orthogonalize_spread(directions, rows, self._spread, first)
        updates = updates.to(parameters[0])  # its device and type
        if weight_decay:
            torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
        scale = max(1.0, rows / parameters[0].shape[1]) ** 0.5
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-lr * scale)


def at_once(size: int) -> int:
    """How many matrices of `size` numbers a rank orthogonalises together."""
    return max(1, TOGETHER // size)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix [n, rows, columns] = U S V^T, singular values within about 0.7 to 1.2.

    bf16 on CUDA; elsewhere the matrices' own type, since CPUs multiply fp32 faster.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_spread(pieces: Tensor, rows: int, spread: Spread, first: int = 0) -> Tensor:
    """`orthogonalize` of n matrices of which this rank holds some rows: [n, rows here, columns] to the same.

    Matrix j belongs to one replica, and there to one shard, which receives its rows, works, and sends them back; then
    the replicas exchange what each has made. `first` shifts who begins. All ranks of the spread must call it together.
    """
    replicas, replica = _size(spread.replicas), dist.get_rank(spread.replicas) if spread.replicas else 0
    if replicas == 1:
        return _orthogonalize_shards(pieces, rows, spread, first)
    owned = [(j + first) % replicas for j in range(len(pieces))]
    most = -(-len(pieces) // replicas)
    mine = [j for j, owner in enumerate(owned) if owner == replica]
    shape = (most, *pieces.shape[1:])
    made = pieces.new_zeros(shape)
    if mine:
        made[: len(mine)] = _orthogonalize_shards(pieces[mine], rows, spread, first // replicas)
    every = made.new_empty((replicas * most, *pieces.shape[1:]))
    dist.all_gather_into_tensor(every, made, group=spread.replicas)
    seen = [0] * replicas
    places = []
    for owner in owned:
        places.append(owner * most + seen[owner])
        seen[owner] += 1
    return every[places]


def _orthogonalize_shards(pieces: Tensor, rows: int, spread: Spread, first: int) -> Tensor:
    """One replica's part: the rows of each matrix to the shard that owns it, and its result back."""
    shards = _size(spread.shards)
    if shards == 1:
        return orthogonalize(pieces).to(pieces.dtype)
    rank = dist.get_rank(spread.shards)
    columns, heights = pieces.shape[2], spread.rows(rows)
    owners: list[list[int]] = [[] for _ in range(shards)]
    for j in range(len(pieces)):
        owners[(j + first) % shards].append(j)
    order = [j for owned in owners for j in owned]
    count = len(owners[rank])
    sent = [len(owned) * heights[rank] * columns for owned in owners]
    received = [count * height * columns for height in heights]

    gathered = _exchange(pieces[order], sent, received, spread.shards)
    parts = [part.view(count, -1, columns) if part.numel() else part.new_empty(count, 0, columns)
             for part in gathered.split(received)]  # fmt: skip
    if count:
        whole = orthogonalize(torch.cat(parts, dim=1)).to(pieces.dtype)
        back = torch.cat([part.reshape(-1) for part in whole.split(heights, dim=1)])
    else:
        back = pieces.new_empty(0)
    result = torch.empty_like(pieces)
    result[order] = _exchange(back, received, sent, spread.shards).view_as(pieces)
    return result


def _exchange(
    data: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """All to all: `sent` and `received` count the numbers for and from each rank."""
    output = data.new_empty(sum(received))
    dist.all_to_all_single(output, data.reshape(-1).contiguous(), list(received), list(sent), group=group)
    return output


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)
