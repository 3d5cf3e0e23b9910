"""Matrices spread over ranks: the same updates as on one process, and each orthogonalised once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from trainway import muon

torch.set_num_threads(1)
dist.init_process_group("gloo")
replicas, shards = {shape}
mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
spread = muon.Spread(
    mesh.get_group("shard") if shards > 1 else None, mesh.get_group("replicate") if replicas > 1 else None
)
worked = 0
plain = muon.orthogonalize

def counted(matrices, steps=5):
    global worked
    worked += len(matrices)
    return plain(matrices, steps)

total = 0
for n, rows, columns, first in [(1, 8, 4, 0), (5, 7, 5, 3), (4, 6, 6, 1), (2, 1, 9, 0), (3, 16, 3, 7)]:
    whole = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(n))
    expected = plain(whole)
    heights = spread.rows(rows)
    start = sum(heights[: mesh.get_local_rank("shard")])
    here = slice(start, start + heights[mesh.get_local_rank("shard")])
    muon.orthogonalize = counted
    found = muon.orthogonalize_spread(whole[:, here].contiguous(), rows, spread, first)
    muon.orthogonalize = plain
    torch.testing.assert_close(found, expected[:, here], rtol=1e-5, atol=1e-6)
    total += n
counts = torch.tensor([worked])
dist.all_reduce(counts)
assert counts.item() == total, (counts.item(), total)
os.write(1, f"equal {{worked}}\\n".encode())  # in one piece, whatever the other ranks print
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in [(1, 4), (4, 1)]), (2, 2)]
)
def test_spread_matrices_are_orthogonalised_once(tmp_path: Path, shape: tuple[int, int]) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(shape=shape))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run([*torchrun, str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(count) for count in re.findall(r"equal (\d+)", done.stdout)]
    assert len(counts) == 4 and max(counts) <= 5  # of 15: no rank takes much more than its share
