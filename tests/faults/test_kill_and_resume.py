"""What dies goes on exactly where it was: kill -9 at random moments, signals, and a change of the number of ranks."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import (
    kill_all,
    launch,
    metrics,
    once,
    run_cli,
    shared,
    stream,
    tiny,
    wait_for,
    write_config,
)

STEPS = 120


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, corpus: Path, store_dir: Path) -> Path:
    """The uninterrupted run."""
    root = shared(tmp_path_factory, "straight")
    return once(root / "run", lambda: run_cli("train", config_file(root, corpus, store_dir)))


def config_file(root: Path, corpus: Path, store_dir: Path, **train: object) -> Path:
    config = tiny(corpus, store_dir, root / "run", **{"total_steps": STEPS, **train})
    config["checkpoint"] = {"save_every": 7, "keep_last": 2}
    config["eval"] = {"every": 20, "num_samples": 0}
    return write_config(root / "config.yaml", config)


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"samples"') if path.exists() else 0


def kill_many(root: Path, config: Path, anywhere: int, in_saves: int, *launches: Sequence[str]) -> None:
    """Kill the run `anywhere` times at random moments and `in_saves` times while a checkpoint is half written (what
    is left of it shows that it was); then let the run finish. The launches take the arguments in `launches` in turn."""
    rng = random.Random(11)
    checkpoints = root / "run/checkpoints"
    turns = itertools.cycle(launches or [()])

    def half_written() -> bool:
        return any(checkpoints.glob("step-*.tmp-*"))

    while anywhere or in_saves:
        aim_at_save = rng.randrange(anywhere + in_saves) < in_saves
        process = launch(config, *next(turns))
        if aim_at_save:
            before = steps_logged(root / "run")
            wait_for(lambda b=before: steps_logged(root / "run") > b and half_written(), process)
        else:
            target = steps_logged(root / "run") + rng.randrange(1, 4)
            wait_for(lambda t=target: steps_logged(root / "run") >= t, process)
            time.sleep(rng.random() * 0.02)
        kill_all(process)
        if half_written():
            in_saves -= in_saves > 0
        elif not aim_at_save:
            anywhere -= 1
    run_cli("train", config, *next(turns))


@pytest.mark.parametrize(("anywhere", "in_saves"), [(2, 1), pytest.param(15, 5, marks=pytest.mark.slow)])
def test_killed_run_is_bit_identical(
    straight: Path, tmp_path: Path, corpus: Path, store_dir: Path, anywhere: int, in_saves: int
) -> None:
    config = config_file(tmp_path, corpus, store_dir)
    kill_many(tmp_path, config, anywhere, in_saves)
    assert stream(tmp_path / "run") == stream(straight)
    weights = "checkpoints/latest/model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (straight / weights).read_bytes()


NOW, LATER = "checkpoint.async_save=false", "checkpoint.async_save=true"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("engine", "anywhere", "in_saves", "steps"),
    [
        pytest.param("fsdp", 1, 0, 28, id="fsdp"),
        pytest.param("fsdp", 14, 6, STEPS, id="fsdp-20", marks=pytest.mark.slow),
        pytest.param("ddp", 3, 1, STEPS, id="ddp", marks=pytest.mark.slow),
        pytest.param("zero3", 0, 1, 28, id="zero3", marks=pytest.mark.slow),
        pytest.param("zero2", 14, 6, STEPS, id="zero2-20", marks=pytest.mark.slow),
        pytest.param("zero3", 14, 6, STEPS, id="zero3-20", marks=pytest.mark.slow),
    ],
)
def test_killed_ranks_are_bit_identical(
    tmp_path: Path, corpus: Path, store_dir: Path, engine: str, anywhere: int, in_saves: int, steps: int
) -> None:
    """Every other launch saves while training goes on."""
    arguments = ["--nproc", "2", f"engine.name={engine}"]
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    run_cli("train", config_file(tmp_path / "straight", corpus, store_dir, total_steps=steps), *arguments)
    config = config_file(tmp_path / "killed", corpus, store_dir, total_steps=steps)
    kill_many(tmp_path / "killed", config, anywhere, in_saves, [*arguments, NOW], [*arguments, LATER])
    assert stream(tmp_path / "killed/run") == stream(tmp_path / "straight/run")
    last = f"run/checkpoints/step-{steps}"
    parts = sorted((tmp_path / "straight" / last).rglob("*.safetensors"))
    assert len(parts) == (2 if engine == "ddp" else 4)
    for part in parts:
        other = tmp_path / "killed" / part.relative_to(tmp_path / "straight")
        assert other.read_bytes() == part.read_bytes(), part.name


@pytest.mark.parametrize(
    ("name", "nproc"),
    [
        ("SIGTERM", 2),
        pytest.param("SIGINT", 1, marks=pytest.mark.slow),
        pytest.param("SIGTERM", 1, marks=pytest.mark.slow),
        pytest.param("SIGINT", 2, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_exits_75(
    straight: Path, tmp_path: Path, corpus: Path, store_dir: Path, name: str, nproc: int
) -> None:
    config = config_file(tmp_path, corpus, store_dir)
    process = launch(config, "--nproc", str(nproc))
    wait_for(lambda: steps_logged(tmp_path / "run") >= 10, process)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 75
    done = steps_logged(tmp_path / "run")
    assert 10 <= done < STEPS
    assert (tmp_path / f"run/checkpoints/step-{done}").is_dir()
    run_cli("train", config)  # on one process, whatever it was before
    assert [row[:2] for row in stream(tmp_path / "run")] == [row[:2] for row in stream(straight)]
    if nproc == 1:
        assert stream(tmp_path / "run") == stream(straight)


@pytest.mark.slow
def test_ranks_2_1_2_keep_the_order_of_samples(
    straight: Path, tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    config = config_file(tmp_path, corpus, store_dir)
    for nproc, stop_at in ((2, 15), (1, 35)):
        process = launch(config, "--nproc", str(nproc))
        wait_for(lambda s=stop_at: steps_logged(tmp_path / "run") >= s, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    run_cli("train", config, "--nproc", "2")
    for a, b in zip(stream(tmp_path / "run"), stream(straight), strict=True):
        assert a[:2] == b[:2]
        assert a[2] == pytest.approx(b[2], rel=1e-3)  # rounding differs, and training amplifies it


def test_resume_from_an_earlier_step_repeats_it(
    straight: Path, tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    config = config_file(tmp_path, corpus, store_dir)
    step = min(
        int(p.name.split("-")[1]) for p in (tmp_path / "run/checkpoints").glob("step-*") if not p.is_symlink()
    )
    run_cli("train", config, "--resume", step)
    assert stream(tmp_path / "run") == stream(straight)


def test_unknown_step_lists_those_that_exist(
    straight: Path, tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    done = run_cli("train", config_file(tmp_path, corpus, store_dir), "--resume", "3", check=2)
    assert "119" in done.stderr and "120" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow  # which checkpoint is taken instead, tests/faults/test_checkpoint_faults.py shows
def test_flipped_bit_falls_back_to_the_checkpoint_before(
    straight: Path, tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    config = config_file(tmp_path, corpus, store_dir)
    process = launch(config)
    wait_for(lambda: (tmp_path / "run/checkpoints/step-14").is_dir(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    newest = max((tmp_path / "run/checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    weights = newest / "model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    listing = run_cli("checkpoints", tmp_path / "run", "--verify", check=3)
    assert "model.safetensors" in listing.stdout + listing.stderr
    done = run_cli("train", config)
    assert "damaged" in done.stderr
    assert stream(tmp_path / "run") == stream(straight)


def test_second_launch_is_refused(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    config = config_file(tmp_path, corpus, store_dir)
    first = launch(config)
    wait_for(lambda: steps_logged(tmp_path / "run") >= 1, first)
    first.send_signal(signal.SIGSTOP)  # it holds the lock for as long as we look
    second = run_cli("train", config, check=4)
    assert str(first.pid) in second.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    run_cli("train", config)  # a dead holder's lock is free
    assert len(metrics(tmp_path / "run")) == STEPS


def test_changed_setting_is_refused_with_the_difference(
    straight: Path, tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    config = config_file(tmp_path, corpus, store_dir)
    done = run_cli("train", config, "optim.lr=1e-3", "--resume", 119, check=2)
    assert "optim.lr: 0.003 -> 0.001" in done.stderr
