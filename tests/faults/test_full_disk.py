"""A disk that really fills up while training: a clear error, the checkpoints before intact, and training goes on later."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import run_cli, stream, tiny, write_config


def test_full_disk_keeps_what_was_saved(
    small_disk: Path, tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    config = tiny(corpus, store_dir, small_disk / "run")
    config["checkpoint"] = {"save_every": 5, "keep_last": 50}
    path = write_config(tmp_path / "c.yaml", config)
    done = run_cli("train", path, check=4)
    assert "No space left" in done.stderr and "free some space" in done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()[-3:]] == ["error", "why", "fix"]
    assert not list((small_disk / "run/checkpoints").glob("*.tmp-*"))
    run_cli("checkpoints", small_disk / "run", "--verify")

    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    run_cli("train", path)
    run_cli("train", write_config(tmp_path / "d.yaml", config | {"run_dir": str(tmp_path / "straight")}))
    assert stream(small_disk / "run") == stream(tmp_path / "straight")
