"""Which GPUs a run uses, and how many processes that makes."""

from __future__ import annotations

import pytest

from trainway.config.schema import EngineConfig
from trainway.errors import ConfigError, EnvironmentFault
from trainway.launch import devices
from trainway.launch.devices import gpu_environment, process_count, visible_gpus

FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def engine(**settings: object) -> EngineConfig:
    return EngineConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "environ", "count"),
    [
        ({}, FOUR, 4),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({}, {"CUDA_VISIBLE_DEVICES": "-1"}, 1),
        ({"nproc": 2}, FOUR, 2),
        ({"gpus": [1, 3]}, FOUR, 2),
        ({"gpus": [2]}, FOUR, 1),
        ({"name": "single"}, FOUR, 1),
        ({"name": "zero3"}, FOUR, 4),
    ],
)
def test_one_process_per_gpu(settings: dict[str, object], environ: dict[str, str], count: int) -> None:
    assert process_count(engine(**settings), environ) == count


def test_chosen_gpus_are_those_that_the_ranks_see() -> None:
    # R30
    assert gpu_environment(engine(gpus=[1, 3]), FOUR) == {"CUDA_VISIBLE_DEVICES": "1,3"}
    assert gpu_environment(engine(), FOUR) == {}
    # in a rank that was started so
    assert gpu_environment(engine(gpus=[1, 3]), {"CUDA_VISIBLE_DEVICES": "1,3"}) == {
        "CUDA_VISIBLE_DEVICES": "1,3"
    }


def test_gpus_that_are_hidden_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as hidden:
        gpu_environment(engine(gpus=[0, 4, 5]), FOUR)
    assert hidden.value.what == "engine.gpus names 4, 5"
    assert hidden.value.why == "CUDA_VISIBLE_DEVICES shows 0, 1, 2, 3 alone"
    monkeypatch.setattr(devices, "visible_gpus", lambda environ: ["0", "1"])
    with pytest.raises(EnvironmentFault) as absent:
        gpu_environment(engine(gpus=[2]), {})
    assert absent.value.why == "this machine shows GPUs 0 to 1"
    monkeypatch.setattr(devices, "visible_gpus", lambda environ: [])
    with pytest.raises(EnvironmentFault, match="names 0"):
        gpu_environment(engine(gpus=[0]), {})


def test_more_processes_than_gpus() -> None:
    with pytest.raises(ConfigError) as caught:
        gpu_environment(engine(nproc=8), FOUR)
    assert caught.value.what == "8 processes are asked for, with 4 GPUs"
    assert caught.value.fix.startswith("use engine.nproc=4, or hide the GPUs")
    # without GPUs they share the CPU
    assert gpu_environment(engine(nproc=8), {"CUDA_VISIBLE_DEVICES": ""}) == {}


def test_the_machines_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
    done = devices.subprocess.CompletedProcess([], 0, listing, "")
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(devices.subprocess, "run", lambda *args, **options: done)
    try:
        devices._machine_gpus.cache_clear()
        assert visible_gpus({}) == ["0", "1"]
        devices._machine_gpus.cache_clear()
        monkeypatch.setattr(devices.shutil, "which", lambda name: None)
        assert visible_gpus({}) == []
    finally:
        devices._machine_gpus.cache_clear()
