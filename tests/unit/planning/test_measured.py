"""Measurements on disk, and which one is nearest to a run that is planned."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainway.planning.gpus import find_gpu
from trainway.planning.measured import (
    Measurement,
    Work,
    load_measurements,
    measurements_dir,
    nearest,
    record,
    state_dir,
)

ONE = Measurement(
    date="2026-11-20",
    source="bench",
    device="NVIDIA H200",
    world_size=1,
    engine="single",
    recipe="pretrain",
    family="llama",
    parameters=1_000_000_000,
    trainable=1_000_000_000,
    micro_batch_size=4,
    seq_len=2048,
    checkpointing="none",
    attention="packed",
    precision="bf16",
    flops_per_step=4.945e14,
    step_s=1.0,
    tokens_per_step=81920.0,
    peak_bytes=30 << 30,
    planned_bytes=32 << 30,
    gemm_flops=0.0,
)
WORK = Work("pretrain", "llama", 2_000_000_000, False, False, "bf16", "none", 2048, 4, 1)


def test_one_file_each_read_back_exactly(tmp_path: Path) -> None:
    path = record(ONE, tmp_path)
    other = record(replace(ONE, device="cpu", gemm_flops=2.4e11), tmp_path)
    assert path != other and path.name.startswith("2026-11-20-nvidia-h200-pretrain-")
    assert json.loads(path.read_text()) == asdict(ONE)
    assert sorted(load_measurements(tmp_path), key=str) == sorted([ONE, replace(ONE, device="cpu", gemm_flops=2.4e11)], key=str)  # fmt: skip
    assert load_measurements(tmp_path / "nowhere") == []


def test_they_lie_in_trainways_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    assert measurements_dir() == tmp_path / "home/measured" == record(ONE).parent
    assert load_measurements() == [ONE]
    monkeypatch.delenv("TRAINWAY_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measurements_dir() == tmp_path / ".cache/trainway/measured"
    assert state_dir() == tmp_path / ".cache/trainway"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "Expecting"),
        ({"step_s": "1"}, "step_s is '1'"),
        ({"step_s": 0.0}, "must be above 0"),
        ({"parameters": 1.5}, "parameters is 1.5"),
        ({"world_size": True}, "world_size is True"),
        ({"device": 7}, "device is 7"),
        ({"date": None}, "date is None"),
        ({}, "engine is missing"),
    ],
)
def test_a_bad_file_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, object] | None, why: str
) -> None:
    record(ONE, tmp_path)
    content = asdict(ONE) | (change or {})
    if change == {}:
        del content["engine"]
    (tmp_path / "bad.json").write_text("{" if change is None else json.dumps(content))
    assert load_measurements(tmp_path) == [ONE]
    (said,) = caplog.messages
    assert "bad.json is passed over" in said and why in said


def test_a_step_without_counted_flops_tells_of_memory_alone(tmp_path: Path) -> None:
    uncounted = replace(ONE, recipe="gad", flops_per_step=0.0)
    record(uncounted, tmp_path)
    assert load_measurements(tmp_path) == [uncounted]
    assert uncounted.mfu(find_gpu("H200")) == 0.0


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps(asdict(ONE) | {"later": 1}))
    assert load_measurements(tmp_path) == [ONE]


def test_mfu_is_of_the_data_sheet_or_of_the_measured_product() -> None:
    assert ONE.mfu(find_gpu("H200")) == pytest.approx(0.5)
    assert replace(ONE, world_size=2).mfu(find_gpu("H200")) == pytest.approx(0.25)
    cpu = replace(ONE, device="cpu", precision="fp32", flops_per_step=1.2e11, gemm_flops=2.4e11)
    assert cpu.mfu(find_gpu("cpu")) == pytest.approx(0.5)
    assert replace(cpu, gemm_flops=0.0).mfu(find_gpu("cpu")) == 0.0


def test_only_the_same_kind_of_work_on_the_same_device_counts() -> None:
    h200 = find_gpu("H200")
    assert nearest([ONE], h200, WORK) == ONE
    assert nearest([ONE], find_gpu("H100"), WORK) is None
    assert nearest([], h200, WORK) is None
    others = {
        "recipe": "gad",
        "precision": "fp32",
        "family": "gpt_oss",
        "trainable": 1000,
        "parameters": 100_000_000,
    }
    for key, value in others.items():
        other = replace(ONE, **{key: value})
        if key == "parameters":
            other = replace(other, trainable=100_000_000)
        assert nearest([other], h200, WORK) is None, key
    assert nearest([replace(ONE, recipe="sft")], h200, WORK) is not None


def test_the_nearest_in_size_then_in_shape_then_the_newest() -> None:
    h200 = find_gpu("H200")
    near = replace(ONE, parameters=1_900_000_000, trainable=1_900_000_000)
    assert nearest([ONE, near], h200, WORK) == near == nearest([near, ONE], h200, WORK)
    for change in (
        {"seq_len": 512},
        {"micro_batch_size": 64},
        {"checkpointing": "full"},
        {"world_size": 8},
        {"family": "qwen3"},
    ):
        assert nearest([replace(near, **change), near], h200, WORK) == near, change
    newer = replace(near, date="2026-11-21", step_s=2.0)
    assert nearest([near, newer], h200, WORK) == newer == nearest([newer, near], h200, WORK)
